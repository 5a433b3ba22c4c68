"""out_dir: the lock that makes it a run's own, where it went if it was moved, and the runs that were in it before."""

import filecmp
import os
import threading
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from robopoet import files, portable
from robopoet.errors import ConfigError, warn

CHECKPOINTS = ("ckpt.damaged.pt", "ckpt.prev.pt", "ckpt.pt")
OTHERS = ("metrics.jsonl", "report.html", "config.yaml", "events.out.tfevents.*")


class Folder:
    """The folder `path`, which the main rank makes, and locks until close() or until its process ends, however it ends.

    lost: why it is no longer the run's, which must end then; "" as long as it is. Raises ConfigError if the folder
    can't be written or another run is writing to it.
    """

    def __init__(self, path: Path, is_main: bool):
        self.path, self.lost, self.asking = path, "", threading.Lock()
        self.lock: BaseFileLock | None = None
        if is_main:
            self._take(path)

    def _take(self, path: Path) -> None:
        self.lock = lock_folder(path)
        self.path, self.held = path, os.stat(path / ".lock")
        self.descriptor: int | None = portable.open_folder(path)

    def _holds(self, path: Path) -> bool:
        """Whether it is our lock that lies in `path`."""
        try:
            return os.path.samestat(os.stat(path / ".lock"), self.held)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def where(self) -> Path:
        """Where the run may write now: its folder, which is made again if it was deleted.

        If the folder was moved, that is where it went; if another run has begun in it, a new folder beside the earlier
        runs. Raises ConfigError if that can't be written. The log and a thread that saves may ask at once.
        """
        with self.asking:
            return self.path if not self.lock or self._holds(self.path) else self._find()

    def _find(self) -> Path:
        """The folder of a run whose own no longer lies where it was."""
        out, found = self.path, portable.folder_of(self.descriptor)
        moved = found and not (out.exists() and out.samefile(found))
        home = found if moved else out
        taken = (home / ".lock").exists() and not self._holds(home)
        if taken:
            home = next_folder(home)
        if not self._holds(home):
            self.close()
            self._take(home)
        self.path = home
        if moved or taken:
            reason = "was moved" if moved else "was taken by another run"
            self.lost = (
                f"out_dir: {out} {reason} while this run wrote to it; the run ends, and is saved in {home}: "
                f"--init_from=auto --out_dir={home} resumes it"
            )
        else:
            warn(f"{out}, or its .lock, was deleted while the run wrote to it; it is made again")
        return home

    def close(self) -> None:
        """Unlock the folder."""
        if self.lock:
            self.lock.release()
            portable.close_folder(self.descriptor)
            self.descriptor = None


def replaces(out: Path, path: Path) -> bool:
    """Whether a run in `out` writes a file of its own in the place of `path`."""
    return path.resolve() in {(out / name).resolve() for name in (*CHECKPOINTS, "best.pt")}


def lock_folder(path: Path) -> BaseFileLock:
    """Make the folder and lock it until the lock is released, or the process ends; raises ConfigError if it can't."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"out_dir: another run is writing to {path}; wait for it, or choose another") from None
    except OSError as e:
        raise ConfigError(f"out_dir: {path} can't be written ({e.strerror}); choose another") from None
    return lock


def earlier_runs(out: Path) -> list[Path]:
    """The folders of the runs that were in `out` before, oldest first: out/previous/1, 2, ..."""
    folders = [path for path in out.glob("previous/*") if path.name.isascii() and path.name.isdecimal()]
    return sorted(folders, key=lambda path: int(path.name))


def next_folder(out: Path) -> Path:
    """The name under which the next run is put aside."""
    return out / "previous" / str(1 + max((int(path.name) for path in earlier_runs(out)), default=0))


def set_aside(out: Path) -> Path | None:
    """Move an earlier run's files from `out` to a new folder, and return that; None if there is no run.

    Its best.pt is there and in `out`, where it stays until a new run has one of its own. If the process is killed
    meanwhile, nothing is lost and the next call finishes.
    """
    part, best = out / "previous.part", out / "best.pt"
    checkpoints = [path for name in CHECKPOINTS if (path := out / name).exists()]
    is_new = best.exists() and not any(_same(best, folder / "best.pt") for folder in earlier_runs(out))
    if not (checkpoints or is_new or part.exists()):
        return None
    part.mkdir(exist_ok=True)
    if is_new:
        files.link(best, part / "best.pt")
    moved = (*checkpoints, *(path for name in OTHERS for path in out.glob(name)))  # ckpt.pt is the last to resume
    files.move({path: part / path.name for path in moved})
    folder = next_folder(out)
    folder.parent.mkdir(exist_ok=True)
    files.move({part: folder})
    return folder


def _same(path: Path, other: Path) -> bool:
    return other.exists() and (path.samefile(other) or filecmp.cmp(path, other, shallow=False))
