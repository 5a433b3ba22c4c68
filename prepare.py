"""Turn books into token ids: a corpus in; train.bin, val.bin, test.bin (uint16) and meta.json out.

python prepare.py data/robopoet
python prepare.py my/*.txt --out=data/mine
python prepare.py my/folder --out=data/mine --tokenizer=gpt2

Each pass over the documents holds a few of them at a time, so that a corpus may be larger than memory.
"""

import contextlib
import hashlib
import json
import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import configurator
from configurator import ConfigError
from robopoet.errors import CheckpointError, DataError
from robopoet.text import batches, corpus, sources, tokenizer
from robopoet.text.batches import FORMAT, Meta, Span, SplitMeta
from robopoet.text.tokenizer import END, UNKNOWN, BPETokenizer, CharTokenizer, Tokenizer
from robopoet.weights import checkpoint

KINDS = ("bpe", "char", "gpt2")  # of tokenizers


@dataclass(frozen=True)
class PrepareConfig:
    """The keys of prepare.py."""

    corpus: str = ""  # folder that holds a corpus.yaml (--input takes it too)
    input: tuple[str, ...] = ()  # your own .txt, .jsonl, .jsonl.gz, as files, globs, folders; or a corpus; repeatable
    out: str = ""  # where the bins go (a corpus's own folder unless given)
    tokenizer: str = "bpe"  # bpe (trained on this text), char, gpt2 (GPT-2's table), or a checkpoint, to have its own
    vocab_size: int = 6725  # ids in all, special tokens included (bpe only)
    force: bool = False  # prepare even if nothing has changed

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = configurator.bounds(self, "vocab_size", 1, 65_536)  # ids are stored as uint16
        if bool(self.corpus) == bool(self.input):
            found.append("name either a corpus folder, as data/robopoet, or --input='my/*.txt'")
        elif not self.out and not self.folder:
            try:
                corpus.manifest_of_files(self.input)
            except DataError as e:
                found.append(str(e))
            name = corpus.style_name(self.input[0])
            found.append(f"out: is missing; say where the bins go, as --out=data/{name}")
        return found

    @property
    def folder(self) -> str:
        """The folder with a corpus.yaml that is prepared, here or beside the scripts, or "" where it is texts."""
        named = self.corpus or (self.input[0] if len(self.input) == 1 else "")
        manifest = configurator.beside_scripts(os.path.join(named, "corpus.yaml"))
        return str(manifest.parent) if named and manifest.exists() else self.corpus


