"""Files from outside: bounded in size, decoded once, into frozen dataclasses whose types and ranges msgspec checks.

The rest of the code sees no raw dict. A wrong type, a number out of range or a missing key is refused here, in one line
that gives its place in the file, such as `$.splits.val.documents[0].start`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from configurator import JSON_BYTES, check_regular, describe, read_bytes

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # exact in every JSON reader
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


def read_lines(path: Path, error: type[Exception]) -> Iterator[tuple[int, bytes]]:
    """Each line of a regular file with its number, from 1; raises `error`, also on a line of over 100 MB."""
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
    """Decode JSON into a `kind`; raises `error` with `where` (a file or line), what is wrong, and `advice`."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise error(f"{where}: {describe(e)}; {advice}") from None


def read_json(path: Path, kind: type[T], error: type[Exception], advice: str) -> T:
    """Read the JSON file at `path` into a `kind`; raises `error` as `decode_json` does."""
    return decode_json(read_bytes(path, error), kind, path, error, advice)


def convert(value: Any, kind: type[T], where: object, error: type[Exception], advice: str) -> T:
    """Convert dicts, lists and numbers into a `kind`; raises `error` as `decode_json` does."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, AttributeError) as e:  # it takes a tensor for a mapping
        raise error(f"{where}: {describe(e)}; {advice}") from None


def convert_yaml(value: Any, kind: type[T], where: object, error: type[Exception], advice: str) -> T:
    """As `convert`, for what configurator.read_yaml returns: its numbers and booleans are still text."""
    try:
        return msgspec.convert(value, kind, strict=False)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
        raise error(f"{where}: {describe(e)}; {advice}") from None
