"""Page matter: what a maker of pages adds to a work, and a reader passes over.

In markup: page numbers, bars of links to the pages around, tables of contents. Each is known by where it stands and
what it is, never by its digits alone.
"""

import bisect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from robopoet.text import notes

PAGE_NUMBERS, BARS, CONTENTS = "page numbers", "lines of navigation", "tables of contents"  # as they are told

# --- page numbers

_PAGE = r"(?:page|pg|pag|pagina|seiten?|folio|leaf)"
# names of elements, without all but letters, that say that it is a page's number; and that only may say so
NAMED_PAGE = re.compile(
    rf"(?:doc|ebookmaker|epub|print|tei|x)*(?:{_PAGE}(?:num(?:ber|ero|mer)?s?|no|nr|zahl|count|start|end|break|brk|mark(?:er)?|anchor|label)"
    rf"|num(?:ero|ber)?(?:de|of)?{_PAGE})"
)
MAYBE_PAGE = re.compile(rf"(?:doc|epub|print|tei|x|new)*{_PAGE}|pagination|pb|pgbrk")
PAGE_ID = re.compile(rf"(?:{_PAGE}|pb|p(?=[._-]))(?:num(?:ber)?|no|break)?[._-]?0*([^\W_]{{1,9}})", re.I)
_BEFORE, _AFTER = r"[\s\[({|<~–—-]*", r"[\s\])}|>~.:–—-]*"
_ROMAN = "[ivxlcdm]{1,9}"
_NUMBER = rf"(?P<number>\d{{1,5}}|{_ROMAN})"
# the text of what may be a page's number, and of what is named so
PAGE_TEXT = re.compile(
    rf"{_BEFORE}(?:(?:pp?|pgs?|pages?|p[aá]g(?:inas?)?|s|seiten?|стр|side?|strona|str)\b\.?\s*)?{_NUMBER}{_AFTER}", re.I
)
MAYBE_PAGE_TEXT = re.compile(PAGE_TEXT.pattern.replace(_ROMAN, "(?-i:[lxvi]{1,7})"), re.I)  # mix and I are words
NAMED_PAGE_TEXT = re.compile(
    r"\W*(?:[^\W\d_]{1,12}\W+){0,2}(?:[^\W\d_]?\d{1,5}[^\W\d_]?(?:\W+(?:[^\W\d_]{1,3}\W+)?\d{1,5})?|[ivxlcdm]{1,9})\W*",
    re.I,
)


class PageNumber(NamedTuple):
    """What the text of an element must be if it is a page's number. number: which, if its id tells."""

    text: re.Pattern[str]
    number: str = ""

    def fits(self, text: str) -> bool:
        found = self.text.fullmatch(text)
        return bool(found) and (not self.number or self.number == found["number"].lstrip("0").lower())


def page_number(attributes: dict[str, str], names: Iterable[str]) -> PageNumber | None:
    """What the text of an element must be to be a page's number, if its names, such as classes, or its id say so."""
    letters = [re.sub(r"[\W\d_]", "", name) for name in names]
    if any(map(NAMED_PAGE.fullmatch, letters)):
        return PageNumber(NAMED_PAGE_TEXT)
    for key in ("id", "name"):
        if found := PAGE_ID.fullmatch(attributes.get(key, "")[:40]):
            return PageNumber(PAGE_TEXT, found[1].lower())
    if "href" not in attributes and any(map(MAYBE_PAGE.fullmatch, letters)):
        return PageNumber(MAYBE_PAGE_TEXT)
    return None


# --- bars of links, and tables of contents

