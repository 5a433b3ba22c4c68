"""The encoding of a text: UTF-8, what its first bytes say, or what fits it best, told with words that it makes."""

import codecs
import contextlib
import itertools
import re
from collections.abc import Mapping
from types import MappingProxyType

import charset_normalizer
from charset_normalizer.utils import any_specified_encoding

from robopoet.errors import DataError

RESAVE = "save the file as UTF-8, or name its --encoding"
REPLACED = 0.01  # the largest share of a text that may be replaced
MARKS = {  # UTF-32 first, as the mark of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
ENOUGH = 8  # bytes beyond ASCII from which an encoding can be told
MIXED = 0.1  # the share of lines in UTF-8, among those beyond ASCII, from which on a file holds two encodings
UNUSUAL, SIGNS = re.compile(r"\b\w*[^\W\x00-\x7f]\w*"), re.compile(r"(?<!\S)\S*[^\s\x00-\x7f]\S*")  # not all ASCII
NO_BOOK: Mapping[str, bytes] = MappingProxyType({})
SHOWN_WORDS, SHOWN_LETTERS, LOOKED_AT = 4, 20, 1000


def decode(name: str, content: bytes, encoding: str = "", book: Mapping[str, bytes] = NO_BOOK) -> tuple[str, str]:
    """`content` as text, and what is to be told of how it was read, or "".

    encoding: what it is; "": what its mark says, UTF-8, or what fits best. book: the files of its book that are not
    UTF-8, by which to guess. Raises DataError if none fits, or more than REPLACED of it doesn't.
    """
    encoding = encoding or next((marked for mark, marked in MARKS.items() if content.startswith(mark)), "")
    text, byte = _strictly(content, encoding or "utf-8")
    found = ""
    if text is None and not encoding and not _is_mostly_utf8(content):
        _check_unmixed(name, content)
        alike = b"\n".join(other for other in book.values() if b"\0" not in other) or content
        found = "" if b"\0" in content else _guess(content, alike)
        if not found:
            raise DataError(f"{name}: byte {byte} is not UTF-8; {RESAVE}")
        text, byte = _strictly(content, found)
    damage = ""
    if text is None:
        text, damage = _repaired(name, content, encoding or found or "UTF-8", byte)
    if not found:
        return text, damage
    told = f"is not UTF-8, reads as {found}: {_words(text)}; if that is wrong, name its --encoding"
    return text, f"{told}; {damage}" if damage else told


def _strictly(content: bytes, encoding: str) -> tuple[str | None, int]:
    """The text, or None and the first byte that does not fit."""
    try:
        return content.decode(encoding), 0
    except LookupError:
        raise DataError(f"encoding: found {encoding}, must be one that Python knows, such as cp1252") from None
    except UnicodeError as e:
        return None, getattr(e, "start", 0)


def is_utf8(content: bytes) -> bool:
    """Whether `content` is valid UTF-8."""
    return _strictly(content, "utf-8")[0] is not None


def _is_mostly_utf8(content: bytes) -> bool:
    text = content.decode("utf-8", "replace")
    return _count_high(text.encode()) > 12 * text.count("\ufffd")


def _count_high(content: bytes) -> int:
    """The number of bytes that are not ASCII."""
    return len(content) - len(content.decode("ascii", "ignore"))


def _check_unmixed(name: str, content: bytes) -> None:
    lines = [(i, line) for i, line in enumerate(content.split(b"\n"), 1) if not line.isascii()]
    others = [i for i, line in lines if not is_utf8(line)]
    if len(lines) - len(others) >= MIXED * len(lines):
        raise DataError(
            f"{name}: {len(others):,} lines, the first line {others[0]:,}, are not UTF-8, as others are; "
            "convert each part of the file by itself"
        )


def _repaired(name: str, content: bytes, encoding: str, byte: int) -> tuple[str, str]:
    """The text with U+FFFD for what does not fit, from `byte` on, and what is to be told of it."""
    text = "\ufffd"
    with contextlib.suppress(UnicodeError):
        text = content.decode(encoding, "replace")
    own = content.count("\ufffd".encode()) if codecs.lookup(encoding).name == "utf-8" else 0
    replaced = text.count("\ufffd") - own
    if replaced > REPLACED * len(text):
        raise DataError(f"{name}: byte {byte} is not {encoding}, nor is {replaced / len(text):.0%} of it; {RESAVE}")
    line = content[:byte].decode(encoding, "replace").count("\n") + 1
    return text, f"is not all {encoding}: characters replaced with U+FFFD: {replaced:,}, the first in line {line:,}"


def _guess(content: bytes, alike: bytes) -> str:
    """The encoding that `content` declares, as HTML may, or that fits what is like it best; "": none does."""
    high = _count_high(alike)
    likely = {"ascii": "cp1252", "latin_1": "cp1252"}.get(declared := any_specified_encoding(content), declared)
    if not likely and high < 0.02 * len(alike):  # a Latin script: too little for statistics, so the most usual
        likely = "cp1252"
    if likely and _strictly(content, likely)[0] is not None:
        return likely
    match = charset_normalizer.from_bytes(alike).best() if high >= ENOUGH else None
    if match is None:
        return ""
    return "cp1252" if "cp1252" in match.could_be_from_charset else match.encoding


def _words(text: str) -> str:
    """A few words of `text`, each with another character beyond ASCII; if all are ASCII, the first ones."""
    shown: list[str] = []
    for pattern in (UNUSUAL, SIGNS):
        for match in itertools.islice(pattern.finditer(text), LOOKED_AT if not shown else 0):
            if len(shown) < SHOWN_WORDS and not set(re.findall(r"[^\x00-\x7f]", match[0])) <= set("".join(shown)):
                shown.append(match[0][:SHOWN_LETTERS])
    return " ".join(shown or text[:LOOKED_AT].split()[:SHOWN_WORDS])
