"""Turn books into token ids: writes train.bin, val.bin and test.bin (uint16 ids) and meta.json.

python prepare.py data/robopoet
python prepare.py books/*.epub --out=data/mine
python prepare.py my/folder --out=data/mine --tokenizer=gpt2

The documents are read three times, a few at a time: to survey them, to train the tokenizer, to encode them. So a corpus
may be larger than memory.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from tqdm import tqdm

import configurator
from robopoet import files
from robopoet.errors import CheckpointError, ConfigError, DataError, bounds, did_you_mean, warn
from robopoet.text import corpus, dataset, sources, tokenizer
from robopoet.text.corpus import Part
from robopoet.text.dataset import FORMAT, MAX_VOCAB_SIZE, Meta, Span, SplitMeta, SplitName
from robopoet.text.tokenizer import END, UNKNOWN, BPETokenizer, CharTokenizer, Tokenizer
from robopoet.weights import bases, checkpoint
from robopoet.weights.pretrained import PRETRAINED

TOKENIZERS = ("auto", "bpe", "char", "gpt2")
SHORT, LONG = 1_000_000, 20_000_000  # bytes of texts that start from the base model, and from a pretrained one
READ, SAMPLE = 100_000, 20_000  # characters that show whether a tokenizer, and a model, suits a text
BYTES_A_TOKEN = 2.5  # a tokenizer that gets fewer from each token was made for another language


@dataclass(frozen=True)
class PrepareConfig:
    """The keys of prepare.py."""

    corpus: str = ""  # a folder with a corpus.yaml; --input takes it too
    input: tuple[str, ...] = ()  # your books: .epub .docx .odt .fb2 .html .txt .md .jsonl .parquet, globs or folders
    encoding: str = ""  # how your books are encoded, such as cp1252 (default: UTF-8, or else what fits each book best)
    out: str = ""  # where the bins go (default: the corpus's folder)
    tokenizer: str = "auto"  # bpe (trained on this text), char, gpt2, a checkpoint's; auto: the base model's, or bpe
    vocab_size: int | None = None  # number of ids, special tokens included; for bpe only (auto: fits the text's length)
    force: bool = False  # prepare even if nothing has changed

    def problems(self) -> list[str]:
        """What is wrong with these values, one per line."""
        found = bounds(self, "vocab_size", 1, MAX_VOCAB_SIZE)
        if bool(self.corpus) == bool(self.input):
            found.append("name either a corpus folder, such as data/robopoet, or --input='my/*.txt'")
        elif not self.out and not self.folder:
            try:
                corpus.manifest_of_files(self.input)
                name = corpus.style_name(self.input[0])
                found.append(f"out: is missing; say where the bins go, e.g. --out=data/{name}")
            except DataError as e:  # a corpus, which has a place for its bins, may have been meant
                found.append(str(e))
        if self.encoding and self.folder:
            found.append(f"encoding: is a key of a source in {self.folder}/corpus.yaml")
        return found

    @property
    def folder(self) -> str:
        """The folder of the corpus.yaml to prepare, here or beside the scripts; "" if `input` names texts."""
        named = self.corpus or (self.input[0] if len(self.input) == 1 else "")
        manifest = files.beside_scripts(os.path.join(named, "corpus.yaml"))
        return str(manifest.parent) if named and manifest.exists() else self.corpus


def main(cfg: PrepareConfig) -> None:
    """Prepare the corpus that `cfg` names, unless it is prepared already."""
    # --- sources
    if cfg.folder:
        manifest = corpus.read_manifest(Path(cfg.folder))
    else:
        manifest = corpus.manifest_of_files(cfg.input, cfg.encoding)
    out = Path(cfg.out or cfg.folder)
    cfg = replace(cfg, vocab_size=cfg.vocab_size or manifest.vocab_size)
    may_take_base = cfg.tokenizer == "auto" and not cfg.folder and not cfg.vocab_size
    given = None if cfg.tokenizer in TOKENIZERS else _read_tokenizer(Path(cfg.tokenizer))
    content = bases.load_base() if may_take_base else None
    base = checkpoint.tokenizer_of(content, bases.BASE) if content else None
    known = bases.at_hand() if may_take_base else ""
    fingerprint = _fingerprint(cfg, manifest, given or base, known)
    if dataset.is_prepared(out, fingerprint) and not cfg.force:
        print(f"{out} is prepared already (--force does it again)")
        return

    # --- survey: count documents, styles and characters, hash the text
    survey = corpus.survey(_documents(manifest, "reading"))
    if manifest.text_sha256 not in ("", survey.text_sha256):
        raise DataError(
            f"{cfg.folder}/corpus.yaml: text_sha256: the cleaned text's hash is {survey.text_sha256}, "
            "not the one pinned; if you changed the sources or the cleaning on purpose, pin the new one"
        )
    if not manifest.text_sha256:  # whoever pinned the text has seen the warnings
        for warning in survey.warnings:
            warn(warning)

    # --- tokenizer: trained on the train split alone
    is_short = survey.n_bytes <= SHORT
    if isinstance(given, BPETokenizer) and not _reads(given, manifest, survey):
        advice = "leave --tokenizer out for one of its own"
        warn(f"tokenizer: {cfg.tokenizer}'s was made for another language than this text's; {advice}")
    start = cfg.tokenizer if cfg.tokenizer in PRETRAINED else ""
    if known and survey.n_bytes <= LONG:
        heads = corpus.heads(_parts(manifest, survey, "trying"), {"val": SAMPLE, "train": SHORT})
        given = bases.suiting(known, heads["val"], heads["train"])
        start = known if given else ""
    if not start and base and is_short and _reads(base, manifest, survey):
        given = base
        print(f"tokenizer: of {bases.BASE}, so that train.py --minutes=N starts from its weights")
    elif may_take_base and not known and not base and survey.n_bytes <= LONG:
        print("an English text learns far more from a model that knows English: make base, then prepare it again")
    styles = corpus.tags(manifest, survey)
    ends = [END] if survey.n_documents > 1 or styles else []
    specials = ends + [tokenizer.style_token(style) for style in styles]
    tok: Tokenizer
    if given:
        tok = _with_specials(given, specials, survey.characters)
    elif cfg.tokenizer in ("auto", "bpe"):
        texts = (text for part, text in _parts(manifest, survey, "learning") if part.split == "train")
        size = cfg.vocab_size or tokenizer.fitting_vocab_size(survey.n_bytes)
        tok = BPETokenizer.train(texts, size, specials, or_fewer=not cfg.vocab_size)
    elif cfg.tokenizer == "char":
        tok = CharTokenizer.train([survey.characters], specials)
    else:
        tok = BPETokenizer.gpt2(specials)
    if tok.vocab_size > MAX_VOCAB_SIZE:
        raise DataError(
            f"the vocabulary has {tok.vocab_size} ids, must have at most {MAX_VOCAB_SIZE:,}; use --tokenizer=bpe"
        )

    # --- bins, then meta.json: until it is replaced the folder holds the earlier preparation
    parts = _parts(manifest, survey, "encoding")
    with dataset.preparing(out) as bins:
        meta = Meta(
            format=FORMAT,
            fingerprint=fingerprint,
            text_sha256=survey.text_sha256,
            vocab_size=tok.vocab_size,
            styles=tokenizer.styles(tok) if styles else {},
            licences=tuple(sorted({f"{source.style}: {source.licence}" for source in manifest.sources})),
            splits=_write_bins(bins, parts, tok, survey.n_documents > corpus.MANY_DOCUMENTS),
            tokenizer=tok.saved,
            start=start,
        )
        with files.replacing(out / "meta.json") as f:
            f.write(dataset.encode_meta(meta))
    _report(out, survey, meta)


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of the checkpoint at `path`; raises ConfigError when it has none."""
    wanted = f"tokenizer: found {str(path)!r}, must be {', '.join(TOKENIZERS)} or a checkpoint"
    if not path.exists() and (near := did_you_mean(str(path), TOKENIZERS)):
        raise ConfigError(wanted + near)
    try:
        return checkpoint.tokenizer_of(checkpoint.load(path), path)
    except CheckpointError as e:
        raise ConfigError(f"{wanted}; {e}") from None


