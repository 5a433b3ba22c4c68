"""A page of HTML or XHTML, from its source to its text. Every page is untrusted: nothing is fetched for it."""

import functools
import html
import re
from collections.abc import Set

from robopoet.errors import DataError
from robopoet.text.layout import FindSheets, LaidOut
from robopoet.text.styles import TRIED

# An end tag is compared with every open element, so their products are bounded: a third of a second, and 0.7 us a byte
FED, COMPARISONS, COMPARISONS_A_BYTE = 2**12, 10**8, 200
XML_SHEET = re.compile(r"<\?xml-stylesheet\s[^>]{0,200}?\bhref=[\"']([^\"'>]{1,300})[\"'][^>]{0,200}>")
# the declarations in a document type, and one of them
DOCTYPE = re.compile(r"<!DOCTYPE\s", re.I)
SUBSET = re.compile(
    r"(<!DOCTYPE\s[^\[<>]{0,1000})\[((?:<!--.*?-->|<\?.*?\?>|\"[^\"]*+\"|'[^']*+'|[^\]\"'<]|<(?!!--|\?))*+)\]\s*>",
    re.S | re.I,
)
ENTITY = re.compile(r"<!--.*?-->|<!ENTITY\s+(?P<name>[\w.:-]{1,50})\s+(?:\"(?P<a>[^\"]*)\"|'(?P<b>[^']*)'|[^>]*)", re.S)
REFERENCE = re.compile(r"&([\w.:-]{1,50});")
MOST_SUBSET = 2**18  # characters that are looked at
ENTITY_CHARS, EXPANDED_CHARS = 1000, 2**20  # the most characters of one entity, and that all of them may add
MOST_NESTED = 4  # how deep entities may stand in one another


def html_text(content: str, name: str = "") -> str:
    """The text of an HTML or XHTML document; raises DataError with its `name` if parsing it may take minutes."""
    return lay_out(content, name).text


def lay_out(content: str, name: str, note_ids: Set[str] = frozenset(), find: FindSheets = lambda _: []) -> LaidOut:
    """Lay out a document; note_ids: ids in other documents that are those of notes. find: its linked style sheets."""
    content = _without_declarations(content)
    layout = LaidOut(note_ids, find)
    for href in XML_SHEET.findall(content[:10_000]):
        layout.add_sheets(find(href))
    layout = _parse(layout, content, name)
    known = layout.note_ids - note_ids
    if layout.has_late_sheet or not known.isdisjoint(layout.undecided):
        layout = _parse(LaidOut(note_ids | known, sheets=layout.styles.sheets), content, name)
    return layout


def _parse(layout: LaidOut, content: str, name: str) -> LaidOut:
    from lxml import etree  # a tenth of a second, for those who need it

    encoded = _without_cdata(content).encode("utf-8", "replace")
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
        if layout.styles.tried > TRIED:
            raise DataError(f"{name}: its style sheets ask for over {TRIED:,} comparisons; refused")
    return parser.close()


def _without_cdata(content: str) -> str:
    """`content` with the text of XML's CDATA sections, which HTML's parser takes for comments, as HTML has it."""
    before, *sections = content.split("<![CDATA[")
    pieces = [before]
    for section in sections:
        text, end, after = section.partition("]]>")
        pieces += [html.escape(text, quote=False) if end else text, after]
    return "".join(pieces)


def _without_declarations(content: str) -> str:
    """`content` without its document type's own declarations, and with the short texts for which its entities stand.

    Those that stand for a file or a long text, as in an attack, stand for nothing.
    """
    begin = DOCTYPE.search(content, 0, MOST_SUBSET)
    found = SUBSET.match(content, begin.start(), begin.start() + MOST_SUBSET) if begin else None
    if not found:
        return content
    values: dict[str, str] = {}
    for entity in ENTITY.finditer(found[2]):
        if entity["name"]:
            values.setdefault(entity["name"], entity["a"] or entity["b"] or "")
    left = EXPANDED_CHARS

    @functools.cache
    def value_of(name: str, depth: int) -> str:
        value = values[name]
        if len(value) > ENTITY_CHARS or depth == MOST_NESTED:
            return ""
        inner = (value_of(part, depth + 1) if part in values else f"&{part};" for part in REFERENCE.findall(value))
        value = REFERENCE.sub(lambda _: next(inner), value)
        return value if len(value) <= ENTITY_CHARS else ""

    def expand(reference: re.Match[str]) -> str:
        nonlocal left
        if reference[1] not in values:
            return reference[0]
        left -= len(value := value_of(reference[1], 0))
        return value if left >= 0 else ""

    rest = content[found.end() :]
    rest = REFERENCE.sub(expand, rest) if values else rest
    return content[: found.start()] + found[1] + ">" + rest
