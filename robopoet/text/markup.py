"""A page of HTML as text, laid out as a browser does: a blank line between paragraphs, a new line for a line of verse.

What is not the work is left out: navigation, tables of contents, page numbers, marks of notes.
"""

import html
import re
from collections.abc import Set

from robopoet.errors import DataError
from robopoet.text import notes
from robopoet.text.cleaning import count_letters

# An end tag is compared with every open element, so their products are bounded: a third of a second, and 0.7 us a byte
FED, COMPARISONS, COMPARISONS_A_BYTE = 2**12, 10**8, 200

# newlines before and after an element, as in the HTML standard's style sheet for browsers
LINES = dict.fromkeys(
    "address center dd details dialog dir div dt fieldset figcaption form legend li summary table tr".split(), 1
) | dict.fromkeys(
    "article aside blockquote dl figure footer h1 h2 h3 h4 h5 h6 header hr main ol p pre section ul".split(), 2
)
# DAISY's DTBook, which EPUB 2 allows
LINES |= dict.fromkeys("byline dateline docauthor line".split(), 1) | dict.fromkeys(
    "doctitle level level1 level2 level3 level4 level5 level6 linegroup note poem".split(), 2
)
# what is not part of the work: elements, and values of class, epub:type and role
OUTSIDE = frozenset(
    "audio canvas head iframe math nav noembed noframes noscript noteref pagenum rp rt script select style svg "
    "template title video".split()
)
OUTSIDE_NAMES = notes.REFERENCES | frozenset(
    "copyright-page cover doc-cover doc-pagebreak pagebreak pagenum pageno pg-boilerplate".split()
)
# what nobody misses: code, and what stands in for a medium
UNCOUNTED = frozenset("audio canvas head iframe noembed script style template title video".split())
CONTENTS_NAMES = frozenset("doc-toc landmarks lot loi page-list toc".split())  # outside if most letters are in links
HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())  # a class says how they look, not what they are
WHOLE = frozenset("html body main article".split())  # hold the work, whatever their class
NOTE_CHARS = 20  # length of the longest mark of a note, spaces included
NOTE_MARK = re.compile(r"(?P<opened>[\[({]?)(?:(?P<number>\d{1,4})|[*†‡§‖¶↩↑^]{1,3}\ufe0e?)[\])}]?")


def html_text(content: str, name: str = "") -> str:
    """The text of an HTML or XHTML document; raises DataError with its `name` if parsing it may take minutes."""
    return lay_out(content, name).text


def lay_out(content: str, name: str, note_ids: Set[str] = frozenset()) -> "LaidOut":
    """Lay out a document; note_ids: ids in other documents that are those of notes."""
    layout = _parse(content, name, note_ids)
    known = layout.note_ids - note_ids
    return layout if known.isdisjoint(layout.undecided) else _parse(content, name, note_ids | known)


def _parse(content: str, name: str, note_ids: Set[str]) -> "LaidOut":
    from lxml import etree  # a tenth of a second, for those who need it

    layout, encoded = LaidOut(note_ids), _without_cdata(content).encode("utf-8", "replace")
    parser = etree.HTMLParser(target=layout, encoding="utf-8")
    if not encoded.strip():
        return layout
    left = COMPARISONS + COMPARISONS_A_BYTE * len(encoded)
    for start in range(0, len(encoded), FED):
        fed = encoded[start : start + FED]
        ends = fed.count(b"</")
        left -= (layout.depth + fed.count(b"<") - ends) * ends
        if left < 0:
            raise DataError(f"{name}: nests its elements too deep, {layout.depth:,} are open at once; refused")
        parser.feed(fed)
    return parser.close()


def _without_cdata(content: str) -> str:
    """`content` with the text of XML's CDATA sections, which HTML's parser takes for comments, as HTML has it."""
    before, *sections = content.split("<![CDATA[")
    pieces = [before]
    for section in sections:
        text, end, after = section.partition("]]>")
        pieces += [html.escape(text, quote=False) if end else text, after]
    return "".join(pieces)


