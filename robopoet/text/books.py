"""Books as people have them: plain text in any encoding, HTML and EPUB.

HTML is laid out as a browser does without a style sheet: a blank line between paragraphs, a new line for each line of
verse. What is not the work is left out: navigation, tables of contents, covers, page numbers, footnote marks.

Every file is untrusted: no entity is expanded, nothing is fetched, no archive unpacks to more than BOOK_BYTES.
"""

import codecs
import contextlib
import io
import posixpath
import re
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import PurePath

import charset_normalizer
from charset_normalizer.utils import any_specified_encoding

from robopoet.errors import DataError, describe

HTML = (".html", ".htm", ".xhtml")
CONVERTED = {
    ".pdf": "pdftotext -layout FILE.pdf FILE.txt",
    **dict.fromkeys((".mobi", ".azw", ".azw3", ".fb2", ".docx", ".odt", ".rtf"), "Calibre's ebook-convert"),
    ".doc": "soffice --convert-to docx, then Calibre's ebook-convert",
}  # what makes a .txt or an .epub of these
UNPACKED, UNPACKED_FLOOR = 100, 2**20  # a packed file may unpack to this many times its size, plus these bytes
ENOUGH = 8  # bytes beyond ASCII from which an encoding can be told
BOOK_BYTES = 50 * 2**20  # the Bible, the longest of books, has 5 MB
MOST_MEMBERS, MEMBER = 20_000, b"PK\1\2"  # files in an archive; how the record of each begins
MOST_PATH = 1000  # characters of a path in an archive
# An end tag is compared with every open element, so their products are bounded: a third of a second, and 0.7 us a byte
FED, COMPARISONS, COMPARISONS_A_BYTE = 2**12, 10**8, 200

# newlines before and after an element, as in the HTML standard's style sheet for browsers
LINES = dict.fromkeys("address center dd dir div dt figcaption legend li table tr".split(), 1) | dict.fromkeys(
    "article aside blockquote dl figure footer h1 h2 h3 h4 h5 h6 header hr main ol p pre section ul".split(), 2
)
# what is not part of the work: elements, and values of class, epub:type and role
OUTSIDE = frozenset(
    "audio button canvas form head iframe math nav noscript object rp rt script select style svg template video".split()
)
OUTSIDE_NAMES = frozenset(
    "backlink copyright-page cover doc-backlink doc-cover doc-noteref doc-pagebreak doc-toc landmarks lot loi noteref "
    "page-list pagebreak pagenum pageno pg-boilerplate toc".split()
)
NOTE_CHARS = 20  # length of the longest, spaces included
NOTE_MARK = re.compile(r"[\[(]?(?:\d{1,4}|[*†‡§‖¶]{1,3})[\])]?")
FONT_OBFUSCATION = {"http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC"}  # not of the text


def read(name: str, content: bytes, encoding: str = "") -> tuple[str, str]:
    """The text of the file `name`, and its encoding if that had to be guessed, else "".

    encoding: what it is; "": UTF-8, UTF-16 with its mark, or what fits best. Raises DataError with `name`.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix in CONVERTED:
        raise DataError(f"{name}: is no text; convert it first, with {CONVERTED[suffix]}")
    if suffix == ".epub":
        return _epub(name, content), ""
    text, guessed = decode(name, content, encoding)
    return (html_text(text, name) if suffix in HTML else text), guessed


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
    from lxml import etree  # a tenth of a second, for those who need it

    layout, encoded = _Layout(), content.encode("utf-8", "replace")
    parser = etree.HTMLParser(target=layout, encoding="utf-8")
    left = COMPARISONS + COMPARISONS_A_BYTE * len(encoded)
    for start in range(0, len(encoded), FED):
        fed = encoded[start : start + FED]
        ends = fed.count(b"</")
        left -= (layout.depth + fed.count(b"<") - ends) * ends
        if left < 0:
            raise DataError(f"{name}: nests its elements too deep, {layout.depth:,} are open at once; refused")
        parser.feed(fed)
    return parser.close()


class _Layout:
    """Lays out the elements and the text that lxml's parser finds (its target interface)."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.lines = 0  # newlines that are due before the next text
        self.is_spaced = False  # whether a space is
        self.depth = self.outside = self.preformatted = 0  # how many elements are open, and how many of them are
        self.chars = 0  # in the pieces
        self.links: list[tuple[int, int, int, bool]] = []  # the state at the start of each open link within the book

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.outside or self._is_outside(tag, attributes):
            self.outside += 1
            return
        if tag == "br":
            self.lines = min(self.lines + 1, 2)
        self.lines = max(self.lines, LINES.get(tag, 0))
        self.is_spaced |= tag in ("td", "th")
        self.preformatted += tag == "pre"
        if tag == "a":
            self.links.append((len(self.pieces), self.chars, self.lines, self.is_spaced))

    def _is_outside(self, tag: str, attributes: dict[str, str]) -> bool:
        names = " ".join(attributes.get(key, "") for key in ("class", "epub:type", "role")).lower().split()
        return tag in OUTSIDE or "hidden" in attributes or not OUTSIDE_NAMES.isdisjoint(names)

    def end(self, tag: str) -> None:
        self.depth -= 1
        if self.outside:
            self.outside -= 1
            return
        self.lines = max(self.lines, LINES.get(tag, 0))
        self.preformatted -= tag == "pre"
        if tag == "a" and self.links:
            n, chars, lines, is_spaced = self.links.pop()
            is_short = self.chars - chars <= NOTE_CHARS  # joining longer links would take long where they are nested
            if is_short and NOTE_MARK.fullmatch("".join(self.pieces[n:]).strip()):
                del self.pieces[n:]
                self.chars, self.lines, self.is_spaced = chars, lines, is_spaced

    def data(self, text: str) -> None:
        if self.outside or not text:
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

    def close(self) -> str:
        return "".join(self.pieces)


