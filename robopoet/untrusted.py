"""Every file from outside is decoded once, bounded in size, into a frozen dataclass; msgspec checks types and ranges.

Code behind this module sees no raw dict: a wrong type, a number out of range or a missing key ends here, in one line
that says where in the file it stands, as `$.splits.val.documents[0].start`.
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
