"""Cleaning removes what is not part of the work: Project Gutenberg's licence, stray white space, a play's markup.

Every pattern here takes time linear in the text, whatever the text is. A manifest's own patterns may not, so they have
a time limit.
"""

import functools
import html
import math
import os
import re
from collections.abc import Callable, Iterator

import numpy as np
import regex  # its patterns can time out

from robopoet.errors import DataError

COUNTED_CHARS = 2**20  # characters that are counted at a time
KEPT = 0.9  # share of a work's letters below which cleaning warns
MOST_REPEATS = 10_000  # the most repeats that a manifest's pattern may ask for
FRAME_LETTERS = 30_000  # more than Project Gutenberg's licence and header have: 25,000

# a terminal's command, as for a colour, or another control code
CONTROL = re.compile(r"[\x00-\x08\x0e-\x19\x1b-\x1f\x7f](?:(?<=\x1b)\[[0-?]*[ -/]*[@-~])?")
CONTROL_CODES = bytes(code for code in (*range(0x20), 0x7F) if code not in b"\t\n\v\f\r\x1a")

GUTENBERG_START = re.compile(
    r"^.*(?:\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG (?:.|\n(?!\n)){0,400}?\*\*\*"
    r"|\*END[* ]THE SMALL PRINT!).*$",
    re.M,
)
GUTENBERG_END = re.compile(
    r"^(?:.{0,100}Gutenberg.{0,200}\n{1,4})?[^\S\n]*(?:\*\*\* ?)?END OF (?:THE |THIS )?PROJECT GUTENBERG.*$",
    re.M | re.I,
)
# at most eight lines that a blank line ends, or else one line
GUTENBERG_CREDIT = re.compile(
    r"\s*(?:E-text )?(?:produced|prepared|transcribed) by\b.{0,300}\n(?:(?:.{1,100}\n){0,7}(?=\n))?", re.I
)


def _books(text: str) -> list[tuple[int, int]]:
    """The books in `text` as (start, stop): what Project Gutenberg's header and licence enclose, or else all of it."""
    # looking for a fixed string first is much faster than the patterns
    ends = list(GUTENBERG_END.finditer(text)) if b"gutenberg" in text.encode().lower() else []
    is_framed = "START OF TH" in text or "THE SMALL PRINT!" in text
    books = []
    begins, stops = [0, *(end.end() for end in ends)], [*(end.start() for end in ends), len(text)]
    for begin, stop in zip(begins, stops, strict=True):
        starts = list(GUTENBERG_START.finditer(text, begin, stop)) if is_framed else []
        if starts:
            credit = GUTENBERG_CREDIT.match(text, starts[-1].end(), stop)
            books.append((credit.end() if credit else starts[-1].end(), stop))
        elif not begin:  # the text after an end line is the licence
            books.append((begin, stop))
    return books


def plain(text: str) -> str:
    """`text` with LF line ends, without a byte order mark, DOS's mark of a file's end and control codes."""
    text = (
        text.removeprefix("\ufeff")
        .replace("\r\r\n", "\n")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
        .replace("\x1a", "")
    )
    if not count_controls(text):
        return text
    if "\x08" in text:
        text = re.sub(".\x08", "", text)  # letters that the next one is printed over
    return CONTROL.sub("", text)


def count_controls(text: str) -> int:
    """The number of control codes, such as NUL and ESC, but for what ends a line, page or file."""
    encoded = text.encode()
    return len(encoded) - len(encoded.translate(None, CONTROL_CODES))


def tell_controls(told: str, n: int, fate: str = "left out") -> str:
    """`told`, and that a text holds `n` control codes, if it does."""
    return "; ".join(filter(None, (told, f"holds control codes, {fate}: {n:,}" if n else "")))


def _without_trailing_space(text: str) -> str:
    """`text` with LF line ends and without white space at the ends of lines."""
    text = plain(text)
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return text


def clean_text(text: str) -> str:
    """Clean any text: LF line ends, no trailing white space, one blank line at a time, no Project Gutenberg licence."""
    text = _without_trailing_space(text)
    text = "\n\n".join(text[start:stop] for start, stop in _books(text))
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return "" if not text or text.isspace() else text.strip("\n") + "\n"


def clean_prose(text: str) -> str:
    """Clean prose: as clean_text, and paragraphs lose their indent; verse keeps its relative indents."""
    paragraphs = []
    for paragraph in clean_text(text).split("\n\n"):
        first, newline, rest = _dedent(paragraph).partition("\n")
        indented_only_first = not re.search(r"^\s", rest, re.M)
        paragraphs.append((first.lstrip() if indented_only_first else first) + newline + rest)
    return "\n\n".join(paragraphs)


def _dedent(paragraph: str) -> str:
    """textwrap.dedent without its regular expression, which is as long as the indent."""
    lines = paragraph.split("\n")
    indents = [line[: len(line) - len(line.lstrip(" \t"))] for line in lines if line]
    margin = len(os.path.commonprefix(indents))  # noqa: RUF071 (compares characters, as it should)
    return "\n".join(line[margin:] for line in lines)