def main(cfg: PrepareConfig) -> None:
    """Prepare the corpus, or do nothing if it is prepared already."""
    # --- where the texts come from
    manifest = corpus.read_manifest(Path(cfg.folder)) if cfg.folder else corpus.manifest_of_files(cfg.input)
    out = Path(cfg.out or cfg.folder)
    given = None if cfg.tokenizer in KINDS else _read_tokenizer(Path(cfg.tokenizer))
    fingerprint = _fingerprint(cfg, manifest, given)
    if not cfg.force and _is_prepared(out, fingerprint):
        print(f"{out} is prepared already (--force does it again)")
        return

    # --- how many documents there are, and of what
    seen = corpus.survey(_progress(corpus.documents(manifest), "reading"))
    if manifest.text_sha256 not in ("", seen.text_sha256):
        raise DataError(
            f"{cfg.folder}/corpus.yaml: text_sha256: the cleaned text's hash is {seen.text_sha256}, "
            "not the one pinned; if you changed the sources or the cleaning on purpose, pin the new one"
        )

    for warning in () if manifest.text_sha256 else seen.warnings:  # who pinned a text has looked at it
        configurator.warn(warning)

    # --- tokenizer: learns from the train split alone
    styles = seen.styles if manifest.tags else []
    specials = ([END] if seen.n_documents > 1 or styles else []) + [tokenizer.style_token(style) for style in styles]
    tok: Tokenizer
    if given:
        tok = _extended(given, specials, seen.characters)
    elif cfg.tokenizer == "bpe":
        parts = _parts(manifest, seen, "learning")
        tok = BPETokenizer.train((text for part, text in parts if part.split == "train"), cfg.vocab_size, specials)
    elif cfg.tokenizer == "char":
        tok = CharTokenizer.train([seen.characters], specials)
    else:
        tok = BPETokenizer.gpt2(specials)
    if tok.vocab_size > 65_536:
        raise DataError(f"the vocabulary has {tok.vocab_size} ids, must have at most 65,536; use --tokenizer=bpe")

    # --- bins, then meta.json, each whole or not at all
    out.mkdir(parents=True, exist_ok=True)
    for name in ("meta.json", "meta.pkl"):  # from here until the new one stands, the folder is not prepared
        (out / name).unlink(missing_ok=True)
    meta = Meta(
        format=FORMAT,
        fingerprint=fingerprint,
        text_sha256=seen.text_sha256,
        vocab_size=tok.vocab_size,
        styles=tokenizer.styles(tok) if styles else {},
        licences=tuple(sorted({f"{source.style}: {source.licence}" for source in manifest.sources})),
        splits=_write_bins(out, _parts(manifest, seen, "encoding"), tok, seen.n_documents > corpus.MANY_DOCUMENTS),
        tokenizer=tok.saved(),
    )
    if isinstance(tok, CharTokenizer):  # where nanoGPT's scripts look for the characters
        stoi = {char: id for id, char in enumerate(tok.chars)} | tok.specials
        itos = {id: char for char, id in stoi.items()}
        _write(out / "meta.pkl", pickle.dumps({"vocab_size": tok.vocab_size, "itos": itos, "stoi": stoi}))
    _write(out / "meta.json", batches.encode_meta(meta))
    _report(out, seen, meta)


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint; raises ConfigError when there is none."""
    try:
        return checkpoint.tokenizer_of(checkpoint.load(path), path)
    except CheckpointError as e:
        raise ConfigError(f"tokenizer: must be {', '.join(KINDS)} or a checkpoint; {e}") from None


def _extended(given: Tokenizer, specials: list[str], characters: str) -> Tokenizer:
    """A tokenizer with these specials behind its own; raises DataError when it doesn't know a character."""
    saved = given.to_json()
    saved["specials"] += [name for name in specials if name not in given.specials]
    tok = tokenizer.from_json(saved)
    if UNKNOWN not in tok.specials and (unknown := tok.unknown(characters)):
        raise DataError(f"tokenizer: does not know {', '.join(map(repr, unknown))}; remove them from the text")
    return tok


def _fingerprint(cfg: PrepareConfig, manifest: corpus.Manifest, given: Tokenizer | None) -> str:
    """A hash of all that the result depends on: options, a tokenizer that was given, manifest, the user's files."""
    anywhere = replace(manifest, folder=Path("."))
    digest = hashlib.sha256(f"{FORMAT} {cfg.tokenizer} {cfg.vocab_size} {anywhere}".encode())
    if given:
        digest.update(json.dumps(given.to_json()).encode())
    for source in manifest.sources:
        if source.file:
            for path in sources.files(source, manifest.folder):
                digest.update(f"{os.path.basename(path)} {sources.file_sha256(path)}".encode())
    return digest.hexdigest()


def _is_prepared(out: Path, fingerprint: str) -> bool:
    try:
        meta = batches.read_meta(out)
        for name in batches.SPLITS:
            batches.check_bin(out, name, meta)
        return meta.fingerprint == fingerprint
    except DataError:
        return False


class Part(NamedTuple):
    """What one split has of a document."""

    number: int  # of the document
    name: str
    style: str
    split: str


def _progress(docs: Iterable[corpus.Document], doing: str, total: int | None = None) -> Iterable[corpus.Document]:
    return tqdm(docs, desc=doing, total=total, unit=" works", delay=1, disable=None, leave=False)


