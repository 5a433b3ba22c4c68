"""Drop capitals: a first letter that is a picture, or stands in a box of its own, is joined to its word."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from robopoet.text.notes import Mark

NAME = re.compile(
    r"(?:big|drop|first|illuminated|initial|large|raised)[-_]?(?:cap(?:ital)?s?|letters?)|init(?:ial)?s?|versal|drop|dc"
    r"|lettrine.*|.*drop[-_]?cap.*"
)  # a class
LETTER = r"[“”„\"'‘’«»¿¡—]?\s?[^\W\d_]"
CAPITAL = re.compile(LETTER)
PICTURED = re.compile(
    rf"(?:.{{0,30}}\b(?:drop\W?cap(?:ital)?|initial|letter|capital|lettrine)\W{{0,3}})?(?P<letter>{LETTER})", re.I
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
WORDS = frozenset("aàáeéèioóòuyzskvаивкосуя")  # letters that are a word of some language


def may_be(attributes: Mapping[str, str], classes: Iterable[str], style: Mapping[str, str]) -> bool:
    """Whether an element may be a drop capital, by its classes or how it looks."""
    return style.get("float") == "apart" or style.get("font-size") == "large" or any(map(NAME.fullmatch, classes))


def of_picture(attributes: Mapping[str, str]) -> str:
    """The letter that a picture shows; "" if it shows another thing."""
    found = PICTURED.fullmatch((attributes.get("alt") or attributes.get("aria-label", "")).strip()[:60])
    return found["letter"] if found else ""


class _Capital(NamedTuple):
    mark: Mark
    is_apart: bool  # from its word, as a box of its own
    is_picture: bool


class Capitals:
    """The drop capitals of a page that is laid out: the last is due until its word follows."""

    def __init__(self) -> None:
        self.due: _Capital | None = None
        self.joined: list[tuple[int, bool]] = []  # where among the pieces is the separator, and if it stands apart

    @property
    def is_due(self) -> bool:
        return self.due is not None

    def end(self, text: str, mark: Mark, is_apart: bool, is_picture: bool = False) -> None:
        """What is laid out since `mark` ends and may be a drop capital."""
        if CAPITAL.fullmatch(text):
            self.due = _Capital(mark, is_apart, is_picture)

    def follow(self, text: str, separator: str, pieces: list[str]) -> tuple[str, int]:
        """The separator before the text that follows, and how many of the pieces stay: a picture may be no letter."""
        assert self.due
        capital, self.due = self.due, None
        letter, first = pieces[-1][-1:], text[0]
        is_letter = first.isalpha() or first in "'’"
        goes_on = is_letter and (not first.isupper() or text[1:2].isupper())  # "hen", "HEN WE"
        if capital.is_picture and (letter == first == first.upper() or not (goes_on or (is_letter and not separator))):
            mark = capital.mark
            newlines = "\n" * max(separator.count("\n"), mark.lines)
            return newlines or " " * (mark.is_spaced or separator == " "), mark.n
        if separator and goes_on and capital.mark.starts_line:
            is_apart = capital.is_apart or separator.startswith("\n")
            self.joined.append((len(pieces), is_apart))
            separator = ""
        return separator, len(pieces)

    def settled(self, pieces: list[str]) -> list[str]:
        """`pieces`, with a space after a capital that is a word by the other words of the page."""
        if self.due and self.due.is_picture:
            del pieces[self.due.mark.n :]
        if self.joined:
            words = Counter(_WORD.findall("".join(pieces).casefold()))
            found = []
            for place, is_apart in self.joined:
                letter, after = pieces[place - 1][-1:].casefold(), "".join(pieces[place + 1 : place + 8]).casefold()
                word = _WORD.match(after)
                found.append((place, is_apart, letter, word[0] if word else ""))
            words.subtract(letter + word for _, _, letter, word in found)
            for place, is_apart, letter, word in found:
                if letter in WORDS and not words[letter + word] and (words[word] or not is_apart):
                    pieces[place] = " "
        return pieces
