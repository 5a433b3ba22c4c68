"""Books as people have them: plain text in any encoding, HTML and EPUB.

Every file is untrusted: no entity is expanded, nothing is fetched.
"""

import codecs
import contextlib
from functools import partial
from pathlib import PurePath
from typing import NamedTuple

import charset_normalizer
from charset_normalizer.utils import any_specified_encoding

from robopoet.errors import DataError
from robopoet.text import epub
from robopoet.text.cleaning import count_letters
from robopoet.text.layout import LaidOut
from robopoet.text.markup import lay_out
from robopoet.text.styles import Sheets

HTML = (".html", ".htm", ".xhtml")
CONVERTED = {
    ".pdf": "pdftotext -layout FILE.pdf FILE.txt",
    **dict.fromkeys((".mobi", ".azw", ".azw3", ".fb2", ".docx", ".odt", ".rtf"), "Calibre's ebook-convert"),
    ".doc": "soffice --convert-to docx, then Calibre's ebook-convert",
}  # what makes a .txt or an .epub of these
ENOUGH = 8  # bytes beyond ASCII from which an encoding can be told
COVER_LETTERS = 200  # the most on a cover; a longer page holds more than that


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
    layout = lay_out(text, name)
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


def _epub(name: str, content: bytes, losses: dict[str, Loss]) -> str:
    """The text of an EPUB's chapters, in the order of its spine; `losses` gets each file that is not in it whole."""
    chapters, others, note_ids = [], [], set[str]()
    laid_out: list[tuple[epub.Page, str, LaidOut]] = []
    book = epub.read_book(name, content)
    sheets = Sheets(book.sheets, epub.sheet_key)
    for page in book.pages:
        place, source, layout = f"{name}: {page.path}", "", LaidOut()
        try:
            source, _ = decode(place, page.content)
            if page.is_markup:
                layout = lay_out(source, place, find=partial(sheets.named, page.path))
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
