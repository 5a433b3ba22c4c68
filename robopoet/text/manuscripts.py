"""Manuscripts as writers have them, .docx, .odt and .fb2: from their XML to the text of the work.

Notes, comments, deleted revisions, hidden text, running heads and tables of contents are left out. Every file is
untrusted: nothing is fetched, entities that multiply are refused, and nothing unpacks to more than an EPUB may.
"""

import posixpath
import re
from collections import Counter
from functools import lru_cache
from itertools import groupby
from typing import ClassVar, NamedTuple

from robopoet.errors import DataError, describe
from robopoet.text import encodings
from robopoet.text.cleaning import count_letters
from robopoet.text.epub import Members, local_name, mended, opened
from robopoet.text.matter import CONTENTS
from robopoet.text.typeset import HEADS

ZIPPED, OLE = b"PK\3\4", b"\xd0\xcf\x11\xe0"  # how a zip begins; and a .doc, or a .docx with a password
FED_XML = 2**16  # bytes that the parser gets at a time; it refuses ten million
VERSE_CHARS = 80  # the longest line of verse that is a paragraph
MOST_SPACES = 40  # that one element makes
BESIDE = re.compile(r"(?:comments|endnotes|footer|footnotes|header)\d*\.xml")  # a .docx has these beside its text
CONTENTS_FIELD = re.compile(r"\s*(?:TOC|INDEX)\b")
NOTES_BODY = re.compile(r"(?:foot|end)?notes?|comments?|примечани|сноск|комментари", re.I)
NO_XML = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # control codes
# in an .fb2 also pictures, and how letters look, as bold and italics may be closed in the wrong order
NO_FICTION = re.compile(
    rf"{NO_XML.pattern}|<binary\b[^<>]{{0,1000}}>[^<]*</binary>"
    r"|</?(?:code|emphasis|strikethrough|strong|style|sub|sup)(?![\w:-])[^<>]{0,1000}>"
)
SPACE, TAB, NEW_LINE = "\0", "\x01", "\x02"  # white space that is kept, while that of the XML collapses
KEPT_SPACE = str.maketrans({SPACE: " ", TAB: "\t", NEW_LINE: "\n", "\xa0": " ", "\xad": None})
XML_SPACE, AROUND_LINE = re.compile(r"[ \t\r\n]+"), re.compile(rf" ?{NEW_LINE} ?")
GREEK = str.maketrans(  # what the font Symbol shows for letters
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", "ΑΒΧΔΕΦΓΗΙϑΚΛΜΝΟΠΘΡΣΤΥςΩΞΨΖαβχδεφγηιϕκλμνοπθρστυϖωξψζ"
)

Outside = tuple[str, bool]  # as what an element that is left out is told, or "", and whether its letters are lost
NOTE, REMARK, DELETED = ("notes", True), ("comments", False), ("deleted revisions", False)
RUNNING_HEAD, OUTLINE, HIDDEN, UNSEEN = (HEADS, False), (CONTENTS, False), ("", True), ("", False)

_name = lru_cache(1000)(local_name)