ACCESS_KEYS = frozenset("hnpuHNPU")  # home, next, previous, up
BAR_CHARS, ENTRY_CHARS = 400, 200  # the longest bar, and line of a table of contents
FEWEST_ENTRIES, FEWEST_TITLED = 3, 2  # lines of links that are a table of contents, without a title and with one
CONTENTS_TITLES = frozenset(
    "contents|table of contents|list of illustrations|illustrations|chapters|index|inhalt|inhaltsverzeichnis|"
    "inhaltsübersicht|table des matières|sommaire|índice|indice|contenido|contenidos|sumário|conteúdo|sommario|"
    "indice generale|inhoud|inhoudsopgave|содержание|оглавление|зміст|spis treści|obsah|innehåll|"
    "innehållsförteckning|indhold|innhold|sisällys|tartalom|cuprins|içindekiler|περιεχόμενα|目录|目錄|目次|차례".split(
        "|"
    )
)
# what the links of a bar say, in the languages of most books
_GO_ON = (
    r"(?:(?:edit|improve|print|share|show|suggest|view) (?:an edit|this page|(?:page )?source|on github)|page source|"
    r"main content|prev|previous|next|back|forward|toc|table of contents|zurück|weiter|vor|vorige|vorherige|"
    r"vorheriges|nächste|"
    r"nächstes|inhaltsverzeichnis|startseite|précédent|précédente|suivant|suivante|accueil|table des matières|anterior|"
    r"siguiente|próximo|próxima|seguinte|precedente|successivo|successiva|avanti|indietro|vorig|vorige|volgend|volgende|"
    r"inhoudsopgave|назад|вперёд|вперед|далее|предыдущая|следующая|оглавление|poprzedni|poprzednia|następny|następna|"
    r"dalej|wstecz|spis treści|föregående|nästa|forrige|næste|neste)"
)
_GO_TO = (  # what may also be a title
    r"(?:go|go to|navigation|"
    r"up|home|top|contents|index|first|last|start|begin|beginning|end|cover|title|main|glossary|bibliography|oben|"
    r"anfang|ende|inhalt|hoch|sommaire|haut|début|fin|inicio|início|arriba|índice|indice|su|omhoog|inhoud|наверх|вверх|"
    r"содержание|hem|upp|innehåll)"
)
_PART = (
    r"(?: (?:page|chapter|section|part|scene|book|story|poem|seite|kapitel|chapitre|capítulo|página|глава|strona|"
    r"rozdział|side|sida))?"
)
_BACK = (
    r"(?:(?:go|back|return|skip|jump|zurück|nach|retour|voltar|volver|вернуться) )+"
    r"(?:(?:to|zum|zur|au|à|al?|ao|на|к) )?(?:(?:the|la|le|l) )?"
)
BAR_WORDS = re.compile(rf"(?:{_BACK})?(?:{_GO_ON}|{_GO_TO}){_PART}")
SURE_BAR_WORDS = re.compile(rf"{_GO_ON}{_PART}|{_BACK}(?:{_GO_ON}|{_GO_TO}){_PART}")
# what made a page, with a link to that; and whose it is, where a line that is gone stands beside
CREDIT = re.compile(
    r"(?:(?:©|copyright\b).{0,100}[.|]\s*)?(?:proudly )?(?:built|created|generated|made|powered) (?:by|using|with)\b",
    re.I,
)
URL = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.I)
COPYRIGHT = re.compile(r"(?:©|copyright\b)", re.I)
ARROWS = "«»‹›←→⇐⇒◀▶◄►⏪⏩<>↑⇑▲"
STEP_TITLE = re.compile(
    rf"\W*(?:{BAR_WORDS.pattern})\s*[:{ARROWS}]|[{ARROWS}]+(?![^{ARROWS}]*[{ARROWS}])|[^{ARROWS}]+[{ARROWS}]+\s*\Z",
    re.I,
)


class Link(NamedTuple):
    """A link with text. is_step: whether it says itself that it leads to a page around this one."""

    href: str
    is_step: bool
    is_heading: bool


def link_of(attributes: dict[str, str], is_heading: bool) -> Link | None:
    """The link that an element with these attributes is, if it is one."""
    if "href" not in attributes:
        return None
    says = f"{attributes.get('rel', '')} {attributes.get('class', '')}".lower().split()
    is_step = not {"prev", "previous", "next", "up"}.isdisjoint(says) or attributes.get("accesskey") in ACCESS_KEYS
    return Link(attributes["href"].strip(), is_step, is_heading)


