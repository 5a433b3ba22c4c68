"""The pages of an EPUB in reading order, found as reading programs find them, for many a book is not quite EPUB.

Every archive is untrusted: no entity is expanded, nothing is fetched or looked for outside of the archive, and nothing
unpacks to more than BOOK_BYTES.
"""

import codecs
import contextlib
import html.entities
import io
import posixpath
import re
import unicodedata
import urllib.parse
import zipfile
from collections.abc import Generator
from typing import Literal, NamedTuple

from robopoet.errors import DataError, describe
from robopoet.text.encodings import is_utf8

UNPACKED, UNPACKED_FLOOR = 100, 2**20  # a packed file may unpack to this many times its size, plus these bytes
BOOK_BYTES = 50 * 2**20  # the Bible, the longest of books, has 5 MB
MOST_MEMBERS, MEMBER = 20_000, b"PK\1\2"  # files in an archive; how the record of each begins
MOST_PATH = 1000  # characters of a path in an archive
FONT_OBFUSCATION = {"http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC"}  # not of the text

CONTAINER, ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
PAGE_NAMES = (".html", ".htm", ".xhtml", ".xht")
NOT_TEXT = (
    "image/",
    "audio/",
    "video/",
    "font/",
    "text/css",
    "text/javascript",
    "application/javascript",
    "application/x-dtbncx",
)
Role = Literal["chapter", "contents", "cover", "aside", "unlisted", "unread"]  # what a page is: see Page
GUIDE: dict[str, Role] = {"cover": "cover", "copyright-page": "aside", "toc": "contents"}
GUIDE |= {"lot": "contents", "loi": "contents"}
# the name of a page that a reading program shows beside the book, where the spine says that it is not in line with it
ASIDE = re.compile(r"(?:^|[^a-z])(?:(?:foot|end)?notes?|nav|toc|contents|cover|copyright|adverts?)(?![a-z])", re.I)


class Page(NamedTuple):
    """A file of an EPUB that may hold text.

    role: "chapter"; "contents" or "cover", if the book calls it that; "aside", if it is not in line with the work;
    "unlisted", if the reading order lacks it; "unread", if it is not in the archive or no text. is_markup: else plain.
    """

    path: str
    role: Role
    content: bytes = b""
    is_markup: bool = True


class Book(NamedTuple):
    """pages: each file with text once, those of the spine in order, then the others. sheets: by their sheet_key."""

    pages: list[Page]
    sheets: dict[str, bytes]


def sheet_key(page: str, href: str) -> str:
    """Under which key a book has the style sheet that its file `page` means by `href`."""
    path = urllib.parse.unquote(re.split("[?#]", href[:MOST_PATH], maxsplit=1)[0])
    return _key(posixpath.join(posixpath.dirname(page), path))


def read_book(name: str, content: bytes) -> Book:
    """The pages and style sheets of the EPUB `name`; raises DataError."""
    with opened(name, content, "EPUB") as members:
        return _book_of(name, members)


@contextlib.contextmanager
def opened(name: str, content: bytes, kind: str) -> Generator["Members"]:
    """The members of the archive `name`; whatever reading them raises becomes a DataError. kind: what it should be."""
    if (members := content.count(MEMBER)) > MOST_MEMBERS:  # zipfile would make an object of each
        raise DataError(f"{name}: holds {members:,} files, may hold at most {MOST_MEMBERS:,}; refused")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield Members(name, archive, len(content))
    except DataError:
        raise
    except Exception as e:  # on damage, zipfile and lxml raise a dozen classes
        raise DataError(f"{name}: is damaged or no {kind} ({describe(e)}); get the file again") from None


