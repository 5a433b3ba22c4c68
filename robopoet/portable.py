"""What only some systems have, in one place: Windows lacks all of it, and the rest of the code need not know."""

import os
import signal
import sys
from pathlib import Path

try:
    import resource
except ImportError:
    resource = None

SIGUSR1 = getattr(signal, "SIGUSR1", None)
SIGHUP = getattr(signal, "SIGHUP", None)
SIGALRM = getattr(signal, "SIGALRM", None)


def set_alarm(seconds: float) -> None:
    """Send this process SIGALRM in so many seconds (0: cancel that); does nothing where there is no such signal."""
    if SIGALRM is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)


def peak_resident_mb() -> float:
    """The most memory that this process has had, MB; 0 where the system does not tell."""
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, such as a rename, to the disk, where a folder can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
