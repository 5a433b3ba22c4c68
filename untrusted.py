"""Every file from outside is decoded once, bounded in size, into a frozen dataclass; msgspec checks types and ranges.

Code behind this module sees no raw dict: a wrong type, a number out of range or a missing key ends here, in one line
that says where in the file it stands, as `$.splits.val.documents[0].start`.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # exact in every JSON reader
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]

JSON_BYTES = 100 * 2**20
YAML_BYTES = 2**20
YAML_EVENTS, YAML_DEPTH = 100_000, 20
SHOWN_CHARS = 300  # of a message: some quote what was found

BaseLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # leaves every scalar as text and builds no object


def check_regular(path: Path, error: type[Exception]) -> int:
    """The size of a regular file, bytes; raises `error` for what is missing or is none: pipes and devices never end."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:
        raise error(f"{path}: {getattr(e, 'strerror', None) or e}") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is {'a folder' if stat.S_ISDIR(found.st_mode) else 'not a regular file'}; name a file")
    return found.st_size


def read_bytes(path: Path, error: type[Exception], limit: int = JSON_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises `error`."""
    if (size := check_regular(path, error)) > limit:
        raise error(f"{path}: has {size:,} bytes, must have at most {limit:,}")
    try:
        with open(path, "rb") as f:
            return f.read(size)  # read(limit) would allocate so much
    except OSError as e:
        raise error(f"{path}: {e.strerror}") from None


def read_lines(path: Path, error: type[Exception]) -> Iterator[tuple[int, bytes]]:
    """Each line of a regular file and its number, from 1; raises `error`, also for one of over 100 MB."""
    check_regular(path, error)
    try:
        with open(path, "rb") as f:
            number = 0
            while line := f.readline(JSON_BYTES + 1):
                number += 1
                if len(line) > JSON_BYTES:
                    raise error(f"{path}: line {number}: has over {JSON_BYTES:,} bytes")
                yield number, line.rstrip(b"\r\n")
    except OSError as e:
        raise error(f"{path}: {e.strerror}") from None


def decode_json(raw: bytes | str, kind: type[T], where: object, error: type[Exception], advice: str) -> T:
    """`raw` as a `kind`; raises `error` with `where` it comes from, what is wrong at which place, and `advice`."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise error(f"{where}: {describe(e)}; {advice}") from None


def read_json(path: Path, kind: type[T], error: type[Exception], advice: str) -> T:
    """The JSON file at `path` as a `kind`; raises `error`."""
    return decode_json(read_bytes(path, error), kind, path, error, advice)


def convert(value: Any, kind: type[T], where: object, error: type[Exception], advice: str, is_text: bool = False) -> T:
    """A decoded value as a `kind`; is_text: numbers and booleans are still text in it, as YAML leaves them here."""
    try:
        return msgspec.convert(value, kind, strict=not is_text)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise error(f"{where}: {describe(e)}; {advice}") from None


def read_yaml(path: Path, error: type[Exception]) -> Any:
    """The YAML file at `path`, every scalar left as text; raises `error`, also for aliases, which can blow up.

    Of at most 1 MB; mappings and lists nest at most 20 deep.
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


def describe(e: Exception) -> str:
    """An exception's message in one line of bounded length."""
    return shorten(str(e)) or type(e).__name__


def shorten(text: str) -> str:
    """`text` in one line of at most 300 characters: what stands in the middle of a longer one is left out."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARS else f"{line[:200]} ... {line[-90:]}"
