"""Books as people have them: plain text in any encoding, HTML and EPUB.

HTML is laid out as a browser does without a style sheet: a blank line between paragraphs, a new line for each line of
verse. What is not the work is left out: navigation, tables of contents, covers, page numbers, footnote marks.

Every file is untrusted: no entity is expanded, nothing is fetched.
"""

import codecs
import contextlib
import html
import re
from pathlib import PurePath
from typing import NamedTuple

import charset_normalizer
from charset_normalizer.utils import any_specified_encoding

from robopoet.errors import DataError
from robopoet.text import epub
from robopoet.text.cleaning import count_letters

HTML = (".html", ".htm", ".xhtml")
CONVERTED = {
    ".pdf": "pdftotext -layout FILE.pdf FILE.txt",
    **dict.fromkeys((".mobi", ".azw", ".azw3", ".fb2", ".docx", ".odt", ".rtf"), "Calibre's ebook-convert"),
    ".doc": "soffice --convert-to docx, then Calibre's ebook-convert",
}  # what makes a .txt or an .epub of these
ENOUGH = 8  # bytes beyond ASCII from which an encoding can be told
# An end tag is compared with every open element, so their products are bounded: a third of a second, and 0.7 us a byte
FED, COMPARISONS, COMPARISONS_A_BYTE = 2**12, 10**8, 200

