"""What is taken from a text before a model learns from it: Project Gutenberg's frame, odd blanks, a play's markup.

Every pattern here takes time linear in the text, whatever stands in it; a manifest's own are stopped when they don't.
"""

import functools
import html
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from robopoet.errors import DataError

COUNTED_CHARS = 2**20  # looked at together
KEPT = 0.9  # of a work's letters; cleaning that keeps fewer is told
FRAME_LETTERS = 30_000  # Project Gutenberg's licence and a header have 25,000

GUTENBERG_START = re.compile(
    r"^.*(?:\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG (?:.|\n(?!\n)){0,400}?\*\*\*"
    r"|\*END[* ]THE SMALL PRINT!).*$",
    re.M,
)
GUTENBERG_END = re.compile(r"^[^\S\n]*(?:\*\*\* ?)?END OF (?:THE |THIS )?PROJECT GUTENBERG.*$", re.M | re.I)
# eight lines at most, and one alone where no blank line parts them from the book
GUTENBERG_CREDIT = re.compile(
    r"\s*(?:E-text )?(?:produced|prepared|transcribed) by\b.{0,300}\n(?:(?:.{1,100}\n){0,7}(?=\n))?", re.I
)


def _books(text: str) -> list[tuple[int, int]]:
    """Where books start and stop within Project Gutenberg's frame; without one, all of `text` is a book."""
    # searching for what a pattern can't do without is much faster than the pattern
    ends = list(GUTENBERG_END.finditer(text)) if b"gutenberg" in text.encode().lower() else []
    is_framed = "START OF TH" in text or "THE SMALL PRINT!" in text
    books = []
    begins, stops = [0, *(end.end() for end in ends)], [*(end.start() for end in ends), len(text)]
    for begin, stop in zip(begins, stops, strict=True):
        starts = list(GUTENBERG_START.finditer(text, begin, stop)) if is_framed else []
        if starts:
            credit = GUTENBERG_CREDIT.match(text, starts[-1].end(), stop)
            books.append((credit.end() if credit else starts[-1].end(), stop))
        elif not begin:  # and not the licence, which stands behind an end
            books.append((begin, stop))
    return books


def _plain(text: str) -> str:
    """Any text with LF line ends and no blanks at the end of a line."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\x1a", "")
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return text


def clean_text(text: str) -> str:
    """Any text: LF line ends, no Project Gutenberg licence, no trailing blanks, one blank line between paragraphs."""
    text = _plain(text)
    text = "\n\n".join(text[start:stop] for start, stop in _books(text))
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return "" if not text or text.isspace() else text.strip("\n") + "\n"


def clean_prose(text: str) -> str:
    """A typed book: as clean_text, and paragraphs lose their indent; verse keeps its shape."""
    paragraphs = []
    for paragraph in clean_text(text).split("\n\n"):
        first, newline, rest = _dedent(paragraph).partition("\n")
        indented_only_first = not re.search(r"^\s", rest, re.M)
        paragraphs.append((first.lstrip() if indented_only_first else first) + newline + rest)
    return "\n\n".join(paragraphs)


def _dedent(paragraph: str) -> str:
    """As textwrap.dedent, which compiles a pattern as long as the indent."""
    lines = paragraph.split("\n")
    indents = [line[: len(line) - len(line.lstrip(" \t"))] for line in lines if line]
    margin = len(os.path.commonprefix(indents))  # noqa: RUF071 (by character is what is wanted)
    return "\n".join(line[margin:] for line in lines)


def clean_drama(text: str) -> str:
    """A play in Markdown: title, ACT, SCENE, a speaker's name in capitals on its own line, [stage directions]."""
    text = _unescape(clean_text(text))
    text = re.sub(r"& c(?![^\W_])", "&c", text)
    text = re.sub(r"\\([\[\].-])", r"\1", text)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\* *$", lambda speaker: speaker[1].upper(), text, flags=re.M)
    text = re.sub(r"(?<!\w)([^\W_]*)_(\w+) _\[", r"\1_[\2 ", text)  # _Burthen _[dispersedly, within_
    text = re.sub(r"([_*])\1*\[?((?:(?!\n\n)[^_*\[\]])*)\]?\1+", r"[\2]", text)  # _Exit_, *Exit*, _[Aside]_
    text = re.sub(r"[_*]|\[\s*\]", "", text)  # the source's stray marks, and its words that are lost: [ ]
    return clean_text(text)


