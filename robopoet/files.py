"""The room that opens, bounds, decodes, hashes and replaces files.

What comes from outside is bounded in size and decoded once, into frozen dataclasses whose types and ranges msgspec
checks: the rest of the code sees no raw dict, and a mistake is told with its place in the file, such as
`$.splits.val.documents[0].start`. What is written takes the place of the old file only once it is whole.
"""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import msgspec
import yaml

from robopoet import portable
from robopoet.errors import describe, nearest

HOME = Path(__file__).parents[1]  # holds the scripts, config/ and data/
JSON_BYTES = 100 * 2**20  # largest file that read_bytes reads by default
YAML_BYTES, YAML_EVENTS, YAML_DEPTH = 2**20, 100_000, 20
BaseLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # leaves every scalar as text and builds no objects

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # exact in every JSON reader
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


# ---------------------------------------------------------------------------------------------------------------------
# finding


def beside_scripts(path: str | Path) -> Path:
    """`path`, or if it does not exist, the same path beside the scripts if that does."""
    return HOME / path if not os.path.exists(path) and os.path.exists(HOME / path) else Path(path)


def did_you_mean_path(path: str | Path) -> str:
    """What a message adds about a missing path: the most similar one, here or beside the scripts, if there is any."""
    path = Path(path)
    with contextlib.suppress(OSError, ValueError):
        for missing in (*reversed(path.parents), path):
            if not beside_scripts(missing).exists():  # the first folder that is missing, or else the file
                rest = path.relative_to(missing)
                folders = filter(os.path.isdir, (missing.parent, HOME / missing.parent))
                names = (name for folder in folders for name in os.listdir(folder))
                there = (name for name in names if beside_scripts(missing.with_name(name) / rest).exists())
                near = nearest(missing.name, there)
                return f"; did you mean {missing.with_name(near) / rest}?" if near else ""
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# reading, bounded


def check_regular(path: Path, error: type[Exception]) -> int:
    """The size of a regular file in bytes; raises `error` on anything else: pipes and devices may never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:
        near = did_you_mean_path(path) if isinstance(e, FileNotFoundError) else ""
        raise error(f"{path}: {getattr(e, 'strerror', None) or e}{near}") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is {'a folder' if stat.S_ISDIR(found.st_mode) else 'not a regular file'}; name a file")
    return found.st_size


@contextlib.contextmanager
def reading(path: Path, error: type[Exception]) -> Iterator[io.BufferedReader]:
    """A regular file to read; raises `error`, also in this block, if it can't be read."""
    check_regular(path, error)
    try:
        with open(path, "rb") as f:
            yield f
    except OSError as e:
        raise error(f"{path}: {e.strerror}") from None


def read_bytes(path: Path, error: type[Exception], limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises `error` if it is larger or can't be read."""
    if (size := check_regular(path, error)) > limit:
        raise error(f"{path}: has {size:,} bytes, must have at most {limit:,}")
    with reading(path, error) as f:
        return f.read(size)  # not read(limit), which would allocate that much


def read_lines(path: Path, error: type[Exception]) -> Iterator[tuple[int, bytes]]:
    """Each line of a regular file with its number, from 1; raises `error`, also on a line of over 100 MB."""
    with reading(path, error) as f:
        for number, line in enumerate(iter(lambda: f.readline(JSON_BYTES + 1), b""), 1):
            if len(line) > JSON_BYTES:
                raise error(f"{path}: line {number}: has over {JSON_BYTES:,} bytes")
            yield number, line.rstrip(b"\r\n")


def sha256(error: type[Exception], *paths: Path) -> str:
    """The SHA-256, in hexadecimal, of these regular files one after the other; raises `error` if one can't be read."""
    sha = hashlib.sha256()
    for path in paths:
        with reading(path, error) as f:
            hashlib.file_digest(f, lambda: sha)
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# decoding


def decode_json(raw: bytes | str, kind: type[T], where: object, error: type[Exception], advice: str) -> T:
    """Decode JSON into a `kind`; raises `error` with `where` (a file or line), what is wrong, and `advice`."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise error(f"{where}: {describe(e)}; {advice}") from None


def read_json(path: Path, kind: type[T], error: type[Exception], advice: str) -> T:
    """Read the JSON file at `path` into a `kind`; raises `error` as `decode_json` does."""
    return decode_json(read_bytes(path, error), kind, path, error, advice)


def convert(value: Any, kind: type[T], where: object, error: type[Exception], advice: str, strict: bool = True) -> T:
    """Convert dicts, lists and numbers into a `kind`; raises `error` as `decode_json` does.

    strict: false where numbers and booleans are still text, as `read_yaml` leaves them.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, AttributeError) as e:  # it takes a tensor for a mapping
        raise error(f"{where}: {describe(e)}; {advice}") from None


def read_yaml(path: Path, error: type[Exception]) -> Any:
    """The content of a YAML file, every scalar left as text.

    Raises `error` on a file over 1 MB, over 100,000 values, nesting over 20 deep, and aliases, which can expand to
    gigabytes.
    """
    raw = read_bytes(path, error, YAML_BYTES)
    try:
        text, depth = raw.decode(), 0
        for count, event in enumerate(yaml.parse(text, Loader=BaseLoader)):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise error(f"{path}: line {event.start_mark.line + 1}: has an alias, *NAME; write the value out")
            if depth > YAML_DEPTH or count > YAML_EVENTS:
                raise error(f"{path}: holds over {YAML_EVENTS:,} values or nests over {YAML_DEPTH} deep; shorten it")
        return yaml.load(text, Loader=BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as e:
        raise error(f"{path}: is not YAML: {describe(e)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# writing


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
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write and read, which at the end is on the disk, whole."""
    with open(path, "w+b", 2**20) as f:
        yield f
        f.flush()
        os.fsync(f.fileno())


def move(places: dict[Path, Path]) -> None:
    """Rename each file or folder to its place, where a file may be, which it replaces; on the disk as well."""
    for path, place in places.items():
        os.replace(path, place)
    for folder in sorted({path.parent for path in (*places, *places.values())}):
        portable.sync_folder(folder)


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A new file to write and read, which at the end takes the place of `path`, on the disk as well.

    After a crash at any moment `path` is the old file or the new one. keep: where to move the old file instead of
    replacing it. If anything fails, the new file is removed. Raises OSError, which names `path`.
    """
    part = path.with_name(path.name + ".part")
    try:
        with named(path):
            with writing(part) as f:
                yield f
            if keep and path.exists():
                os.replace(path, keep)
            move({part: path})
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def replace_private(path: Path, content: bytes) -> None:
    """Replace a file, or create it and its folder; only the owner can read it. Raises OSError, which names `path`."""
    with named(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(".part", f"{path.name}.", path.parent)
        os.close(file)
        part = Path(name)
        try:
            with writing(part) as f:
                f.write(content)
            move({part: path})
        finally:
            part.unlink(missing_ok=True)


def link(path: Path, name: Path) -> None:
    """Give the file at `path` a second name, in place of what has it; a copy where the file system has no links."""
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:
        with open(path, "rb") as source, replacing(name) as copy:
            shutil.copyfileobj(source, copy, 2**20)
    else:
        portable.sync_folder(name.parent)


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