# newlines before and after an element, as in the HTML standard's style sheet for browsers
LINES = dict.fromkeys("address center dd dir div dt figcaption legend li table tr".split(), 1) | dict.fromkeys(
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
OUTSIDE_NAMES = frozenset(
    "backlink copyright-page cover doc-backlink doc-cover doc-noteref doc-pagebreak noteref pagebreak pagenum pageno "
    "pg-boilerplate".split()
)
# what nobody misses: code, and what stands in for a medium
UNCOUNTED = frozenset("audio canvas head iframe noembed script style template title video".split())
CONTENTS_NAMES = frozenset("doc-toc landmarks lot loi page-list toc".split())  # outside if most letters are in links
HEADINGS = frozenset("h1 h2 h3 h4 h5 h6".split())  # a class says how they look, not what they are
WHOLE = frozenset("html body main article".split())  # hold the work, whatever their class
COVER_LETTERS = 200  # the most on a cover; a longer page holds more than that
NOTE_CHARS = 20  # length of the longest, spaces included
NOTE_MARK = re.compile(r"[\[(]?(?:\d{1,4}|[*†‡§‖¶]{1,3})[\])]?")


class Loss(NamedTuple):
    """How many letters of a file are not in the text of its book, and how many it holds; 0 of 0: it was not read."""

    lost: int
    held: int


def read(name: str, content: bytes, encoding: str = "", losses: dict[str, Loss] | None = None) -> tuple[str, str]:
    """The text of the file `name`, and its encoding if that had to be guessed, else "".

    encoding: what it is; "": UTF-8, UTF-16 with its mark, or what fits best. losses: gets each file, or file of an
    EPUB, of which the text lacks letters. Raises DataError with `name`.
    """
    losses = {} if losses is None else losses
    suffix = PurePath(name).suffix.lower()
    if suffix in CONVERTED:
        raise DataError(f"{name}: is no text; convert it first, with {CONVERTED[suffix]}")
    if suffix == ".epub":
        return _epub(name, content, losses), ""
    text, guessed = decode(name, content, encoding)
    if suffix not in HTML:
        return text, guessed
    layout = _lay_out(text, name)
    if layout.lost:
        losses[name] = Loss(layout.lost, layout.letters + layout.lost)
    return layout.text, guessed


def decode(name: str, content: bytes, encoding: str = "") -> tuple[str, str]:
    """`content` as text, and its encoding if that had to be guessed; raises DataError with the byte that fits none."""
    if not encoding and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        return content.decode(encoding or "utf-8"), ""
    except LookupError:
        raise DataError(f"encoding: found {encoding}, must be one that Python knows, such as cp1252") from None
    except UnicodeError as e:
        byte = getattr(e, "start", 0)
    if encoding:
        raise DataError(f"{name}: byte {byte} is not {encoding}; --encoding names another")
    decoded = content.decode("utf-8", "replace")
    is_damaged = _count_high(decoded.encode()) > 12 * decoded.count("\ufffd")  # it is UTF-8 for the most part
    found = None if is_damaged or b"\0" in content else _guess(content)
    if not found:
        raise DataError(f"{name}: byte {byte} is not UTF-8; save the file as UTF-8, or name its --encoding")
    return content.decode(found), found


def _guess(content: bytes) -> str:
    """The encoding that `content` declares, as HTML may, or that fits it best, as Python names it; "": none does."""
    high = _count_high(content)
    likely = {"ascii": "cp1252", "latin_1": "cp1252"}.get(declared := any_specified_encoding(content), declared)
    if not likely and high < 0.02 * len(content):  # a Latin script: too little for statistics, so the most usual
        likely = "cp1252"
    if likely:
        with contextlib.suppress(UnicodeError):
            content.decode(likely)
            return likely
    match = charset_normalizer.from_bytes(content).best() if high >= ENOUGH else None
    if match is None:
        return ""
    return "cp1252" if "cp1252" in match.could_be_from_charset else match.encoding


def _count_high(content: bytes) -> int:
    """The number of bytes that are not ASCII."""
    return len(content) - len(content.decode("ascii", "ignore"))


def html_text(content: str, name: str = "") -> str:
    """The text of an HTML or XHTML document; raises DataError with its `name` if parsing it may take minutes."""
    return _lay_out(content, name).text


def _lay_out(content: str, name: str) -> "_Layout":
    from lxml import etree  # a tenth of a second, for those who need it

    layout, encoded = _Layout(), _without_cdata(content).encode("utf-8", "replace")
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


class _Contents(NamedTuple):
    """The state at the start of an element that may be a table of contents."""

    depth: int
    n: int
    chars: int
    lines: int
    is_spaced: bool
    letters: int
    linked: int
    links: int


class _Layout:
    """Lays out the elements and the text that lxml's parser finds (its target interface).

    Once it is closed: text, all of it. letters: in it. linked: of these, those in links. links: letters in links that
    were left out. lost: all others that were left out.
    """

    def __init__(self) -> None:
        self.text, self.letters, self.linked, self.links, self.lost = "", 0, 0, 0, 0
        self.prefix = ""  # before the names of all elements
        self.anchors = self.uncounted = 0  # how many links are open, and how many elements that nobody misses
        self.contents: list[_Contents] = []
        self.pieces: list[str] = []
        self.lines = 0  # newlines that are due before the next text
        self.is_spaced = False  # whether a space is
        self.depth = self.outside = self.preformatted = 0  # how many elements are open, and how many of them are
        self.chars = 0  # in the pieces
        self.marks: list[tuple[int, int, int, bool]] = []  # the state at the start of each open link within the book

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
        if self.outside or outside or tag in OUTSIDE or "hidden" in attributes:
            self.outside += 1
            return
        if not CONTENTS_NAMES.isdisjoint(names + classes):
            state = len(self.pieces), self.chars, self.lines, self.is_spaced, self.letters, self.linked, self.links
            self.contents.append(_Contents(self.depth, *state))
        if tag == "br":
            self.lines = min(self.lines + 1, 2)
        self.lines = max(self.lines, LINES.get(tag, 0))
        self.is_spaced |= tag in ("td", "th")
        self.preformatted += tag == "pre"
        if tag == "a":
            self.marks.append((len(self.pieces), self.chars, self.lines, self.is_spaced))

    def end(self, tag: str) -> None:
        tag = tag.removeprefix(self.prefix)
        self.depth -= 1
        self.anchors -= tag == "a"
        self.uncounted -= self.uncounted > 0
        if self.outside:
            self.outside -= 1
            return
        self.lines = max(self.lines, LINES.get(tag, 0))
        self.preformatted -= tag == "pre"
        if tag == "a" and self.marks:
            n, chars, lines, is_spaced = self.marks.pop()
            is_short = self.chars - chars <= NOTE_CHARS  # joining longer links would take long where they are nested
            if is_short and NOTE_MARK.fullmatch("".join(self.pieces[n:]).strip()):
                del self.pieces[n:]
                self.chars, self.lines, self.is_spaced = chars, lines, is_spaced
        if self.contents and self.contents[-1].depth > self.depth:
            self._leave_out_links(self.contents.pop())

    def _leave_out_links(self, start: _Contents) -> None:
        """Leave out what was laid out since `start` if most of it is links."""
        letters, linked, links = self.letters - start.letters, self.linked - start.linked, self.links - start.links
        if linked + links > letters - linked:
            del self.pieces[start.n :]
            self.chars, self.lines, self.is_spaced = start.chars, start.lines, start.is_spaced
            self.letters, self.linked, self.links = start.letters, start.linked, self.links + linked
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
        if text:
            if self.pieces:
                self.pieces.append("\n" * self.lines or " " * self.is_spaced)
            self.pieces.append(text.replace("\xa0", " "))
            self.chars += len(text)
            self.lines, self.is_spaced = 0, ends_spaced

    def close(self) -> "_Layout":
        self.text = "".join(self.pieces)
        self.letters = count_letters(self.text)
        return self


def _epub(name: str, content: bytes, losses: dict[str, Loss]) -> str:
    """The text of an EPUB's chapters, in the order of its spine; `losses` gets each file that is not in it whole."""
    chapters, others = [], []
    for page in epub.pages(name, content):
        place, text, layout = f"{name}: {page.path}", "", _Layout()
        try:
            text, _ = decode(place, page.content)
            if page.is_markup:
                layout = _lay_out(text, place)
                text = layout.text
        except DataError:
            if page.role != "unlisted":
                raise
            page = page._replace(role="unread")
        text, letters = text.removeprefix("\ufeff").strip(), count_letters(text)
        held, unlinked = letters + layout.lost, letters - layout.linked
        if (
            page.role == "chapter"
            or (page.role == "cover" and letters > COVER_LETTERS)
            or (page.role == "contents" and layout.linked + layout.links <= unlinked)
        ):
            chapters.append(text)
            lost = layout.lost
        else:
            lost = layout.lost + (unlinked if page.role == "contents" else letters)
            if page.role != "unlisted":
                others.append((page.path, text, Loss(layout.lost, held)))
        if lost or page.role == "unread":
            losses[page.path] = Loss(lost, held)
    if not any(chapters):  # then what the book calls its cover, its contents or its notes is the book
        chapters = [text for _, text, _ in others]
        losses |= {path: loss for path, _, loss in others if path in losses and loss.held}
    return "\n\n".join(filter(None, chapters))