def _with_specials(given: Tokenizer, specials: list[str], characters: str) -> Tokenizer:
    """`given` with `specials` added after its own; raises DataError if it lacks one of the text's `characters`."""
    saved = given.to_json()
    saved["specials"] += [name for name in specials if name not in given.specials]
    tok = tokenizer.from_json(saved)
    if UNKNOWN not in tok.specials and (unknown := tok.unknown(characters)):
        advice = "leave --tokenizer out for one of this text's own, or remove them from the text"
        raise DataError(f"tokenizer: does not know {', '.join(map(repr, unknown))}; {advice}")
    return tok


def _fingerprint(cfg: PrepareConfig, manifest: corpus.Manifest, given: Tokenizer | None, known: str) -> str:
    """A hash of everything the result depends on: options, what may be taken, the manifest and the user's files."""
    anywhere = replace(manifest, folder=Path("."), vocab_size=manifest.vocab_size or 0)
    digest = hashlib.sha256(f"{FORMAT} {cfg.tokenizer} {cfg.vocab_size or 0} {anywhere}{known}".encode())
    if given:
        digest.update(json.dumps(given.to_json()).encode())
    for source in manifest.sources:
        if source.file:
            for path in sources.source_files(source, manifest.folder):
                digest.update(f"{os.path.basename(path)} {files.sha256(DataError, Path(path))}".encode())
                for sheet in sources.style_sheets(path).values():
                    digest.update(sheet)
    return digest.hexdigest()