def _parts(manifest: corpus.Manifest, seen: corpus.Survey, doing: str) -> Iterator[tuple[Part, str]]:
    """The parts of all documents, read once more; raises DataError if these are not the documents that were seen."""
    exact = all(source.clean == "none" for source in manifest.sources)
    digest = hashlib.sha256()
    for i, doc in enumerate(_progress(corpus.documents(manifest), doing, seen.n_documents)):
        corpus.hash_document(digest, doc)
        for split, text in corpus.split(doc, seen.n_documents, manifest.splits, exact):
            yield Part(i, doc.name, doc.style, split), text
    if digest.hexdigest() != seen.text_sha256:
        raise DataError("the texts have changed while they were read; run prepare.py again")


def _write_bins(out: Path, parts: Iterator[tuple[Part, str]], tok: Tokenizer, many: bool) -> dict[str, SplitMeta]:
    """Write each split's bin, all or none, its documents parted by <|endoftext|>; returns what meta.json says of them.

    many: in place of a span for each document there is one for each run of documents of one style, and the id at which
    batches.py parts them.
    """
    end = [np.array([tok.specials[END]])] if END in tok.specials else []
    sizes = {name: {"tokens": 0, "largest": 0, "characters": 0, "bytes": 0} for name in corpus.SPLITS}
    documents: dict[str, list[Span]] = {name: [] for name in corpus.SPLITS}

    def counted() -> Iterator[tuple[Part, str]]:
        for part, text in parts:
            sizes[part.split]["characters"] += len(text)
            sizes[part.split]["bytes"] += len(text) if text.isascii() else len(text.encode())
            yield part, text

    unfinished = {name: out / f"{name}.bin.part" for name in corpus.SPLITS}
    try:
        with contextlib.ExitStack() as stack:
            bins = {name: stack.enter_context(open(path, "wb", 2**20)) for name, path in unfinished.items()}
            for part, pieces in groupby(tokenizer.encode_all(tok, counted()), key=itemgetter(0)):
                size, spans = sizes[part.split], documents[part.split]
                start = size["tokens"]
                for ids in chain((ids for _, ids in pieces), end):
                    bins[part.split].write(ids.astype("<u2"))
                    size["tokens"] += len(ids)
                    size["largest"] = max(size["largest"], int(ids.max(initial=0)))
                if many and spans and spans[-1].style == part.style:
                    spans[-1] = replace(spans[-1], stop=size["tokens"], works=spans[-1].works + 1)
                else:
                    spans.append(Span(part.name, part.style, start, size["tokens"]))
        if not sizes["train"]["tokens"]:
            raise DataError("the corpus leaves nothing to train on; add text")
        last = tok.specials[END] if many else -1
        entries = {
            name: SplitMeta(**sizes[name], sha256=batches.bin_sha256(path), documents=tuple(documents[name]), end=last)
            for name, path in unfinished.items()
        }
        for name, path in unfinished.items():
            os.replace(path, out / f"{name}.bin")
    finally:
        for path in unfinished.values():
            path.unlink(missing_ok=True)
    return entries


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _report(out: Path, seen: corpus.Survey, meta: Meta) -> None:
    kept, raw, styles = seen.letters, seen.raw_letters, ", ".join(meta.styles)
    print(f"{out}: {seen.n_documents:,} works, vocabulary {meta.vocab_size:,}, styles: {styles or 'none'}")
    print(f"cleaning kept {kept / max(raw, 1):.2%} of the letters, removed {raw - kept:,}")
    print(f"{'split':>8} {'works':>6} {'characters':>12} {'tokens':>12} {'chars/token':>12} {'bytes/token':>12}")
    for name, split in meta.splits.items():
        tokens, works = max(split.tokens, 1), sum(span.works for span in split.documents)
        print(
            f"{name:>8} {works:>6,} {split.characters:>12,} {split.tokens:>12,} "
            f"{split.characters / tokens:>12.2f} {split.bytes / tokens:>12.2f}"
        )


if __name__ == "__main__":
    configurator.launch(main, PrepareConfig, DataError, positional="input")