class _Reader:
    """Collects the paragraphs of a format from the elements that lxml's parser finds (its target interface).

    A class for each format says what its elements are, by their names in lower case and without namespaces, and which
    paths in an archive hold them, that of the text first.
    """

    suffixes: tuple[str, ...] = ()
    roots = paragraphs = apart = rows = cells = frozenset[str]()  # apart: with a blank line before and after
    characters: ClassVar[dict[str, str]] = {}  # elements -> what they stand for
    outside: ClassVar[dict[str, Outside]] = {}  # elements that are left out
    is_zip, has_verse = False, True  # whether it must be one; whether a paragraph may be a line of verse
    ignored = NO_XML  # what the parser does not get

    def __init__(self) -> None:
        self.open: list[str] = []  # the names of all open elements
        self.blocks: list[str] = []  # paragraphs, and "" for a blank line
        self.pieces: list[list[str]] = []  # those of each open paragraph
        self.goes_on, self.begun = False, list[str]()  # whether the open one goes on in the next; one that does
        self.of_rows: list[list[int]] = []  # for each open row: how many blocks came before it, and its cells
        self.out: Outside | None = None  # what is left out just now, the depth of its element, and its text
        self.out_depth, self.out_text = 0, list[str]()
        self.lost, self.counts = 0, Counter[str]()

    def meaning(self, name: str, attributes: dict[str, str]) -> Outside | None:
        """As what an element that starts is left out, or None; does what it means to this format alone."""
        return self.outside.get(name)

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = _name(tag)
        self.open.append(name)
        if len(self.open) == 1 and name not in self.roots:
            raise ValueError(f"its XML is {name[:50]}")
        if self.out:
            return
        if out := self.meaning(name, {_name(key): value for key, value in attributes.items()}):
            self.leave_out(out, len(self.open))
            return
        if name in self.apart:
            self.blocks.append("")
        if name in self.rows:
            self.of_rows.append([len(self.blocks), 0])
        if name in self.cells and self.of_rows:
            self.of_rows[-1][1] += 1
        if name in self.paragraphs:
            self.pieces.append(self.begun)
            self.goes_on, self.begun = False, list[str]()
        self.add(self.characters.get(name, ""))

    def leave_out(self, out: Outside, depth: int) -> None:
        """Leave out what comes until the element that is open at `depth` ends."""
        self.out, self.out_depth, self.out_text = out, depth, list[str]()

    def end(self, tag: str) -> None:
        name = self.open.pop()
        if self.out:
            if len(self.open) < self.out_depth:
                text, (told, is_lost), self.out = "".join(self.out_text), self.out, None
                self.counts[told] += told != "" and text.strip() != ""
                self.lost += count_letters(text) if is_lost else 0
            return
        if name in self.paragraphs:
            self._end_paragraph(self.pieces.pop())
        if name in self.rows:
            before, cells = self.of_rows.pop()
            if len(self.blocks) - before <= cells:  # a paragraph in each
                self.blocks[before:] = [" ".join(filter(None, self.blocks[before:]))]
        if name in self.apart:
            self.blocks.append("")

    def _end_paragraph(self, pieces: list[str]) -> None:
        if self.goes_on:
            self.goes_on, self.begun = False, pieces
            return
        text = XML_SPACE.sub(" ", "".join(pieces)).strip(" ")
        self.blocks.append(AROUND_LINE.sub(NEW_LINE, text).translate(KEPT_SPACE).rstrip())

    def data(self, text: str) -> None:
        if self.out:
            self.out_text.append(text)
        else:
            self.add(text)

    def add(self, text: str) -> None:
        if self.pieces:
            self.pieces[-1].append(text)

    def close(self) -> "_Reader":
        if self.begun:
            self._end_paragraph(self.begun)
        return self

    def text(self) -> str:
        """The paragraphs, with blank lines between them but for those that are the lines of a stanza."""
        parts: list[str] = []
        for is_filled, blocks in groupby(self.blocks, bool):
            stanza = "\n".join(block_list := list(blocks))
            if is_filled and self.has_verse and max(map(len, stanza.split("\n"))) <= VERSE_CHARS:
                parts.append(stanza)
            elif is_filled:
                parts += [block.lstrip() for block in block_list]
        return "\n\n".join(parts)


