"""Books as people have them: plain text in any encoding, HTML, EPUB, and writers' manuscripts.

Every file is untrusted: nothing is fetched, and of the entities that a page declares only short ones are expanded.
"""

import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import PurePath
from types import MappingProxyType
from typing import NamedTuple

from robopoet.errors import DataError
from robopoet.text import encodings, epub, manuscripts
from robopoet.text.cleaning import count_letters, tell_controls
from robopoet.text.layout import LaidOut
from robopoet.text.markup import lay_out
from robopoet.text.styles import Sheets

HTML = (".html", ".htm", ".xhtml")
# how a page begins, whatever its name
PAGE = re.compile(r"\ufeff?\s*(?:<\?xml[^>]{0,200}>\s*)?<(?:!doctype )?html\b", re.I)
CONVERTED = {
    ".pdf": "pdftotext FILE.pdf FILE.txt",
    **dict.fromkeys((".mobi", ".azw", ".azw3"), "Calibre's ebook-convert"),
    **dict.fromkeys((".doc", ".rtf"), "soffice --convert-to docx FILE"),
}  # what makes of these what is read
STARTS = {b"%PDF-": ".pdf", b"{\\rtf": ".rtf"}  # whatever the file's name
COVER_LETTERS = 200  # the most on a cover; a longer page holds more than that


class Loss(NamedTuple):
    """How many letters of a file are not in the text of its book, and how many it holds; 0 of 0: it was not read."""

    lost: int
    held: int


def read(
    name: str,
    content: bytes,
    encoding: str = "",
    losses: dict[str, Loss] | None = None,
    page_matter: Counter[str] | None = None,
    sheets: Mapping[str, bytes] = MappingProxyType({}),
) -> tuple[str, str]:
    """The text of the file `name`, and what is to be told about its encoding, or "".

    encoding: of the file, or of an EPUB's files that are not UTF-8; "": what fits best. losses: gets each file, or one
    in an EPUB, of which the text lacks letters. page_matter: gets how much of each kind was left out. sheets: a page's
    style sheets, by their sheet_key. Raises DataError with `name`.
    """
    losses = {} if losses is None else losses
    page_matter = Counter() if page_matter is None else page_matter
    suffix = PurePath(name).suffix.lower()
    kind = suffix if suffix in CONVERTED else next((STARTS[start] for start in STARTS if content.startswith(start)), "")
    if kind:
        raise DataError(f"{name}: is no text; convert it first, with {CONVERTED[kind]}")
    if suffix == ".epub":
        return _epub(name, content, encoding, losses, page_matter)
    if name.lower().endswith(manuscripts.MANUSCRIPTS):
        found = manuscripts.read_manuscript(name, content, encoding)
        losses |= {path: Loss(*loss) for path, loss in found.lost.items()}
        page_matter.update(found.counts)
        return found.text, found.told
    text, told = encodings.decode(name, content, encoding)
    if suffix not in HTML and not PAGE.match(text):
        return text, told
    text, told = _without_zeros(text, told)
    layout = lay_out(text, name, find=partial(Sheets(sheets, epub.sheet_key).named, name))
    page_matter.update(layout.counts)
    if layout.lost:
        losses[name] = Loss(layout.lost, layout.letters + layout.lost)
    return layout.text, told


def _without_zeros(source: str, told: str) -> tuple[str, str]:
    """A page without NUL, of which its parser would make a character, and what is to be told of it."""
    return source.replace("\0", ""), tell_controls(told, source.count("\0"))


def _epub(
    name: str, content: bytes, encoding: str, losses: dict[str, Loss], page_matter: Counter[str]
) -> tuple[str, str]:
    """The text of an EPUB's chapters, in the order of its spine; the rest is as in read()."""
    chapters, others, note_ids = list[str](), list[tuple[str, str, Loss]](), set[str]()
    laid_out: list[tuple[epub.Page, str, LaidOut]] = []
    book, told = epub.read_book(name, content), list[str]()
    sheets = Sheets(book.sheets, epub.sheet_key)
    foreign = {page.path: page.content for page in book.pages if not encodings.is_utf8(page.content)}
    for page in book.pages:
        place, source, layout = f"{name}: {page.path}", "", LaidOut()
        try:
            given = encoding if page.path in foreign else ""
            source, telling = encodings.decode(place, page.content, given, foreign)
            if page.is_markup:
                source, telling = _without_zeros(source, telling)
                layout = lay_out(source, place, find=partial(sheets.named, page.path))
            told += [f"{page.path} {telling}"] if telling else []
        except DataError:
            if page.role != "unlisted":
                raise
            page = page._replace(role="unread")
        laid_out.append((page, source, layout))
        note_ids |= layout.note_ids
    for page, source, layout in laid_out:
        if not note_ids.isdisjoint(layout.undecided):
            layout = lay_out(source, f"{name}: {page.path}", note_ids, partial(sheets.named, page.path))
        text = (layout.text if page.is_markup else source).removeprefix("\ufeff").strip()
        letters = count_letters(text)
        held, unlinked = letters + layout.lost, letters - layout.linked
        if (
            page.role == "chapter"
            or (page.role == "cover" and letters > COVER_LETTERS)
            or (page.role == "contents" and layout.linked + layout.links <= unlinked)
        ):
            chapters.append(text)
            page_matter.update(layout.counts)
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
    more = f"; so are {len(told) - 1:,} more of its files" if len(told) > 1 else ""
    return "\n\n".join(filter(None, chapters)), (told[0] + more if told else "")
