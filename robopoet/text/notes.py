"""The marks of notes in a page: known by where they lead, or what they follow, never by their digits alone."""

import posixpath
import re
import urllib.parse
from collections.abc import Set
from typing import NamedTuple

# what marks a note or leads back to one, and what holds notes, by class, epub:type or role
REFERENCES = frozenset(
    "backlink doc-backlink doc-noteref fnanchor footnote-back footnote-ref footnote-reference noteref".split()
)
NOTES = frozenset(
    "doc-endnote doc-endnotes doc-footnote endnote endnotes fn footnote footnotes note notes rearnote rearnotes".split()
)
NOTE_ID = re.compile(
    r"(?:^|[^a-z])(?:(?:foot|end|rear)?notes?(?:ref|back)?|(?:fn|ftn|edn|en)(?:ref|anchor|r|b)?|n|r|ref)(?![a-z])", re.I
)  # the id of a note or of its mark
NOTES_PAGE = re.compile(r"(?:^|[^a-z])(?:foot|end|rear)?notes?(?![a-z])", re.I)
MARKED = re.compile(r"(?:[.,;:!?…'\"’”»]|[^\W\d_]{4})\Z")  # what a raised number follows that is no power


class Mark(NamedTuple):
    """The state of a layout at the start of an element that may be left out.

    before: the last characters of what it follows without a space. kind: what the element is.
    """

    depth: int
    n: int
    chars: int
    lines: int
    is_spaced: bool
    letters: int
    linked: int
    links: int
    n_links: int
    before: str
    href: str
    is_in_note: bool
    kind: str

    @property
    def starts_line(self) -> bool:
        return self.lines > 0 or not self.n


def target(href: str) -> str:
    """The id to which a link leads."""
    return urllib.parse.unquote(href).partition("#")[2]


def marks_word(mark: Mark) -> bool:
    """Whether raised text that is no link follows a word or a sentence, as the mark of a note does."""
    return MARKED.search(mark.before) is not None


def leads_to_note(mark: Mark, number: str | None, is_opened: bool, is_raised: bool, known: Set[str]) -> bool:
    """Whether a link leads to a note, or from one to its mark.

    number: its text; None: a sign, such as *. is_opened: whether it is in brackets. known: the ids of notes.
    """
    if not mark.href or re.match(r"[a-z][a-z0-9+.-]*:|//", mark.href, re.I):
        return False
    to = target(mark.href)
    if number is None or to in known or (mark.is_in_note and mark.starts_line):
        return True
    if NOTE_ID.search(to) and number.lstrip("0") in re.findall(r"[1-9]\d*", to):
        return True
    if len(number) > 3:  # a year
        return False
    page = posixpath.basename(urllib.parse.unquote(mark.href).partition("#")[0])
    if to and len(mark.before) == 4 and mark.before.isalpha():  # a number is not written on to a word
        return True
    is_marked = is_opened or mark.before.endswith("[") or (is_raised and mark.before != "")
    return is_marked or (to != "" and NOTES_PAGE.search(page) is not None)


def leads_to_notes(href: str) -> bool:
    """Whether a link leads to what is named as a note is, or to a page of notes."""
    page = posixpath.basename(urllib.parse.unquote(href).partition("#")[0])
    return NOTE_ID.search(target(href)) is not None or NOTES_PAGE.search(page) is not None
