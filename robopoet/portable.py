"""What only some systems have, in one place: Windows lacks all of it, and the rest of the code need not know."""

import contextlib
import os
import platform
import re
import signal
import sys
import threading
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:
    fcntl = resource = None

SIGUSR1 = getattr(signal, "SIGUSR1", None)
SIGHUP = getattr(signal, "SIGHUP", None)
SIGALRM = getattr(signal, "SIGALRM", None)
_reading = threading.Lock()  # where a file's position is set before it is read


def set_alarm(seconds: float) -> None:
    """Send this process SIGALRM in so many seconds (0: cancel that); does nothing where there is no such signal."""
    if SIGALRM is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def read_at(file: int, size: int, place: int) -> bytes:
    """Up to `size` bytes of an open file from `place` on; several threads may read at once."""
    if hasattr(os, "pread"):
        return os.pread(file, size, place)
    with _reading:
        os.lseek(file, place, os.SEEK_SET)
        return os.read(file, size)


def cpu_name() -> str:
    """The processor's model, from /proc/cpuinfo on Linux, else from Python."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def peak_resident_mb() -> float:
    """The most memory that this process has had, MB; 0 where the system does not tell."""
    if resource is None:
        return 0.0
    with contextlib.suppress(OSError):  # Linux, whose ru_maxrss begins with the peak of the process that started this
        if told := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(told[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def most_open_files() -> int:
    """How many files and connections this process may have open; 2,048 where there is no limit or none is told."""
    limit = -1 if resource is None else resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit if 0 <= limit < 2048 else 2048


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, such as a rename, to the disk, where a folder can be opened."""
    if (folder := open_folder(path)) is not None:
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def open_folder(path: Path) -> int | None:
    """A descriptor that stays with a folder when it is renamed; None on Windows, where an open file prevents that."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY) if hasattr(os, "O_DIRECTORY") else None


def close_folder(descriptor: int | None) -> None:
    """Close what open_folder() opened."""
    if descriptor is not None:
        os.close(descriptor)


def folder_of(descriptor: int | None) -> Path | None:
    """Where an open folder is now; None if it was deleted, or where the system does not tell."""
    if descriptor is None:
        return None
    with contextlib.suppress(OSError):
        if fcntl and hasattr(fcntl, "F_GETPATH"):  # macOS
            path = os.fsdecode(fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))
        else:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return Path(path)
    return None