class _Word(_Reader):
    """WordprocessingML (ECMA-376, part 1, section 17), transitional or strict: a .docx."""

    suffixes, is_zip = (".docx", ".docm", ".dotx"), True
    roots = frozenset("comments document endnotes footnotes ftr hdr".split())
    paragraphs, apart, rows, cells = frozenset({"p"}), frozenset({"tbl"}), frozenset({"tr"}), frozenset({"tc"})
    characters: ClassVar = {"br": NEW_LINE, "cr": NEW_LINE, "ptab": TAB, "nobreakhyphen": "-"}
    outside: ClassVar = {
        **dict.fromkeys(("footnote", "endnote"), NOTE),
        **dict.fromkeys(("del", "movefrom"), DELETED),
        **dict.fromkeys(("hdr", "ftr"), RUNNING_HEAD),
        **dict.fromkeys(("fallback", "rt"), UNSEEN),  # a text box again, for older programs; ruby
        "comment": REMARK,
    }

    def __init__(self) -> None:
        super().__init__()
        self.fields: list[str | None] = []  # the instruction of each open field; None: its result has begun
        self.instructions, self.unshown = 0, list[str]()  # how many are not None; the text in these

    @staticmethod
    def paths(members: Members) -> list[str]:
        relations = _elements(members, "_rels/.rels")
        found = [a.get("target", "") for _, a in relations if a.get("type", "").endswith("/officeDocument")]
        folder, base = posixpath.split(members.find(*found) or "word/document.xml")
        beside = [path for path in members.paths if BESIDE.fullmatch(path.removeprefix(folder + "/"))]
        return [posixpath.join(folder, base), *beside]

    def meaning(self, name: str, attributes: dict[str, str]) -> Outside | None:
        value, above = attributes.get("val", ""), self.open[-3:-1]
        is_on = value not in ("0", "false", "off")
        if above == ["ppr", "rpr"]:  # the mark at its end, without which a paragraph goes on in the next one
            self.goes_on |= is_on and name in ("del", "movefrom", "specvanish", "vanish")
            return None
        match name:
            case "vanish" if above == ["r", "rpr"] and is_on:
                self.leave_out(HIDDEN, len(self.open) - 2)
            case "docpartgallery" if above == ["sdtpr", "docpartobj"] and "table of contents" in value.lower():
                self.leave_out(OUTLINE, len(self.open) - 3)
            case "framepr":
                self.goes_on |= attributes.get("dropcap", "none") != "none"
            case "tab" if above[-1:] == ["r"]:  # elsewhere it is a tab stop
                self.add(TAB)
            case "br" if attributes.get("type") in ("page", "column"):
                self.add(NEW_LINE)
            case "sym":
                self.add(_symbol(attributes.get("font", ""), attributes.get("char", "")))
            case "fldchar":
                self._field(attributes.get("fldchartype", ""))
        return super().meaning(name, attributes)

    def _field(self, kind: str) -> None:
        if kind == "begin":
            self.fields.append("")
            self.instructions += 1
            return
        instruction = self.fields.pop() if self.fields else None
        is_contents = instruction is not None and CONTENTS_FIELD.match(instruction) is not None
        self.instructions -= instruction is not None
        if kind == "end":
            self.counts[CONTENTS] += is_contents
        else:
            self.fields.append(instruction if is_contents else None)
            self.instructions += is_contents
        if not self.instructions:
            self.unshown.clear()

    def data(self, text: str) -> None:
        if self.open[-1] == "instrtext" and self.fields and self.fields[-1] is not None:
            self.fields[-1] = (self.fields[-1] + text)[:100]
        elif self.open[-1] in ("t", "deltext") and self.instructions and not self.out:
            self.unshown.append(text)
        elif self.open[-1] in ("t", "deltext"):
            super().data(re.sub(r"[ \t\r\n]", SPACE, text))

    def close(self) -> _Reader:
        self.lost += count_letters("".join(self.unshown))  # in a field that never ends
        return super().close()


def _symbol(font: str, char: str) -> str:
    """A character of a font, by its number in hexadecimal; "" if other fonts have nothing like it."""
    code = int(char[-4:], 16)
    if 0xD800 <= code < 0xF900:  # none, or for private use
        return chr(GREEK.get(code & 0xFF, 0xAD)) if font == "Symbol" else ""
    return chr(code)


class _OpenDocument(_Reader):
    """OpenDocument text (version 1.3, part 3): an .odt, or a .fodt, which is one file."""

    suffixes = (".odt", ".ott", ".fodt")
    roots = frozenset("document document-content document-styles".split())
    paragraphs, apart = frozenset({"h", "p"}), frozenset({"h", "table"})
    rows, cells = frozenset({"table-row"}), frozenset({"table-cell"})
    characters: ClassVar = {"tab": TAB, "line-break": NEW_LINE}
    outside: ClassVar = {
        **{"note": NOTE, "annotation": REMARK, "deletion": DELETED},
        **dict.fromkeys("alphabetical-index illustration-index table-of-content".split(), OUTLINE),
        **dict.fromkeys("footer footer-first footer-left header header-first header-left".split(), RUNNING_HEAD),
        **dict.fromkeys("change-info forms page-count page-number ruby-text".split(), UNSEEN),
    }

    def __init__(self) -> None:
        super().__init__()
        self.style, self.hiding = "", set[str]()  # the style that began last, and those that hide text

    @staticmethod
    def paths(members: Members) -> list[str]:
        if any(tag.startswith("encrypt") for tag, _ in _elements(members, "META-INF/manifest.xml")):
            raise DataError(f"{members.name}: has a password; open it and save it without one")
        heads = members.find("styles.xml")  # the running heads stand there
        return ["content.xml", heads] if heads else ["content.xml"]

    def meaning(self, name: str, attributes: dict[str, str]) -> Outside | None:
        is_hidden = attributes.get("display") == "none"
        match name:
            case "section" if is_hidden:
                return HIDDEN
            case "p" | "h" | "span" if attributes.get("style-name") in self.hiding:
                return HIDDEN
            case "title" | "desc" if self.open[-2:-1] not in (["a"], ["h"], ["p"], ["span"]):  # a picture's
                return UNSEEN
            case "s":
                self.add(SPACE * min(int(attributes.get("c", "1")), MOST_SPACES))
            case "style":
                self.style = attributes.get("name", "")
            case "text-properties" if is_hidden:
                self.hiding.add(self.style)
        return super().meaning(name, attributes)