class LaidOut:
    """Lays out the elements and the text that lxml's parser finds (its target interface).

    Once it is closed: text, all of it. letters: in it. linked: of these, those in links. links: letters in links that
    were left out. lost: all others that were left out. note_ids: those of notes. undecided: where numbers lead that
    would be the marks of notes if these were ids of notes.
    """

    def __init__(self, known: Set[str] = frozenset()) -> None:
        self.known, self.note_ids, self.undecided = known, set[str](), set[str]()
        self.note_depth = self.raised = 0  # where the open note starts, and how many <sup> are open
        self.has_raised = False  # whether the open link has raised text
        self.was_mark = self.started_line = False  # whether a mark was just left out, and began its line
        self.text, self.letters, self.linked, self.links, self.lost = "", 0, 0, 0, 0
        self.prefix = ""  # before the names of all elements
        self.anchors = self.uncounted = 0  # how many links are open, and how many elements that nobody misses
        self.pieces: list[str] = []
        self.lines = 0  # newlines that are due before the next text
        self.is_spaced = False  # whether a space is
        self.depth = self.outside = self.preformatted = 0  # how many elements are open, and how many of them are
        self.chars = 0  # in the pieces
        self.marks: list[notes.Mark] = []  # the open elements that may be left out
        self.contents = 0  # how many of them are tables of contents

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if tag.endswith((":html", ":dtbook")):
            self.prefix = tag[: tag.index(":") + 1]
        tag = tag.removeprefix(self.prefix)
        self.depth += 1
        self.anchors += tag == "a"
        names = f"{attributes.get('epub:type', '')} {attributes.get('role', '')}".lower().split()
        classes = attributes.get("class", "").lower().split() if tag not in HEADINGS else []
        outside = OUTSIDE_NAMES.intersection(names if tag in WHOLE else names + classes)
        self.uncounted += self.uncounted > 0 or tag in UNCOUNTED or "pg-boilerplate" in outside
        if not self.note_depth and not notes.NOTES.isdisjoint(names + classes):
            self.note_depth = self.depth
        if self.note_depth:
            self.note_ids |= {attributes.get("id", ""), attributes.get("name", "")} - {""}
        if not self.outside and (tag == "noteref" or not notes.REFERENCES.isdisjoint(outside)):
            self.was_mark, self.started_line = True, self.lines > 0 or not self.pieces
        if self.outside or outside or tag in OUTSIDE or "hidden" in attributes:
            self.outside += 1
            return
        if not CONTENTS_NAMES.isdisjoint(names + classes):
            self._mark(attributes, is_contents=True)
        if tag == "br":
            self.lines = min(self.lines + 1, 2)
        self.lines = max(self.lines, LINES.get(tag, 0))
        self.is_spaced |= tag in ("td", "th")
        self.preformatted += tag == "pre"
        self.raised += tag == "sup"
        self.has_raised = tag == "sup" or (tag != "a" and self.has_raised)
        if tag in ("a", "sup"):
            self._mark(attributes, is_raised=tag == "sup")

    def _mark(self, attributes: dict[str, str], is_raised: bool = False, is_contents: bool = False) -> None:
        """Remember the state at the start of an element that may be left out."""
        before = self.pieces[-1] if self.pieces and not self.lines else ""
        before = "" if self.is_spaced and not before.endswith("[") else before
        state = len(self.pieces), self.chars, self.lines, self.is_spaced, self.letters, self.linked, self.links
        href = attributes.get("href", "").strip()
        mark = notes.Mark(self.depth, *state, before[-4:], href, self.note_depth > 0, is_raised, is_contents)
        self.marks.append(mark)
        self.contents += is_contents

    def _return(self, mark: notes.Mark) -> None:
        """Leave out what was laid out since `mark`."""
        del self.pieces[mark.n :]
        self.chars, self.lines, self.is_spaced = mark.chars, mark.lines, mark.is_spaced
        self.letters, self.linked = mark.letters, mark.linked

    def end(self, tag: str) -> None:
        tag = tag.removeprefix(self.prefix)
        self.depth -= 1
        self.anchors -= tag == "a"
        self.uncounted -= self.uncounted > 0
        if self.depth < self.note_depth:
            self.note_depth = 0
        if self.outside:
            self.outside -= 1
            return
        self.lines = max(self.lines, LINES.get(tag, 0))
        self.preformatted -= tag == "pre"
        self.raised -= tag == "sup"
        while self.marks and self.marks[-1].depth > self.depth:
            mark = self.marks.pop()
            if mark.is_contents:
                self._end_contents(mark)
            else:
                self._end_mark(mark)

    def _end_mark(self, mark: notes.Mark) -> None:
        """Leave out what was laid out since `mark` if it is the mark of a note."""
        if self.chars - mark.chars > NOTE_CHARS:  # joining longer links would take long where they are nested
            return
        found = NOTE_MARK.fullmatch("".join(self.pieces[mark.n :]).strip())
        if not found:
            return
        if mark.is_raised:
            is_mark = notes.marks_word(mark)
        else:
            is_raised = self.raised > 0 or self.has_raised
            is_mark = notes.leads_to_note(mark, found["number"], bool(found["opened"]), is_raised, self.known)
            self.undecided |= set() if is_mark else {notes.target(mark.href)}
        if is_mark:
            self._return(mark)
            self.was_mark, self.started_line = True, mark.starts_line

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

    def _end_contents(self, start: notes.Mark) -> None:
        """Leave out what was laid out since `start` if most of it is links."""
        self.contents -= 1
        letters, linked, links = self.letters - start.letters, self.linked - start.linked, self.links - start.links
        if linked + links > letters - linked:
            self._return(start)
            self.links += linked
            self.lost += letters - linked

    def data(self, text: str) -> None:
        if not text:
            return
        if not self.uncounted and (self.outside or self.anchors or self.contents):
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
        text = text.replace("\xad", "")  # a soft hyphen
        ends_spaced = False
        if not self.preformatted:
            words = " ".join(re.split(r"[ \t\r\n\f]+", text))
            self.is_spaced |= words.startswith(" ")
            ends_spaced = words.endswith(" ")
            text = words.strip(" ")
        if text and self.was_mark:
            text = self._close_up(text)
            self.is_spaced |= ends_spaced and not text
        if text:
            if self.pieces:
                self.pieces.append("\n" * self.lines or " " * self.is_spaced)
            self.pieces.append(text.replace("\xa0", " "))
            self.chars += len(text)
            self.lines, self.is_spaced = 0, ends_spaced

    def close(self) -> "LaidOut":
        self.text = "".join(self.pieces)
        self.letters = count_letters(self.text)
        return self