def _epub(name: str, content: bytes) -> str:
    """The text of an EPUB's chapters, in the order of its spine."""
    if (members := content.count(MEMBER)) > MOST_MEMBERS:  # zipfile would make an object of each
        raise DataError(f"{name}: holds {members:,} files, may hold at most {MOST_MEMBERS:,}; refused")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return "\n\n".join(_chapters(name, _Members(name, archive, len(content))))
    except DataError:
        raise
    except Exception as e:  # on damage, zipfile and lxml raise a dozen classes
        raise DataError(f"{name}: is damaged or no EPUB ({describe(e)}); get the file again") from None


class _Members:
    """The files in an archive, read up to a limit for all of them."""

    def __init__(self, name: str, archive: zipfile.ZipFile, size: int):
        self.name, self.archive = name, archive
        self.left = min(BOOK_BYTES, UNPACKED * size + UNPACKED_FLOOR)

    def __contains__(self, member: str) -> bool:
        return member in self.archive.NameToInfo

    def read(self, member: str) -> bytes:
        if member not in self:
            raise DataError(f"{self.name}: lacks {member[:200]!r}, which it names; get the file again")
        with self.archive.open(member) as f:
            content = f.read(self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.name}: unpacks to over {BOOK_BYTES:,} bytes, or {UNPACKED} times its size; refused")
        return content

    def elements(self, member: str) -> list[tuple[str, dict[str, str]]]:
        """The elements of an XML file, each with its name and attributes, without namespaces."""
        from lxml import etree

        parser = etree.XMLParser(target=_Elements(), resolve_entities=False, no_network=True)
        parser.feed(self.read(member))
        return parser.close()


class _Elements:
    """Collects the elements that lxml's parser finds (its target interface)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, dict[str, str]]] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.found.append((tag.rpartition("}")[2], dict(attributes)))

    def close(self) -> list[tuple[str, dict[str, str]]]:
        return self.found


def _chapters(name: str, members: _Members) -> Iterator[str]:
    """The text of each document in the reading order that the package gives (EPUB 3.3, sections 4.2.6.3 and 5)."""
    if "META-INF/encryption.xml" in members:
        listed = members.elements("META-INF/encryption.xml")
        if not {a.get("Algorithm") for tag, a in listed if tag == "EncryptionMethod"} <= FONT_OBFUSCATION:
            raise DataError(f"{name}: is encrypted (DRM), so it can't be read; get a copy without it")
    roots = [a["full-path"] for tag, a in members.elements("META-INF/container.xml") if tag == "rootfile"]
    package = members.elements(roots[0][:MOST_PATH])
    folder = posixpath.dirname(roots[0])

    def place(href: str) -> str:
        return posixpath.normpath(posixpath.join(folder, urllib.parse.unquote(href)))

    items = {a["id"]: a for tag, a in package if tag == "item"}
    guide = {place(a["href"]) for tag, a in package if tag == "reference" and a.get("type") in OUTSIDE_NAMES}
    spine = [a["idref"] for tag, a in package if tag == "itemref" and a.get("linear") != "no"]
    for item in (items[idref] for idref in dict.fromkeys(spine)):
        path = place(item["href"])
        if "html" in item["media-type"] and "nav" not in item.get("properties", "").split() and path not in guide:
            text, _ = decode(f"{name}: {path}", members.read(path))
            if chapter := html_text(text, f"{name}: {path}").strip():
                yield chapter