class _Line(NamedTuple):
    """A line of a page, its pieces from start to stop. words: if it is short. hrefs: where its links lead."""

    start: int
    stop: int
    chars: int
    # entry: it is one link; row: it is links; mixed: it begins with a link
    kind: Literal["text", "bar", "entry", "row", "mixed", "title"] = "text"
    words: str = ""
    hrefs: tuple[str, ...] = ()
    may_be_bar: bool = False  # if a bar stands beside it
    introduces: bool = False  # what follows, as a sentence that ends with a colon


def without_bars(
    pieces: list[str], links: Sequence[Link | None], places: Mapping[str, int]
) -> tuple[list[str], str, Counter[str]]:
    """`pieces` of text, each after a separator but the first, without bars and tables of contents.

    links: for each piece the link that it is in. places: for each id on the page, before which piece it stands. Returns
    also the text of the links that are gone, and the number of bars and tables.
    """
    if not any(links):
        return pieces, "", Counter()
    lines = [_line(pieces, links, start, stop) for start, stop in _breaks(pieces)]
    for order in (range(1, len(lines)), range(len(lines) - 2, -1, -1)):
        for i in order:
            beside = lines[i - (order.step)]
            if lines[i].may_be_bar and beside.kind == "bar":
                lines[i] = lines[i]._replace(kind="bar")
    gone: set[int] = set()
    counts: Counter[str] = Counter()
    for first, stop in _tables(lines, places):
        counts[CONTENTS] += 1
        gone.update(range(first, stop))
    bars = [i for i, line in enumerate(lines) if line.kind == "bar" and i not in gone]
    counts[BARS] += len(bars)
    gone.update(bars)
    kept: list[str] = []
    lost: list[str] = []
    separator = ""
    for i, line in enumerate(lines):
        separator = max(separator, pieces[line.start - 1] if line.start else "", key=len)
        if i in gone:
            lost += [pieces[j] for j in range(line.start, line.stop, 2) if links[j]]
        else:
            kept += [separator, *pieces[line.start : line.stop]] if kept else pieces[line.start : line.stop]
            separator = ""
    return kept, "".join(lost), +counts


def _breaks(pieces: list[str]) -> Iterator[tuple[int, int]]:
    """Where each line starts and stops among the pieces."""
    start = 0
    for i in range(1, len(pieces), 2):
        if pieces[i].startswith("\n"):
            yield start, i
            start = i + 1
    yield start, len(pieces)


def _line(pieces: list[str], links: Sequence[Link | None], start: int, stop: int) -> _Line:
    ends = pieces[stop - 1].rstrip()[-1:]
    line = _Line(start, stop, sum(map(len, pieces[start:stop])), introduces=ends in (":", ",", "—"))
    if line.chars > BAR_CHARS or (line.chars > ENTRY_CHARS and not any(links[start:stop])):
        return line
    text = "".join(pieces[start:stop])
    line = line._replace(words=_words(text), may_be_bar=COPYRIGHT.match(text) is not None)
    inside: dict[Link, str] = {}
    outside = []
    for i in range(start, stop, 2):
        if one := links[i]:
            inside[one] = f"{inside.get(one, '')} {pieces[i]}".strip()
        else:
            outside.append(pieces[i])
    if CREDIT.match(text) and any(URL.match(one.href) for one in inside):
        return line._replace(kind="bar")
    is_bar = bool(inside) and (_is_bar(inside, outside) or _is_framed(pieces, links, start, stop))
    if is_bar and (len(inside) > 1 or any(one.is_step for one in inside) or _is_sure(line.words)):
        return line._replace(kind="bar")
    if line.words in CONTENTS_TITLES:
        return line._replace(kind="title")
    hrefs = tuple({one.href for one in inside})
    if not hrefs or any(one.is_heading for one in inside) or line.chars > ENTRY_CHARS:
        return line
    if any(URL.match(href) or notes.leads_to_notes(href) for href in hrefs):
        return line
    if not any(map(_words, outside)):
        return line._replace(kind="entry" if len(hrefs) == 1 else "row", hrefs=hrefs, may_be_bar=is_bar)
    is_mixed = (links[start] or not _words(outside[0])) and any(map(_words, inside.values()))
    return line._replace(kind="mixed", hrefs=hrefs) if is_mixed and len(hrefs) == 1 else line


