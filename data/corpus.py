"""A corpus: where its texts come from, how they are cleaned, and how they are split.

A manifest (`corpus.yaml`) lists sources in order. Each has a `style`, a `licence`, and one of
    file:    a path or glob beside the manifest
    url:     an address; needs `sha256`
    package: name==version on the package index, with `archive: wheel|sdist`, `sha256` and `members` (a glob inside it)
and may have `clean: text|prose|drama|none` and `remove`, a list of regular expressions. For the whole corpus there are
`splits` (shares of train, val, test), `tags` (style tags on or off) and `text_sha256`, the hash of the cleaned text.
"""

import fnmatch
import glob
import hashlib
import html
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from data import DataError

SPLITS = ("train", "val", "test")
MANY_DOCUMENTS = 200  # above this, whole documents are dealt to the splits; up to it, each is cut


@dataclass(frozen=True)
class Document:
    """One work: its name, the style it is written in, its text, and how many letters it had before cleaning."""

    name: str
    style: str
    text: str
    raw_letters: int


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
    splits: tuple[float, float, float] = (0.90, 0.05, 0.05)
    tags: bool = True
    text_sha256: str = ""


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/corpus.yaml`; raises DataError naming the key that is wrong."""
    path = folder / "corpus.yaml"
    if not path.is_file():
        raise DataError(f"{path}: not found; name a folder that holds a corpus.yaml, or use --input='my/*.txt'")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        entries = content.pop("sources")
        sources = [Source(**entry) for entry in entries]
        manifest = Manifest(folder, sources, **content)
        shares = [float(share) for share in manifest.splits]
    except yaml.YAMLError as e:
        raise DataError(f"{path}: is not YAML: {' '.join(str(e).split())}") from None
    except KeyError as e:
        raise DataError(f"{path}: has no {e.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError) as e:  # unknown or missing keys, as dataclasses report them
        raise DataError(f"{path}: {re.sub(r'^.*__init__..', '', str(e))}") from None
    if len(shares) != 3 or min(shares) < 0 or shares[0] == 0 or abs(sum(shares) - 1) > 1e-9:
        raise DataError(f"{path}: splits: found {manifest.splits}, must be three shares that sum to 1, train above 0")
    for source in sources:
        if source.clean not in CLEANERS:
            raise DataError(f"{path}: clean: found {source.clean!r}, must be one of {', '.join(CLEANERS)}")
        if sum(map(bool, (source.file, source.url, source.package))) != 1:
            raise DataError(f"{path}: style {source.style}: must have just one of file, url, package")
        if (source.url or source.package) and not source.sha256:
            raise DataError(f"{path}: style {source.style}: sha256 is missing; what is downloaded must be pinned")
    return manifest


def manifest_of_files(patterns: tuple[str, ...]) -> Manifest:
    """The manifest of a user's own files: each is a source whose style is the file's stem; raises DataError if none."""
    paths = sorted({path for pattern in patterns for path in glob.glob(pattern, recursive=True)})
    if not paths:
        raise DataError(f"--input: no file matches {' '.join(patterns)}")
    sources = [Source(style=_style_name(Path(path).stem), file=os.path.abspath(path)) for path in paths]
    return Manifest(Path("."), sources, tags=1 < len({source.style for source in sources}) <= MANY_DOCUMENTS)


def _style_name(stem: str) -> str:
    return re.sub(r"\W+", "_", stem.lower()).strip("_") or "text"


# ---------------------------------------------------------------------------------------------------------------------
# reading


def raw_texts(source: Source, folder: Path) -> Iterator[tuple[str, bytes]]:
    """Each text of `source` as (name, bytes), downloads checked against their hash and kept in `folder/raw`.

    Raises DataError when a text can't be had or is not the one that was pinned.
    """
    if source.file:
        paths = sorted(glob.glob(os.path.join(folder, source.file), recursive=True))
        if not paths:
            raise DataError(f"{os.path.join(folder, source.file)}: no such file")
        for path in paths:
            if not os.path.isfile(path):
                raise DataError(f"{path}: is not a file; name text files, as in --input='{path}/*.txt'")
            content = Path(path).read_bytes()
            if source.sha256:
                _check(path, content, source.sha256)
            yield Path(path).stem, content
        return
    name = source.url.rsplit("/", 1)[-1] if source.url else f"{source.package}.{source.archive}"
    kept = folder / "raw" / name
    content = kept.read_bytes() if kept.is_file() else b""
    if hashlib.sha256(content).hexdigest() != source.sha256:
        content = _download(source)
        _check(source.url or source.package, content, source.sha256)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.with_suffix(".part").write_bytes(content)
        os.replace(kept.with_suffix(".part"), kept)
    if source.url:
        yield Path(name).stem, content
        return
    members = sorted(_members(source, content))
    if not members:
        raise DataError(f"{source.package}: holds no {source.members}")
    yield from members


def _check(name: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise DataError(f"{name}: SHA-256 is {found}, the manifest pins {sha256}; it is another text: refused")


def _download(source: Source) -> bytes:
    if source.url:
        try:
            with urllib.request.urlopen(source.url, timeout=60) as reply:
                return reply.read()
        except OSError as e:
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
                yield Path(name).stem, wheel.read(name)
    else:
        with tarfile.open(fileobj=io.BytesIO(archive)) as sdist:
            for member in sdist:
                if member.isfile() and fnmatch.fnmatchcase(member.name, source.members):
                    yield Path(member.name).stem, sdist.extractfile(member).read()


def documents(manifest: Manifest) -> Iterator[Document]:
    """Every work of the corpus, cleaned, in the manifest's order; raises DataError naming one that can't be read."""
    for source in manifest.sources:
        for name, content in raw_texts(source, manifest.folder):
            try:
                raw = content.decode("utf-8-sig" if source.clean != "none" else "utf-8")
            except UnicodeDecodeError as e:
                raise DataError(f"{source.file or name}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
            text = raw
            for pattern in source.remove:
                text = re.sub(pattern, "", text)
            text = CLEANERS[source.clean](text)
            if not text:
                raise DataError(f"{source.file or name}: holds no text")
            yield Document(name, source.style, text, count_letters(raw))


def count_letters(text: str) -> int:
    """How many letters there are, of any script."""
    return sum(map(str.isalpha, text))


# ---------------------------------------------------------------------------------------------------------------------
# cleaning

GUTENBERG_START = re.compile(
    r"^.*(?:\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)|\*END\*THE SMALL PRINT!).*$", re.M
)
GUTENBERG_END = re.compile(r"^\s*(?:\*\*\* ?)?END OF (?:THE |THIS )?PROJECT GUTENBERG.*$", re.M | re.I)
GUTENBERG_CREDIT = re.compile(r"\A\s*(?:(?:E-text )?(?:produced|prepared|transcribed) by\b.*\n(?:.+\n)*)", re.I)


def clean_text(text: str) -> str:
    """Any text: LF line ends, no Project Gutenberg licence, no trailing blanks, one blank line between paragraphs."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x1a", "")
    for start in GUTENBERG_START.finditer(text):
        text = GUTENBERG_CREDIT.sub("", text[start.end() :])
        break
    if end := GUTENBERG_END.search(text):
        text = text[: end.start()]
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n" if text.strip() else ""


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
    text = html.unescape(text).replace("& c", "&c")
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


def split(docs: list[Document], shares: tuple[float, ...], exact: bool) -> dict[str, list[tuple[Document, str]]]:
    """Deal `docs` to train, val and test as (document, its text there); every character goes to just one split.

    Up to MANY_DOCUMENTS each document is cut in three, at a blank line (`exact`: at the very character); of more,
    whole documents are dealt by the hash of name and text.
    """
    dealt: dict[str, list[tuple[Document, str]]] = {name: [] for name in SPLITS}
    for doc in docs:
        if len(docs) > MANY_DOCUMENTS:
            digest = hashlib.sha256(f"{doc.name}\0{doc.text}".encode()).digest()
            place = int.from_bytes(digest[:8], "big") / 2**64
            name = SPLITS[(place >= shares[0]) + (place >= shares[0] + shares[1])]
            dealt[name].append((doc, doc.text))
            continue
        first = _cut(doc.text, shares[0], exact)
        second = max(first, _cut(doc.text, shares[0] + shares[1], exact))
        for name, part in zip(SPLITS, (doc.text[:first], doc.text[first:second], doc.text[second:]), strict=True):
            if part:
                dealt[name].append((doc, part))
    return dealt


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


def text_sha256(docs: list[Document]) -> str:
    """The hash of the whole cleaned corpus: names, styles and texts in order."""
    digest = hashlib.sha256()
    for doc in docs:
        digest.update(f"{doc.name}\0{doc.style}\0{doc.text}\0".encode())
    return digest.hexdigest()