class _FictionBook(_Reader):
    """FictionBook 2.1: an .fb2, which may be zipped."""

    suffixes = (".fb2", ".fb2.zip")
    roots = frozenset({"fictionbook"})
    # what holds paragraphs is one, too, for text that stands there against the rules
    paragraphs = frozenset("body cite date epigraph p poem section stanza subtitle td text-author th title".split())
    rows, cells, has_verse, ignored = frozenset({"tr"}), frozenset({"td", "th"}), False, NO_FICTION
    outside: ClassVar = dict.fromkeys(("binary", "description", "stylesheet"), UNSEEN)

    @staticmethod
    def paths(members: Members) -> list[str]:
        return [path for path in members.paths if path.lower().endswith(".fb2")][:1] or ["*.fb2"]

    def meaning(self, name: str, attributes: dict[str, str]) -> Outside | None:
        if name == "a" and attributes.get("type") == "note":
            return NOTE
        if name == "body" and NOTES_BODY.match(attributes.get("name", "")):
            return HIDDEN
        return super().meaning(name, attributes)

    def end(self, tag: str) -> None:
        if _name(tag) == "v" and not self.out:
            self.add(NEW_LINE)
        super().end(tag)


_READERS = _Word, _OpenDocument, _FictionBook
MANUSCRIPTS = tuple(suffix for reader in _READERS for suffix in reader.suffixes)


class Manuscript(NamedTuple):
    """told: of its encoding. lost: by file, the letters that its text lacks, and all. counts: what was left out."""

    text: str
    told: str
    lost: dict[str, tuple[int, int]]
    counts: Counter[str]


def read_manuscript(name: str, content: bytes, encoding: str = "") -> Manuscript:
    """The text of a file with one of the endings MANUSCRIPTS; encoding: of an .fb2. Raises DataError with `name`."""
    if content.startswith(OLE):
        raise DataError(f"{name}: has a password, or is a .doc; open it and save it as .docx without a password")
    kind = next(reader for reader in _READERS if name.lower().endswith(reader.suffixes))
    parts = {name: content}
    if kind.is_zip or content.startswith(ZIPPED):
        with opened(name, content, kind.suffixes[0]) as members:
            parts = {path: members.read(path) for path in kind.paths(members)}
    text, told, lost, counts = "", "", dict[str, tuple[int, int]](), Counter[str]()
    for path, part in parts.items():
        place = name if path == name else f"{name}: {path}"
        source, telling = encodings.decode(place, part, encoding if kind is _FictionBook else "")
        reader = _parse_xml(place, source, kind())
        found = reader.text()
        text, told, counts = text or found, told or telling, counts + reader.counts
        if reader.lost:
            lost[path] = (reader.lost, reader.lost + count_letters(found))
    return Manuscript(text, told, lost, counts)


def _elements(members: Members, path: str) -> list[tuple[str, dict[str, str]]]:
    return members.elements(found) if (found := members.find(path)) else []


def _parse_xml(place: str, source: str, reader: _Reader) -> _Reader:
    from lxml import etree  # a tenth of a second, for those who need it

    encoded = mended(reader.ignored.sub("", source).encode("utf-8", "replace"))
    parser = etree.XMLParser(target=reader, encoding="utf-8", resolve_entities=False, no_network=True)
    try:
        for start in range(0, len(encoded), FED_XML):
            parser.feed(encoded[start : start + FED_XML])
        return parser.close()
    except (etree.XMLSyntaxError, ValueError) as e:
        raise DataError(f"{place}: is damaged, or another kind of file ({describe(e)}); get it again") from None