def _is_bar(inside: Mapping[Link, str], outside: list[str]) -> bool:
    """Whether links, each with its text, are a bar. outside: the texts beside them."""
    labels = [text for text in outside if _words(text)]
    if labels or all(one.is_step for one in inside):  # Next: the title of the next page
        return all(BAR_WORDS.fullmatch(_words(text)) and text.rstrip().endswith(":") for text in labels)
    is_numbers = len(inside) >= FEWEST_ENTRIES and not any(map(_words, inside.values()))  # as for chapters
    return is_numbers or all(map(_is_step, inside.values()))


def _is_framed(pieces: list[str], links: Sequence[Link | None], start: int, stop: int) -> bool:
    """Whether a line is a title between a link back and one onward."""
    ends = [_words(pieces[i]) for i in (start, stop - 1) if links[i]]
    return len(ends) == 2 and links[start] != links[stop - 1] and all(map(SURE_BAR_WORDS.fullmatch, ends))


def _is_step(text: str) -> bool:
    words = _words(text)
    return bool(
        BAR_WORDS.fullmatch(words) or (not words and set(text) & set(ARROWS)) or (words and STEP_TITLE.match(text))
    )


def _is_sure(words: str) -> bool:
    """Whether the words of a line that is one link lead on, and are no title; "": an arrow does."""
    return not words or SURE_BAR_WORDS.fullmatch(words) is not None


def _words(text: str) -> str:
    """The words of `text` alone, without numbers."""
    return " ".join(re.findall(r"[^\W\d_]+", text.casefold()))


def _tables(lines: list[_Line], places: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    """Where tables of contents start and stop: lines that are links to different places which bear the links' names.

    Under a title that says so, the places are not looked at, a line may end with other text, and there may be headings.
    """
    chars = Counter[str]()
    for line in lines:
        chars[line.kind] += line.chars
    is_list = chars["entry"] > chars["row"] + chars["mixed"] + chars["text"]  # the whole page
    i = 0
    while i < len(lines):
        is_titled = lines[i].kind == "title"
        last = stop = i + is_titled
        entries: list[_Line] = []
        while stop < len(lines) and stop - last < (3 if is_titled else 1):
            kind = lines[stop].kind
            if kind == "entry" or (kind in ("row", "mixed") and is_titled and stop == last):
                entries.append(lines[stop])
                last = stop + 1
            elif kind == "bar" and stop == last:
                last += 1
            stop += 1
        hrefs = {href for entry in entries for href in entry.hrefs}
        is_sure = is_titled and not any(entry.kind == "mixed" for entry in entries)
        is_table = len(hrefs) >= (FEWEST_TITLED if is_sure else FEWEST_ENTRIES) and 2 * len(hrefs) >= len(entries)
        if not is_titled:  # a sentence may introduce it, and some of its lines may say more
            is_table &= not (i and (lines[i - 1].introduces or lines[i - 1].kind == "mixed"))
            is_table &= last == len(lines) or lines[last].kind != "mixed"
        named = sum(_is_named(entry, lines, places, is_list) for entry in entries) if is_table and not is_titled else 0
        if is_table and (is_titled or 2 * named >= len(entries)):
            yield i, last
        i = max(last, i + 1)


def _is_named(entry: _Line, lines: list[_Line], places: Mapping[str, int], is_list: bool) -> bool:
    """Whether an entry leads to a line that begins as it does, or else to another page from a list of such links."""
    (href,) = entry.hrefs
    if href.partition("#")[0]:
        return is_list
    place = places.get(notes.target(href), -1)
    at = bisect.bisect_left(lines, place, key=lambda line: line.stop)
    near = [line.words for line in lines[at : at + 3]] if place >= 0 else []
    return any(words and (words.startswith(entry.words) or entry.words.startswith(words)) for words in near)