def _documents(manifest: corpus.Manifest, doing: str, total: int | None = None) -> Iterable[corpus.Document]:
    """Each document, with a progress bar. doing: its label."""
    return tqdm(corpus.documents(manifest), desc=doing, total=total, unit=" works", delay=1, disable=None, leave=False)


def _parts(manifest: corpus.Manifest, survey: corpus.Survey, doing: str) -> Iterator[tuple[Part, str]]:
    """Read all documents again; yields each one's parts with their text."""
    return corpus.parts(_documents(manifest, doing, survey.n_documents), manifest, survey)


def _reads(tok: Tokenizer, manifest: corpus.Manifest, survey: corpus.Survey) -> bool:
    """True if `tok` needs few enough ids for the start of the train text: it was made for its language."""
    head = corpus.heads(_parts(manifest, survey, "trying"), {"train": READ})["train"]
    return len(head.encode()) >= BYTES_A_TOKEN * len(tok.encode(head))


def _write_bins(
    paths: dict[SplitName, Path], parts: Iterator[tuple[Part, str]], tok: Tokenizer, many: bool
) -> dict[SplitName, SplitMeta]:
    """Encode all parts and write the three bins, unfinished as yet; returns what meta.json says of them.

    Each part ends with <|endoftext|> if the tokenizer has it. many: instead of a span for each document, meta.json gets
    one for each run of documents of one style, and the id that ends a document (`SplitMeta.end`).
    """
    end = [np.array([tok.specials[END]])] if END in tok.specials else []
    sizes = {name: {"tokens": 0, "largest": 0, "characters": 0, "bytes": 0} for name in dataset.SPLITS}
    documents: dict[SplitName, list[Span]] = {name: [] for name in dataset.SPLITS}

    def count_text() -> Iterator[tuple[Part, str]]:
        for part, text in parts:
            sizes[part.split]["characters"] += len(text)
            sizes[part.split]["bytes"] += len(text) if text.isascii() else len(text.encode())
            yield part, text

    with files.named(paths["train"].parent), contextlib.ExitStack() as stack:
        bins = {name: stack.enter_context(files.writing(path)) for name, path in paths.items()}
        for part, pieces in groupby(tokenizer.encode_all(tok, count_text()), key=itemgetter(0)):
            size, spans = sizes[part.split], documents[part.split]
            start = size["tokens"]
            for ids in chain((ids for _, ids in pieces), end):
                bins[part.split].write(ids.astype("<u2").data)
                size["tokens"] += len(ids)
                size["largest"] = max(size["largest"], int(ids.max(initial=0)))
            if many and spans and spans[-1].style == part.style:
                spans[-1] = replace(spans[-1], stop=size["tokens"], works=spans[-1].works + 1)
            else:
                spans.append(Span(part.name, part.style, start, size["tokens"]))
    if not sizes["train"]["tokens"]:
        raise DataError("the corpus leaves nothing to train on; add text")
    last = tok.specials[END] if many else -1
    return {
        name: SplitMeta(**sizes[name], sha256=files.sha256(DataError, path), documents=tuple(documents[name]), end=last)
        for name, path in paths.items()
    }


def _report(out: Path, survey: corpus.Survey, meta: Meta) -> None:
    kept, raw, styles = survey.letters, survey.raw_letters, ", ".join(meta.styles)
    print(f"{out}: {survey.n_documents:,} works, vocabulary {meta.vocab_size:,}, styles: {styles or 'none'}")
    print(f"cleaning kept {kept / max(raw, 1):.2%} of the letters, removed {raw - kept:,}")
    if survey.page_matter:
        print(f"page matter left out: {', '.join(f'{name} ({n:,})' for name, n in survey.page_matter.items())}")
    print(f"{'split':>8} {'works':>6} {'characters':>12} {'tokens':>12} {'chars/token':>12} {'bytes/token':>12}")
    for name, split in meta.splits.items():
        tokens, works = max(split.tokens, 1), sum(span.works for span in split.documents)
        print(
            f"{name:>8} {works:>6,} {split.characters:>12,} {split.tokens:>12,} "
            f"{split.characters / tokens:>12.2f} {split.bytes / tokens:>12.2f}"
        )


if __name__ == "__main__":
    configurator.launch(main, PrepareConfig, positional="input")