class Members:
    """The files in an archive, read up to a limit for all of them."""

    def __init__(self, name: str, archive: zipfile.ZipFile, size: int):
        self.name, self.archive = name, archive
        self.left = min(BOOK_BYTES, UNPACKED * size + UNPACKED_FLOOR)
        paths = [info.filename for info in archive.infolist() if not info.is_dir()]
        self.paths = [path for path in paths if not path.startswith("__MACOSX/")]
        self.of_key: dict[str, str] = {}
        for info in archive.infolist():
            for path in (info.filename, _as_utf8(info.filename)):
                self.of_key.setdefault(_key(path), info.filename)

    def find(self, *paths: str) -> str:
        """The member that the first of `paths` to be found means, be it spelt otherwise; "" if there is none."""
        exact = (path for path in paths if path in self.archive.NameToInfo)
        alike = (self.of_key[key] for key in map(_key, paths) if key in self.of_key)
        return next(exact, "") or next(alike, "")

    def read(self, member: str) -> bytes:
        if self.archive.getinfo(member).flag_bits & 1:
            raise DataError(f"{self.name}: {member[:200]} is encrypted; get a copy that needs no password")
        with self.archive.open(member) as f:
            content = f.read(self.left + 1)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.name}: unpacks to over {BOOK_BYTES:,} bytes, or {UNPACKED} times its size; refused")
        return content

    def elements(self, member: str) -> list[tuple[str, dict[str, str]]]:
        """The elements of an XML file that may be flawed, each with its name and attributes, without namespaces."""
        from lxml import etree  # a tenth of a second, for those who need it

        content = self.read(member)
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"<\0")):
            content = content.decode("utf-16", "replace").encode()
        content = content.removeprefix(codecs.BOM_UTF8).lstrip()
        content = mended(content)
        encoding = "utf-8" if is_utf8(content) else None  # None: what the file declares
        parser = etree.XMLParser(
            target=_Elements(), encoding=encoding, resolve_entities=False, no_network=True, recover=True
        )
        parser.feed(content)
        return parser.close()


def _as_utf8(path: str) -> str:
    """The path in an archive whose maker wrote UTF-8 without saying so, which zipfile reads as cp437."""
    try:
        return path.encode("cp437").decode()
    except UnicodeError:
        return path


def _key(path: str) -> str:
    """What two spellings of a path in an archive have in common."""
    path = urllib.parse.unquote(path[:MOST_PATH]).replace("\\", "/")
    path = posixpath.normpath("/" + path).lstrip("/")
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def mended(content: bytes) -> bytes:
    """XML whose authors took it for HTML, with each & and < as XML has it."""
    return re.sub(rb"<(?![\w/!?])|&(?:(\w{1,32});|(?!#))", _reference, content)


def _reference(match: re.Match[bytes]) -> bytes:
    """A mark as XML has it: HTML's names of characters become numbers, and & and < that stand for themselves names."""
    if match[1] is None:
        return b"&lt;" if match[0] == b"<" else b"&amp;"
    entity = match[1].decode("latin-1")
    if entity in ("amp", "lt", "gt", "quot", "apos") or entity not in html.entities.name2codepoint:
        return match[0]
    return b"&#%d;" % html.entities.name2codepoint[entity]


class _Elements:
    """Collects the elements that lxml's parser finds (its target interface)."""

    def __init__(self) -> None:
        self.found: list[tuple[str, dict[str, str]]] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.found.append((local_name(tag), {local_name(key): _value(value) for key, value in attributes.items()}))

    def close(self) -> list[tuple[str, dict[str, str]]]:
        return self.found


def _value(attribute: str) -> str:
    return attribute.replace("&#38;", "&").strip()  # lxml leaves this one as it is where it resolves no entities


def local_name(name: str) -> str:
    return re.split("[}:]", name)[-1].lower()