def _unescape(text: str) -> str:
    """As html.unescape, which refuses numbers of over 4,300 digits."""
    return html.unescape(re.sub(r"&#\d{20,};?", "\ufffd", text))


CLEANERS = {"text": clean_text, "prose": clean_prose, "drama": clean_drama, "none": lambda text: text}


def remove(text: str, patterns: tuple[str, ...], place: str) -> str:
    """`text` without what `patterns` match; raises DataError for one that backtracks for ever."""
    limit_s = 2 + 2 * len(text) / 1e6  # a hundred times what is usual

    def refuse(*signal_and_frame: Any) -> None:
        raise DataError(f"{place}: remove: {pattern!r} takes over {limit_s:.0f} s; write it without nested repeats")

    on_time = patterns and threading.current_thread() is threading.main_thread()  # where signals arrive
    before = signal.signal(signal.SIGALRM, refuse) if on_time else None
    try:
        for pattern in patterns:
            if on_time:
                signal.setitimer(signal.ITIMER_REAL, limit_s)
            text = re.sub(pattern, "", text)
    finally:
        if on_time:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    return text


def count_letters(text: str) -> int:
    """How many letters there are, of any script."""
    return sum(int(np.count_nonzero(is_letter()[codes])) for codes in code_points(text))


@functools.cache
def is_letter() -> np.ndarray:
    """Of each code point whether it is a letter: (0x110000,) bool."""
    return np.array([chr(code).isalpha() for code in range(0x110000)])


def code_points(text: str) -> Iterator[np.ndarray]:
    """The number of each character, COUNTED_CHARS of them at a time: (n,) uint32."""
    for start in range(0, len(text), COUNTED_CHARS):
        part = text[start : start + COUNTED_CHARS]
        yield np.frombuffer(part.encode("utf-32-le"), dtype="<u4")


def loss(raw: str, text: str, before: int, kept: int) -> str:
    """What cleaning has taken of `raw`, with `before` letters, when it left `text`, with `kept`.

    "" where that is little, or Project Gutenberg's frame.
    """
    if kept >= KEPT * before:
        return ""
    raw = _plain(raw)
    books = _books(raw)
    edges = [0, *(edge for book in books for edge in book), len(raw)]
    gaps = [raw[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    too_long = [gap for gap in gaps if not _is_frame(gap)]
    inside = _unescape("\n\n".join(raw[start:stop] for start, stop in books))
    whole = count_letters(inside) + sum(map(count_letters, too_long))
    if kept >= KEPT * whole:
        return ""
    went = max(too_long, key=len) if too_long else _first_lost(inside, text)
    return (
        f"cleaning kept {kept / whole:.0%} of its letters; the {whole - kept:,} that went begin "
        f"{' '.join(went[:300].split())[:60]!r} (clean: none in a corpus.yaml keeps all)"
    )


def _is_frame(gap: str) -> bool:
    """Whether what stands outside a book is Project Gutenberg's, which names itself beside the line that parts them."""
    letters = count_letters(gap)
    return letters <= 500 or (letters <= FRAME_LETTERS and gap.encode().lower().count(b"gutenberg") > 1)


def _first_lost(raw: str, text: str) -> str:
    """`raw` from the first letter on that `text` doesn't go on with."""
    kept = (char.casefold() for char in text if char.isalpha())
    lost = (i for i, char in enumerate(raw) if char.isalpha() and char.casefold() != next(kept, ""))
    return raw[next(lost, 0) :]