def clean_drama(text: str) -> str:
    """Clean a play in Markdown: title, ACT, SCENE, a speaker in capitals on a line of its own, [stage directions]."""
    text = _unescape(clean_text(text))
    text = re.sub(r"& c(?![^\W_])", "&c", text)
    text = re.sub(r"\\([\[\].-])", r"\1", text)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\* *$", lambda speaker: speaker[1].upper(), text, flags=re.M)
    text = re.sub(r"(?<!\w)([^\W_]*)_(\w+) _\[", r"\1_[\2 ", text)  # _Burthen _[dispersedly, within_
    text = re.sub(r"([_*])\1*\[?((?:(?!\n\n)[^_*\[\]])*)\]?\1+", r"[\2]", text)  # _Exit_, *Exit*, _[Aside]_
    text = re.sub(r"[_*]|\[\s*\]", "", text)  # stray marks, and gaps in the source: [ ]
    return clean_text(text)


def _unescape(text: str) -> str:
    """html.unescape without its error on numbers of over 4,300 digits."""
    return html.unescape(re.sub(r"&#\d{20,};?", "\ufffd", text))


CLEANERS: dict[str, Callable[[str], str]] = {
    "text": clean_text,
    "prose": clean_prose,
    "drama": clean_drama,
    "none": lambda text: text,
}


def remove(text: str, patterns: tuple[str, ...], place: str) -> str:
    """`text` without the matches of `patterns`; raises DataError naming `place` if one takes too long."""
    limit_s = 2 + 2 * len(text) / 1e6  # a hundred times the usual
    for pattern in patterns:
        try:
            text = regex.sub(pattern, "", text, timeout=limit_s)
        except TimeoutError:
            advice = "write it without nested repeats"
            raise DataError(f"{place}: remove: {pattern!r} takes over {limit_s:.0f} s; {advice}") from None
    return text


def pattern_problem(pattern: str) -> str:
    """What is wrong with a pattern to remove, which must be one of Python's own `re`; "" if nothing is."""
    if math.prod(max(int(least), 1) for least in re.findall(r"\{(\d+)", pattern)) > MOST_REPEATS:
        return f"repeats more than {MOST_REPEATS:,} times"  # regex writes repeats out in memory
    try:
        re.compile(pattern)  # without what regex adds: recursion may take all memory
        regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as e:
        return str(e)
    return ""


def count_letters(text: str) -> int:
    """The number of letters, of any script."""
    return sum(int(np.count_nonzero(is_letter()[codes])) for codes in code_points(text))


@functools.cache
def is_letter() -> np.ndarray:
    """Whether each code point is a letter: (0x110000,) bool."""
    return np.array([chr(code).isalpha() for code in range(0x110000)])


def code_points(text: str) -> Iterator[np.ndarray]:
    """The code points of `text`, COUNTED_CHARS at a time: (n,) uint32."""
    for start in range(0, len(text), COUNTED_CHARS):
        part = text[start : start + COUNTED_CHARS]
        yield np.frombuffer(part.encode("utf-32-le"), dtype="<u4")


def loss_warning(raw: str, text: str, before: int, kept: int) -> str:
    """A warning if cleaning `raw` to `text` lost much of the work itself; else "".

    before, kept: the letters in `raw` and in `text`. Project Gutenberg's header and licence don't count as lost.
    """
    if kept >= KEPT * before:
        return ""
    raw = _without_trailing_space(raw)
    books = _books(raw)
    edges = [0, *(edge for book in books for edge in book), len(raw)]
    gaps = [raw[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    too_long = [gap for gap in gaps if not _is_frame(gap)]
    inside = _unescape("\n\n".join(raw[start:stop] for start, stop in books))
    total = count_letters(inside) + sum(map(count_letters, too_long))
    if kept >= KEPT * total:
        return ""
    lost = max(too_long, key=len) if too_long else _from_first_loss(inside, text)
    return (
        f"cleaning kept {kept / total:.0%} of its letters; the {total - kept:,} it removed begin "
        f"{' '.join(lost[:300].split())[:60]!r} (clean: none in a corpus.yaml keeps all)"
    )


def _is_frame(gap: str) -> bool:
    """Whether text outside a book is short, or Project Gutenberg's: no longer than its licence, and names it twice."""
    letters = count_letters(gap)
    return letters <= 500 or (letters <= FRAME_LETTERS and gap.encode().lower().count(b"gutenberg") > 1)


def _from_first_loss(raw: str, text: str) -> str:
    """`raw` from its first letter on that is missing in `text`."""
    kept = (char.casefold() for char in text if char.isalpha())
    lost = (i for i, char in enumerate(raw) if char.isalpha() and char.casefold() != next(kept, ""))
    return raw[next(lost, 0) :]
