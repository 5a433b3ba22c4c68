"""The encoding of a text: UTF-8, what its first bytes say, or what fits it best, told with words that it makes."""

import codecs
import contextlib
import itertools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import regex  # knows the kinds of characters

from robopoet.errors import DataError

RESAVE = "save the file as UTF-8, or name its --encoding"
REPLACED = 0.01  # the largest share of a text that may be replaced
MARKS = {  # UTF-32 first, as the mark of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
MAY_BE_ASCII = ("utf-16", "utf-32", "utf-7", "iso2022", "hz")  # though the text is not
# nearly all of a text in Chinese, Japanese or Korean; and what none in another encoding becomes in UTF-16
EAST_ASIAN = re.compile(r"[\n\r -~\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef]")
KANA = re.compile(r"[\u3000-\u3002\u3041-\u30ff]")
UTF_7 = re.compile(rb"\+[A-Za-z0-9+/]{3,}")
DECLARED_IN = 2**10  # bytes in which a page declares its encoding
SEARCHED, WEIGHED = 2**22, 2**14  # bytes from the first beyond ASCII in which words are sought to guess by, and found
PIECE = re.compile(rb"[^ \r\n]+(?: +[^ \r\n]+){0,99}")  # at most so many in a line
TAG = re.compile(rb"<[^<>]{0,1000}>")
WESTERN = ("cp1252", "mac-roman", "cp437")  # what most books are in that have few letters beyond ASCII
ENOUGH = 8  # bytes beyond ASCII from which an encoding can be told
FEW = 0.02  # or so small a share of them, as a Latin script has
MIXED = 0.1  # the share of lines in UTF-8, among those beyond ASCII, from which on a file holds two encodings
CONTROLS = bytes({*range(0x20)} - set(b"\t\n\r"))
CODES = CONTROLS.translate(None, b"\x0b\x0c\x1a\x1b")  # only a text for a terminal has them
SUPERSETS = {"iso8859-1": "cp1252", "iso8859-9": "cp1254", "tis-620": "cp874", "euc_kr": "cp949"}  # what is meant
RARE = "hp-roman8 cp1006 iso8859-4 iso8859-10 iso8859-14 iso8859-16 shift_jis_2004".split()  # and like what is common
POSSIBLE = 0.9  # the share of the most confident guess's confidence from which on the words decide
LIKELY = 0.97  # and from which on the most usual is meant
DOUBTFUL = 0.999  # and from which on a person decides, where the words don't
NOISE = 0.15  # flaws for a byte beyond ASCII, if more than one, above which a guess is wrong
# what a wrong encoding makes of words: control characters, capitals inside or alone, letters beside digits or those of
# another script, signs beside a letter, parts of boxes without others
FLAW = regex.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\p{Co}]|(?<![─-▟])[─-▟](?![─-▟])"
    r"|(?=[^\x00-\x7f])(?:(?<=\p{Ll})\p{Lu}|(?<=\p{L})\p{Lu}(?=\p{Ll})|\p{Ll}(?=\p{Lu})"
    r"|(?<=\p{Ll},?\s)\p{Lu}(?=\s\p{Ll})|\p{L}(?=\d)|(?<=\d)\p{L}|(?<![\p{L}\d])[’¶\p{Sc}\p{So}\p{No}](?=\p{L})"
    r"|(?<=[a-z])[\p{IsCyrillic}\p{IsGreek}\p{IsArabic}\p{IsHebrew}\p{IsThai}]|[\p{IsCyrillic}\p{IsGreek}](?=[a-z])"
    r"|(?<=\p{L})(?:[\p{Sm}\p{Sc}\p{Sk}\p{Ps}\p{No}†‡‰¿¡¶§ƒ]|[^\p{L}\p{M}\p{Pd}\s’·…](?=\p{L})))"
)
UNUSUAL, SIGNS = re.compile(r"\b\w*[^\W\x00-\x7f]\w*"), re.compile(r"(?<!\S)\S*[^\s\x00-\x7f]\S*")  # not all ASCII
NO_BOOK: Mapping[str, bytes] = MappingProxyType({})
SHOWN_WORDS, SHOWN_LETTERS, LOOKED_AT = 4, 20, 1000


class _Guess(NamedTuple):
    encoding: str
    text: str  # that it makes of the sample
    flaws: int
    confidence: float


def decode(name: str, content: bytes, encoding: str = "", book: Mapping[str, bytes] = NO_BOOK) -> tuple[str, str]:
    """`content` as text, and what is to be told of how it was read, or "".

    encoding: what it is; "": what its mark says, UTF-8, or what fits best. book: the files of its book that are not
    UTF-8, by which to guess. Raises DataError if none fits, two fit alike, or more than REPLACED of it doesn't.
    """
    encoding = encoding or next((marked for mark, marked in MARKS.items() if content.startswith(mark)), "")
    text, byte = _strictly(content, encoding or "utf-8")
    found = "" if encoding or (text is not None and not _may_be_another(content)) else _unicode_or_escaped(content)
    if found:
        text, byte = _strictly(content, found)
    if text is None and not encoding and not found and not _is_mostly_utf8(content):
        _check_unmixed(name, content)
        alike = b"\n".join(other for other in book.values() if b"\0" not in other) or content
        found = _declared(content) or _guess(f"{name}: byte {byte} is not UTF-8", alike)
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


def _count(content: bytes, codes: bytes) -> int:
    """How many bytes of `content` are among `codes`."""
    return len(content) - len(content.translate(None, codes))


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


# ---------------------------------------------------------------------------------------------------------------------
# guesses


