"""How the text of a page is laid out, as in a browser: a blank line between paragraphs, a new line for a line of verse.

What is not the work is left out: page matter, and the marks of notes.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Set
from types import MappingProxyType
from typing import NamedTuple

from robopoet.text import initials, matter, notes
from robopoet.text.cleaning import count_letters
from robopoet.text.styles import Sheet, Styles, is_for_screen

# newlines before and after an element, as in the HTML standard's style sheet for browsers
LINES: dict[str, int] = dict.fromkeys(
    "address center dd details dialog dir div dt fieldset figcaption form legend li summary table tr".split(), 1
)
LINES |= dict.fromkeys(
    "article aside blockquote dl figure footer h1 h2 h3 h4 h5 h6 header hr listing main ol p plaintext pre section ul "
    "xmp".split(),
    2,
)
# DAISY's DTBook, which EPUB 2 allows
LINES |= dict.fromkeys("byline dateline docauthor line".split(), 1) | dict.fromkeys(
    "doctitle level level1 level2 level3 level4 level5 level6 linegroup note poem".split(), 2
)
WHITE_SPACE: dict[str, str] = dict.fromkeys("listing plaintext pre textarea xmp".split(), "pre")
CELLS = frozenset("dd dt li td th".split())  # with a space in between where they stand in a line
# what is not part of the work: elements, and values of class, epub:type and role
OUTSIDE = frozenset(
    "annotation annotation-xml audio canvas head iframe nav noembed noframes noscript noteref pagenum rp rt script "
    "select style svg template title video".split()
)
OUTSIDE_NAMES = notes.REFERENCES | frozenset(
    "copyright-page cover doc-cover mw-editsection no-print noprint pg-boilerplate ws-noexport".split()
)
# what nobody misses: code, and what stands in for a medium
UNCOUNTED = frozenset(
    "annotation annotation-xml audio canvas head iframe noembed script style template title video".split()
)
LISTS = {  # outside if most of their letters are in links; or as bars, which are DocBook's, if they are short
    "contents": frozenset("doc-toc landmarks lot loi page-list toc".split()),
    "bar": frozenset("docnav navfooter navheader".split()),
    "links": frozenset("nav navbar navigation pagination breadcrumb breadcrumbs pager prevnext".split()),
}
PICTURES = frozenset("image img svg".split())
HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())  # a class says how they look, not what they are
WHOLE = frozenset("html body main article".split())  # hold the work, whatever their class
NOTE_CHARS = 20  # length of the longest mark of a note or page number, spaces included
NOTE_MARK = re.compile(
    r"(?P<opened>[\[({]?)(?:(?P<number>\d{1,4})|(?P<letters>[a-z]|[ivx]{2,5})|[*†‡§‖¶↩↑^#]{1,3}\ufe0e?)[\])}]?"
)

FindSheets = Callable[[str], list[Sheet]]  # a style sheet, and what it imports, by the address in a link


class _Box(NamedTuple):
    """How an open element stands: newlines before and after it, a space, how its white space counts; what it is in."""

    lines: int
    is_spaced: bool
    white_space: str
    is_flex: bool  # so what it holds stands apart
    link: matter.Link | None


class LaidOut:
    """Lays out the elements and the text that lxml's parser finds (its target interface).

    Once it is closed: text, all of it. letters: in it. linked: of these, those in links. links: letters in links that
    were left out. lost: all others that were left out. counts: how much page matter was. note_ids: those of notes.
    undecided: where numbers lead that would be the marks of notes if these were ids of notes. has_late_sheet: whether a
    style sheet came after the first text.

    known: ids that are those of notes. sheets: all style sheets, if they are known before.
    """

    def __init__(
        self, known: Set[str] = frozenset(), find: FindSheets = lambda _: [], sheets: list[Sheet] | None = None
    ) -> None:
        self.known, self.note_ids, self.undecided = known, set[str](), set[str]()
        self.styles, self.find = Styles(), find
        self.is_styled, self.has_late_sheet = sheets is not None, False  # whether all sheets are known
        self.styles.sheets = sheets or []
        self.css: list[str] | None = None  # the open <style>, if it counts
        self.note_depth = self.raised = self.headings = 0  # where the open note starts; how many <sup>, <h1> are open
        self.has_raised = False  # whether the open link has raised text
        self.was_mark = self.started_line = False  # whether a mark was just left out, and began its line
        self.text, self.letters, self.linked, self.links, self.lost = "", 0, 0, 0, 0
        self.counts: Counter[str] = Counter()
        self.prefixes: dict[str, bool] = {}  # before the names of elements: whether these are HTML's
        self.are_links: list[bool] = []  # the open <a>
        self.n_links = 0  # that began
        self.anchors = self.uncounted = 0  # how many links are open, and how many elements that nobody misses
        self.pieces: list[str] = []
        self.of_links: list[matter.Link | None] = []  # for each piece
        self.places: dict[str, int] = {}  # before which piece each id stands
        self.lines = 0  # newlines that are due before the next text
        self.is_spaced = False  # whether a space is
        self.depth = self.outside = 0  # how many elements are open, and how many of them are
        self.open = [_Box(0, False, "normal", False, None)]  # the others
        self.chars = 0  # in the pieces
        self.place: tuple[str, str] | None = None  # top and left of the last element that is positioned
        self.marks: list[notes.Mark] = []  # the open elements that may be left out
        self.counted = 0  # how many of them are left out by their letters
        self.page_numbers: list[matter.PageNumber] = []  # what the texts of others must be
        self.capitals = initials.Capitals()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        tag = self._local(tag, attributes)
        style = self.styles.start(tag, attributes)
        self.depth += 1
        if tag == "a":
            self.are_links.append("href" in attributes)
            self.anchors += self.are_links[-1]
            self.n_links += self.are_links[-1]
        types = " ".join(value for key, value in attributes.items() if key.endswith(":type") or key == "role")
        names = types.lower().split()
        tag = "nav" if "navigation" in names and tag not in WHOLE else tag
        classes = attributes.get("class", "").lower().split() if tag not in HEADINGS else []
        outside = OUTSIDE_NAMES.intersection(names if tag in WHOLE else names + classes)
        self.uncounted += self.uncounted > 0 or tag in UNCOUNTED or "pg-boilerplate" in outside
        if not self.note_depth and not notes.NOTES.isdisjoint(names + classes):
            self.note_depth = self.depth
        ids = {attributes.get("id", ""), attributes.get("name", "")} - {""}
        self.note_ids |= ids if self.note_depth else set()
        for id in ids:
            self.places.setdefault(id, len(self.pieces))
        if not self.outside and (tag == "noteref" or not notes.REFERENCES.isdisjoint(outside)):
            self.was_mark, self.started_line = True, self.lines > 0 or not self.pieces
        display = style.get("display", "none" if "hidden" in attributes else "")
        is_hidden = tag not in WHOLE and (display == "none" or style.get("visibility") == "hidden")
        self._start_sheet(tag, attributes)
        if tag in PICTURES and not (self.outside or is_hidden) and (letter := initials.of_picture(attributes)):
            self._add_picture(letter)
        if self.outside or outside or tag in OUTSIDE or is_hidden:
            if not self.outside and tag in ("nav", "pagenum"):
                self.counts[matter.BARS if tag == "nav" else matter.PAGE_NUMBERS] += 1
            self.outside += 1
            return
        kind = next((kind for kind in LISTS if not LISTS[kind].isdisjoint(names + classes)), "")
        if kind and (kind == "contents" or tag not in WHOLE):
            self._mark(kind)
        if tag not in HEADINGS and tag not in WHOLE and (number := matter.page_number(attributes, names + classes)):
            self._mark("page")
            self.page_numbers.append(number)
        if initials.may_be(attributes, classes, style):
            self._mark("capital")
        self._open_box(tag, attributes, style)
        self.headings += tag in HEADINGS
        self.raised += tag == "sup"
        self.has_raised = tag == "sup" or (tag != "a" and self.has_raised)
        if tag in ("a", "sup"):
            self._mark("raised" if tag == "sup" else "link", attributes.get("href", "").strip())

    def _local(self, tag: str, attributes: Mapping[str, str] = MappingProxyType({})) -> str:
        """The name of an element without a prefix that means HTML, or one of its relatives."""
        for key, value in attributes.items():
            if key.startswith("xmlns:"):
                self.prefixes[key[6:]] = any(name in value.lower() for name in ("xhtml", "dtbook", "html40"))
        if ":" not in tag:
            return tag
        prefix, _, local = tag.partition(":")
        if local in ("html", "dtbook", "body"):
            self.prefixes[prefix] = True
        return local if self.prefixes.get(prefix) or local in ("svg", "math") else tag

    def _start_sheet(self, tag: str, attributes: dict[str, str]) -> None:
        """Take a style sheet that is linked here, or that begins."""
        if self.is_styled or tag not in ("link", "style") or not is_for_screen(attributes.get("media", "")):
            return
        if tag == "style":
            self.css = []
        elif attributes.get("rel", "").lower().split() == ["stylesheet"]:
            self.add_sheets(self.find(attributes.get("href", "")))

    def add_sheets(self, sheets: list[Sheet]) -> None:
        """Let these style sheets count, too."""
        sheets = [sheet for sheet in sheets if sheet.first]
        self.styles.sheets += sheets
        self.has_late_sheet |= bool(sheets and self.pieces)

    def _open_box(self, tag: str, attributes: dict[str, str], style: dict[str, str]) -> None:
        lines, display, around = LINES.get(tag, 0), style.get("display", ""), self.open[-1]
        is_spaced = around.is_flex or "apart" in (style.get("position"), style.get("float"))
        if display in ("block", "flex"):
            lines = lines or 1
        elif display:
            lines = 0
        is_spaced |= display == "cell" or (tag in CELLS and not lines)
        if style.get("position") == "apart":
            top, left = place = style.get("top", ""), style.get("left", "")
            if lines == 1 and self.place and top == self.place[0] and left != self.place[1]:
                lines, is_spaced = 0, True  # it stands beside the one before
                self.lines -= self.lines == 1
            self.place = place
        self.lines = min(self.lines + 1, 2) if tag == "br" else max(self.lines, lines)
        self.is_spaced |= is_spaced
        white_space = style.get("white-space") or WHITE_SPACE.get(tag) or around.white_space
        link = (matter.link_of(attributes, self.headings > 0) if tag == "a" else None) or around.link
        self.open.append(_Box(lines, is_spaced, white_space, display in ("flex", "inline-flex"), link))

    def _mark(self, kind: str, href: str = "") -> None:
        """Remember the state at the start of an element that may be left out."""
        before = self.pieces[-1] if self.pieces and not self.lines else ""
        before = "" if self.is_spaced and not before.endswith("[") else before
        state = len(self.pieces), self.chars, self.lines, self.is_spaced, self.letters, self.linked, self.links
        in_note = self.note_depth > 0
        self.marks.append(notes.Mark(self.depth, *state, self.n_links, before[-4:], href, in_note, kind))
        self.counted += kind in LISTS

    def _return(self, mark: notes.Mark) -> None:
        """Leave out what was laid out since `mark`."""
        del self.pieces[mark.n :], self.of_links[mark.n :]
        self.chars, self.lines, self.is_spaced = mark.chars, mark.lines, mark.is_spaced
        self.letters, self.linked = mark.letters, mark.linked

    def end(self, tag: str) -> None:
        tag = self._local(tag)
        self.styles.end()
        self.depth -= 1
        self.anchors -= tag == "a" and self.are_links.pop()
        self.uncounted -= self.uncounted > 0
        if self.depth < self.note_depth:
            self.note_depth = 0
        if tag == "style" and self.css is not None:
            sheet, self.css = Sheet("".join(self.css)), None
            self.add_sheets([*(one for href in sheet.imports for one in self.find(href)), sheet])
        if self.outside:
            self.outside -= 1
            return
        box = self.open.pop()
        self.lines = max(self.lines, box.lines)
        self.is_spaced |= box.is_spaced
        self.headings -= tag in HEADINGS
        self.raised -= tag == "sup"
        while self.marks and self.marks[-1].depth > self.depth:
            mark = self.marks.pop()
            if self._end_mark(mark, box):
                self.lines = max(self.lines, box.lines > 0)

    def _end_mark(self, mark: notes.Mark, box: _Box) -> bool:
        """Leave out what was laid out since `mark` if it is what its element may be; whether it was."""
        if mark.kind in LISTS:
            return self._end_links(mark)
        number = self.page_numbers.pop() if mark.kind == "page" else None
        if self.chars - mark.chars > NOTE_CHARS:  # joining longer links would take long where they are nested
            return False
        text = "".join(self.pieces[mark.n :]).strip()
        if mark.kind == "capital":
            self.capitals.end(text, mark, box.lines > 0 or box.is_spaced)
            return False
        if number:
            is_mark = number.fits(text)
            self.counts[matter.PAGE_NUMBERS] += is_mark
        elif not (found := NOTE_MARK.fullmatch(text)):
            return False
        elif mark.kind == "raised":
            is_mark = not found["letters"] and notes.marks_word(mark)
        else:
            is_raised = self.raised > 0 or self.has_raised
            if found["letters"] and not (is_raised and notes.leads_to_notes(mark.href)):
                return False
            is_mark = notes.leads_to_note(mark, found["number"], bool(found["opened"]), is_raised, self.known)
            self.undecided |= set() if is_mark else {notes.target(mark.href)}
        if is_mark:
            self._return(mark)
            self.was_mark, self.started_line = not number, mark.starts_line
        return is_mark

    def _close_up(self, text: str) -> str:
        """`text` that follows a mark which was left out, without what enclosed that: brackets, or a dot after it."""
        self.was_mark = False
        if self.started_line and text[0] in ".:)]}":
            return text[1:].lstrip(" ")
        if self.pieces and not self.lines and self.pieces[-1].endswith("[") and text in (",", ";"):  # [2, 3]
            self.was_mark = True
            return ""
        if self.pieces and not self.lines and self.pieces[-1][-1:] + text[0] in ("[]", "()", "{}"):
            before = self.pieces[-1][:-1].rstrip(" ")
            self.chars -= len(self.pieces[-1]) - len(before)
            self.is_spaced = text[1:2] == " "
            self.pieces[-1], text = before, text[1:].lstrip(" ")
            if not before:
                separator = "".join(self.pieces[-2:-1])
                del self.pieces[-2:]
                self.lines = separator.count("\n")
        return text

    def _end_links(self, start: notes.Mark) -> bool:
        """Leave out what was laid out since `start` if most of it is links, or if it is a bar; whether it was."""
        self.counted -= 1
        letters, linked, links = self.letters - start.letters, self.linked - start.linked, self.links - start.links
        is_short = self.chars - start.chars <= matter.BAR_CHARS
        is_bar = start.kind == "bar" and is_short and self.n_links > start.n_links
        if not is_bar and linked + links <= letters - linked:
            return False
        self._return(start)
        self.counts[matter.CONTENTS if start.kind == "contents" else matter.BARS] += 1
        self.links += linked
        self.lost += 0 if is_bar else letters - linked
        return True

    def _add_picture(self, letter: str) -> None:
        """Add a letter of which there is a picture."""
        self._mark("capital")
        mark = self.marks.pop()
        is_in_word = mark.before[-1:].isalpha()
        self._add(letter, is_pre=True)
        if not is_in_word:
            self.capitals.end(letter, mark, is_apart=False, is_picture=True)

    def data(self, text: str) -> None:
        if not text:
            return
        if self.css is not None:
            self.css.append(text)
        if not self.uncounted and (self.outside or self.anchors or self.counted):
            letters = count_letters(text)
            if not self.outside:
                self.letters += letters
                self.linked += letters * (self.anchors > 0)
            elif self.anchors:
                self.links += letters
            else:
                self.lost += letters
        if self.outside:
            return
        white_space = self.open[-1].white_space
        for i, line in enumerate(re.split(r"\r\n?|\n", text) if white_space == "pre-line" else [text]):
            self.lines = min(self.lines + 1, 2) if i else self.lines
            self._add(line, white_space == "pre")

    def _add(self, text: str, is_pre: bool) -> None:
        text = text.replace("\xad", "")  # a soft hyphen
        ends_spaced = False
        if not is_pre:
            words = " ".join(re.split(r"[ \t\r\n\f]+", text))
            self.is_spaced |= words.startswith(" ")
            ends_spaced = words.endswith(" ")
            text = words.strip(" ")
        elif self.lines or not self.pieces:
            text = text.removeprefix("\n")
        if text and self.was_mark:
            text = self._close_up(text)
            self.is_spaced |= ends_spaced and not text
        if text:
            separator = "\n" * self.lines or " " * self.is_spaced
            if self.capitals.is_due:
                separator, kept = self.capitals.follow(text, separator, self.pieces)
                del self.pieces[kept:], self.of_links[kept:]
            if self.pieces:
                self.pieces.append(separator)
                self.of_links.append(None)
            self.pieces.append(text.replace("\xa0", " "))
            self.of_links.append(self.open[-1].link)
            self.chars += len(text)
            self.lines, self.is_spaced = 0, ends_spaced

    def close(self) -> "LaidOut":
        pieces = self.capitals.settled(self.pieces)
        pieces, links, counts = matter.without_bars(pieces, self.of_links[: len(pieces)], self.places)
        self.counts += counts
        self.linked, self.links = self.linked - count_letters(links), self.links + count_letters(links)
        self.text = "".join(pieces)
        self.letters = count_letters(self.text)
        return self
