"""The room that replaces files and appends to them: what was there stays whole until what is new is whole."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from robopoet import portable


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """The system's errors in this block name `path`: what a disk that is full says does not."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror or str(e), str(path)) from e


@contextlib.contextmanager
def creating(path: Path) -> Iterator[Path]:
    """A name for a new file or folder, which becomes `path` once it is whole, and is removed if anything fails.

    Raises OSError, which names `path`, also if that exists.
    """
    with named(path):
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists; choose another name, or remove it")
        folder = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".part", dir=path.absolute().parent))
        try:
            yield folder / path.name
            os.replace(folder / path.name, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A new file to write and read, which at the end takes the place of `path`, on the disk as well.

    After a crash at any moment `path` is the old file or the new one. keep: where to move the old file instead of
    replacing it. If anything fails, the new file is removed. Raises OSError, which names `path`.
    """
    part = path.with_name(path.name + ".part")
    try:
        with named(path):
            with open(part, "w+b") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(part, path)
            portable.sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def link(path: Path, name: Path) -> None:
    """Give the file at `path` a second name, in place of what has it; a copy where the file system has no links."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        with open(path, "rb") as source, replacing(name) as copy:
            shutil.copyfileobj(source, copy, 2**20)


def append_lines(path: Path, lines: bytes) -> None:
    """Append whole lines to a file: all of them or, on an error, none.

    If its last line was cut off before its line break, that line is ended first. Raises OSError, which names `path`.
    """
    with named(path), open(path, "a+b", buffering=0) as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(size - 1, 0))
        if f.read(1) not in (b"", b"\n"):
            lines = b"\n" + lines
        try:
            while lines:  # a disk that is almost full takes a part
                lines = lines[f.write(lines) :]
        except OSError:
            with contextlib.suppress(OSError):
                f.truncate(size)
            raise