def _may_be_another(content: bytes) -> bool:
    """Whether what is valid UTF-8 may be in another encoding, whose bytes may all be ASCII."""
    if b"\0" in content:
        return True
    return content.isascii() and (b"\x1b" in content or b"~{" in content or UTF_7.search(content) is not None)


def _unicode_or_escaped(content: bytes) -> str:
    """The encoding of `content` if that is UTF-16, UTF-32 or one with escapes, else ""."""
    import chardet  # a twentieth of a second, for those who need it

    found = chardet.detect(content, max_bytes=len(content), compat_names=False)["encoding"] or ""
    if found.startswith(("utf-16", "utf-32")):  # or is it a text with a few zeros?
        controls = _count(content, CONTROLS)
        is_few = controls < len(content) / 4 if is_utf8(content) else content.count(b"\0") < content.count(b" ") / 2
        return "" if is_few else found
    for encoding in ("utf-16-le", "utf-16-be"):  # without a space or line end
        sample = content[:WEIGHED].decode(encoding, "replace")
        if len(KANA.findall(sample)) > 0.01 * len(sample) and len(EAST_ASIAN.findall(sample)) > 0.9 * len(sample):
            return encoding
    return found if found.startswith(MAY_BE_ASCII) else ""


def _declared(content: bytes) -> str:
    """The encoding that a page declares, if it fits, else ""."""
    import chardet

    head = chardet.detect(content[:DECLARED_IN], compat_names=False)
    encoding = head["encoding"] or ""
    encoding = SUPERSETS.get(encoding, encoding)
    is_declared = head["mime_type"] in ("text/html", "text/xml")
    return encoding if is_declared and _strictly(content, encoding)[0] is not None else ""


def _sample(content: bytes) -> bytes:
    """Lines of `content`, or pieces of them, that are not all ASCII, from all over it and with each byte in it.

    Control codes and tags are left out. The first WEIGHED bytes are those by which an encoding is guessed.
    """
    first = re.search(rb"[\x80-\xff]", content)
    assert first  # ASCII is UTF-8
    start = content.rfind(b"\n", 0, first.start()) + 1
    found = [piece for piece in PIECE.findall(TAG.sub(b" ", content[start : start + SEARCHED])) if not piece.isascii()]
    sample = found[:: sum(map(len, found)) // WEIGHED + 1]
    seen = set(b"".join(sample))
    for piece in found:
        if not seen.issuperset(piece):
            seen.update(piece)
            sample.append(piece)
    return b"\n".join(sample).translate(None, CONTROLS)


def _guess(problem: str, content: bytes) -> str:
    """The encoding that fits `content` best; raises DataError, which begins with `problem`, if none or several do."""
    import chardet

    sample, high = _sample(content), _count_high(content)
    listed: list[chardet.DetectionDict] = []
    is_text = _count(content, CODES) <= REPLACED * len(content)
    if is_text and (high >= ENOUGH or high < FEW * len(content)):
        eras = chardet.EncodingEra.ALL & ~chardet.EncodingEra.MAINFRAME
        listed = chardet.detect_all(
            sample, ignore_threshold=True, compat_names=False, encoding_era=eras, exclude_encodings=RARE
        )
    found: dict[str, float] = {}
    for entry in listed:
        if entry["encoding"]:
            found.setdefault(SUPERSETS.get(entry["encoding"], entry["encoding"]), entry["confidence"])
    if found and high < ENOUGH:  # too little for statistics
        found = dict.fromkeys(WESTERN, max(found.values())) | found
    guesses: dict[str, _Guess] = {}  # by text
    most = 0.0
    for encoding, confidence in found.items():  # the most confident first
        text = sample.decode(encoding, "replace") if confidence >= POSSIBLE * most else ""
        flaws = len(FLAW.findall(text))
        if text and flaws <= max(1, NOISE * _count_high(sample)):
            most = most or confidence
            if text not in guesses or encoding == WESTERN[0]:
                guesses[text] = _Guess(encoding, text, flaws, confidence)
    favoured = WESTERN if high < ENOUGH else WESTERN[:1]

    def rank(guess: _Guess) -> tuple[int, int, float]:
        is_usual = guess.encoding in favoured and guess.confidence >= LIKELY * most
        return guess.flaws, favoured.index(guess.encoding) if is_usual else len(favoured), -guess.confidence

    if not guesses:
        raise DataError(f"{problem}; {RESAVE}")
    best, *others = sorted(guesses.values(), key=rank)
    for other in others:
        is_as_good = other.flaws == best.flaws and other.confidence >= DOUBTFUL * best.confidence
        if is_as_good and best.encoding != WESTERN[0]:
            raise DataError(f"{problem}; it reads as {_compared(best, other)}; name its --encoding")
    return best.encoding


def _compared(one: _Guess, other: _Guess) -> str:
    """The first word that the two read otherwise, in each encoding."""
    pairs = zip(re.split("[ \n]+", one.text), re.split("[ \n]+", other.text), strict=False)
    words = next(pair for pair in pairs if pair[0] != pair[1])
    return " or ".join(f"{g.encoding}: {word[:SHOWN_LETTERS]}" for g, word in zip((one, other), words, strict=True))


def _words(text: str) -> str:
    """A few words of `text`, each with another character beyond ASCII; if all are ASCII, the first ones."""
    shown: list[str] = []
    for pattern in (UNUSUAL, SIGNS):
        for match in itertools.islice(pattern.finditer(text), LOOKED_AT if not shown else 0):
            if len(shown) < SHOWN_WORDS and not set(re.findall(r"[^\x00-\x7f]", match[0])) <= set("".join(shown)):
                shown.append(match[0][:SHOWN_LETTERS])
    return " ".join(shown or text[:LOOKED_AT].split()[:SHOWN_WORDS])