def _book_of(name: str, members: Members) -> Book:
    """The pages, in the order that the package gives (EPUB 3.3, sections 4.2.6.3 and 5), and the style sheets."""
    root, package = _package(name, members)
    items: dict[str, dict[str, str]] = {}
    manifest = [a for tag, a in package if tag == "item" and "href" in a]
    for key in ("id", "href"):
        for a in manifest:
            if key in a:
                items.setdefault(a[key].casefold(), a)
    guide: dict[str, Role] = {}
    for tag, a in package:
        if tag == "reference" and (named := GUIDE.get(a.get("type", "").lower())):
            guide[_find(members, root, a.get("href", ""))] = named
    found: dict[str, Page] = {}
    spine = {a.get("idref", ""): a for tag, a in package if tag == "itemref"}  # each once
    if not spine:
        raise DataError(f"{name}: is damaged or no EPUB (its package lists no chapters); get the file again")
    for idref, a in spine.items():
        item = _shown(items, idref)
        if item is None:
            continue
        href = item["href"]
        if re.match(r"https?:", href, re.I):
            found[href] = Page(href[:MOST_PATH], "unread", is_markup=False)
            continue
        path, media = _find(members, root, href), item.get("media-type", "").lower()
        is_text = path.lower().endswith(PAGE_NAMES) or (path and "svg" in media) or not media.startswith(NOT_TEXT)
        if path in found or not is_text:
            continue
        if not path:
            place = posixpath.normpath(posixpath.join(posixpath.dirname(root), urllib.parse.unquote(href)))
            raise DataError(f"{name}: lacks {place[:200]!r}, which it names; get the file again")
        role: Role = "contents" if "nav" in item.get("properties", "").split() else "chapter"
        role = guide.get(path, role)
        if a.get("linear", "").lower() == "no" and ASIDE.search(posixpath.basename(path)):
            role = "aside"
        found[path] = _page(members, path, role, media)
    listed = {_find(members, root, a["href"]): a for a in manifest}
    sheets: dict[str, bytes] = {}
    for path in members.paths:
        item = listed.get(path, {})
        media = item.get("media-type", "").lower()
        is_page = "html" in media or media == "text/plain" or path.lower().endswith(PAGE_NAMES)
        if is_page and path not in found and "nav" not in item.get("properties", "").split():
            found[path] = _page(members, path, "unlisted", media)
        elif media == "text/css" or path.lower().endswith(".css"):
            sheets[_key(path)] = members.read(path)
    return Book(list(found.values()), sheets)


def _package(name: str, members: Members) -> tuple[str, list[tuple[str, dict[str, str]]]]:
    """The path of the book's package, which lists its files, and the elements of that."""
    folders = sorted((path for path in members.paths if _key(path).endswith(_key(CONTAINER))), key=len)
    folder = folders[0][: -len(CONTAINER)] if folders else ""  # often the zip holds a folder that holds the book
    if encryption := members.find(folder + ENCRYPTION):
        listed = members.elements(encryption)
        if not {a.get("algorithm") for tag, a in listed if tag == "encryptionmethod"} <= FONT_OBFUSCATION:
            raise DataError(f"{name}: is encrypted (DRM), so it can't be read; get a copy without it")
    roots: list[str] = []
    if folders:
        listed = [a.get("full-path", "") for tag, a in members.elements(folders[0]) if tag == "rootfile"]
        roots = [root for path in listed if (root := members.find(folder + path, path))]
        roots.sort(key=lambda root: not root.lower().endswith(".opf"))  # a book may be there as a PDF, too
    roots += sorted((path for path in members.paths if path.lower().endswith(".opf")), key=len)
    if not roots:
        raise DataError(f"{name}: is damaged or no EPUB (no .opf file lists its chapters); get the file again")
    return roots[0], members.elements(roots[0])


def _find(members: Members, root: str, href: str) -> str:
    """The member that the package at `root` means by `href`; "" if there is none."""
    folder, href = posixpath.dirname(root.replace("\\", "/")), href.replace("\\", "/")
    for path in (href, re.split("[?#]", href, maxsplit=1)[0]):
        names = [urllib.parse.unquote(path[:MOST_PATH], encoding) for encoding in ("utf-8", "latin-1")]
        places = [posixpath.normpath(posixpath.join(folder, name)) for name in names]
        if path and (found := members.find(*places, path.lstrip("/"), posixpath.join(folder, path.lstrip("/")))):
            return found
    return ""


def _shown(items: dict[str, dict[str, str]], idref: str) -> dict[str, str] | None:
    """The item that is shown for `idref`: itself, or a page that the book has in its stead, as for an image."""
    item = first = items.get(idref.casefold())
    seen = set()
    while item and not _is_text(item) and item.get("fallback") and item["fallback"] not in seen:
        seen.add(item["fallback"])
        item = items.get(item["fallback"].casefold())
    return item if item and _is_text(item) else first


def _is_text(item: dict[str, str]) -> bool:
    media = item.get("media-type", "").lower()
    return not media or "html" in media or "xml" in media.partition("+")[0] or media.startswith("text/")


def _page(members: Members, path: str, role: Role, media: str) -> Page:
    """The member at `path`, if it holds text, whatever its media type says."""
    content = members.read(path)
    start = content[:1000].replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")
    if re.match(rb"<[!?a-zA-Z]", start) or path.lower().endswith(PAGE_NAMES):
        return Page(path, role, content)
    is_plain = not media or media.startswith("text/") or "xml" in media
    return Page(path, role, content, is_markup=False) if is_plain else Page(path, "unread", is_markup=False)
