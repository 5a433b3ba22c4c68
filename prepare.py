"""Turn books into token ids: a corpus in; train.bin, val.bin, test.bin (uint16) and meta.json out.

python prepare.py data/robopoet
python prepare.py --input='my/*.txt' --out=data/mine
"""

import hashlib
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoint
import configurator
from checkpoint import CheckpointError
from configurator import ConfigError
from data import DataError, corpus, tokenizer
from data.tokenizer import END, UNKNOWN, BPETokenizer, CharTokenizer, Tokenizer

KINDS = ("bpe", "char", "gpt2")  # of tokenizers
FORMAT = 2  # of what is written; a higher one makes earlier ones stale


@dataclass(frozen=True)
class PrepareConfig:
    """The keys of prepare.py."""

    corpus: str = ""  # folder that holds a corpus.yaml
    input: tuple[str, ...] = ()  # instead of a corpus: your own text files, as paths or globs; repeatable
    out: str = ""  # where the bins go (the corpus's own folder unless given)
    tokenizer: str = "bpe"  # bpe (trained on this text), char, gpt2 (GPT-2's table), or a checkpoint, to have its own
    vocab_size: int = 6725  # ids in all, special tokens included (bpe only)
    force: bool = False  # prepare even if nothing has changed

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = configurator.bounds(self, "vocab_size", 1, 65_536)  # ids are stored as uint16
        if bool(self.corpus) == bool(self.input):
            found.append("name either a corpus folder, as data/robopoet, or --input='my/*.txt'")
        if self.input and not self.out:
            found.append("out: is missing; say where the bins go, as --out=data/mine")
        return found


def main(cfg: PrepareConfig) -> None:
    """Prepare the corpus, or do nothing if it is prepared already."""
    # --- where the texts come from
    manifest = corpus.manifest_of_files(cfg.input) if cfg.input else corpus.read_manifest(Path(cfg.corpus))
    out = Path(cfg.out or cfg.corpus)
    given = None if cfg.tokenizer in KINDS else _read_tokenizer(Path(cfg.tokenizer))
    fingerprint = _fingerprint(cfg, manifest, given)
    if not cfg.force and _is_prepared(out, fingerprint):
        print(f"{out} is prepared already (--force does it again)")
        return

    # --- documents and splits
    docs = list(tqdm(corpus.documents(manifest), desc="reading", unit=" works", delay=1, disable=None))
    text_sha256 = corpus.text_sha256(docs)
    if manifest.text_sha256 not in ("", text_sha256):
        raise DataError(
            f"{cfg.corpus}/corpus.yaml: text_sha256: the cleaned text's hash is {text_sha256}, not the one pinned; "
            "if you changed the sources or the cleaning on purpose, pin the new one"
        )
    exact = all(source.clean == "none" for source in manifest.sources)
    splits = corpus.split(docs, manifest.splits, exact)
    if not splits["train"]:
        raise DataError("the corpus leaves nothing to train on; add text")

    # --- tokenizer: learns from the train split alone
    styles = list(dict.fromkeys(doc.style for doc in docs)) if manifest.tags else []
    specials = ([END] if len(docs) > 1 or styles else []) + [tokenizer.style_token(style) for style in styles]
    tok: Tokenizer
    if given:
        tok = _extended(given, specials, docs)
    elif cfg.tokenizer == "bpe":
        tok = BPETokenizer.train((text for _, text in splits["train"]), cfg.vocab_size, specials)
    elif cfg.tokenizer == "char":
        tok = CharTokenizer.train((doc.text for doc in docs), specials)
    else:
        tok = BPETokenizer.gpt2(specials)
    if tok.vocab_size > 65_536:
        raise DataError(f"the vocabulary has {tok.vocab_size} ids, must have at most 65,536; use --tokenizer=bpe")

    # --- bins, then meta.json, each whole or not at all
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "text_sha256": text_sha256,
        "vocab_size": tok.vocab_size,
        "styles": tokenizer.styles(tok) if styles else {},
        "licences": sorted({f"{source.style}: {source.licence}" for source in manifest.sources}),
        "splits": {},
        "tokenizer": tok.to_json(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in ("meta.json", "meta.pkl"):  # from here until the new one stands, the folder is not prepared
        (out / name).unlink(missing_ok=True)
    for name, parts in splits.items():
        meta["splits"][name] = _write_bin(out / f"{name}.bin", parts, tok)
    if isinstance(tok, CharTokenizer):  # where nanoGPT's scripts look for the characters
        stoi = {char: id for id, char in enumerate(tok.chars)} | tok.specials
        itos = {id: char for char, id in stoi.items()}
        _write(out / "meta.pkl", pickle.dumps({"vocab_size": tok.vocab_size, "itos": itos, "stoi": stoi}))
    _write(out / "meta.json", json.dumps(meta, ensure_ascii=True).encode())
    _report(out, docs, meta)


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a checkpoint; raises ConfigError when there is none."""
    try:
        return checkpoint.tokenizer_of(checkpoint.load(path), path)
    except CheckpointError as e:
        raise ConfigError(f"tokenizer: must be {', '.join(KINDS)} or a checkpoint; {e}") from None


def _extended(given: Tokenizer, specials: list[str], docs: list[corpus.Document]) -> Tokenizer:
    """A tokenizer with these specials behind its own; raises DataError when it doesn't know a character."""
    saved = given.to_json()
    saved["specials"] += [name for name in specials if name not in given.specials]
    tok = tokenizer.from_json(saved)
    if UNKNOWN not in tok.specials and (unknown := tok.unknown("".join(sorted(set().union(*(d.text for d in docs)))))):
        raise DataError(f"tokenizer: does not know {', '.join(map(repr, unknown))}; remove them from the text")
    return tok


def _fingerprint(cfg: PrepareConfig, manifest: corpus.Manifest, given: Tokenizer | None) -> str:
    """A hash of all that the result depends on: options, a tokenizer that was given, manifest, the user's files."""
    digest = hashlib.sha256(f"{FORMAT} {cfg.tokenizer} {cfg.vocab_size} {manifest}".encode())
    if given:
        digest.update(json.dumps(given.to_json()).encode())
    for source in manifest.sources:
        if source.file:
            for path, content in corpus.raw_texts(source, manifest.folder):
                digest.update(f"{path} {hashlib.sha256(content).hexdigest()}".encode())
    return digest.hexdigest()


def _is_prepared(out: Path, fingerprint: str) -> bool:
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        sizes = {name: (out / f"{name}.bin").stat().st_size for name in corpus.SPLITS}
        return meta["fingerprint"] == fingerprint and all(
            sizes[name] == 2 * meta["splits"][name]["tokens"] for name in corpus.SPLITS
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_bin(path: Path, parts: list[tuple[corpus.Document, str]], tok: Tokenizer) -> dict:
    """Write the parts of one split, parted by <|endoftext|>; returns its entry in meta.json."""
    end = [tok.specials[END]] if END in tok.specials else []
    ids, spans, start = [], [], 0
    for doc, text in tqdm(parts, desc=f"encoding {path.stem}", unit=" works", delay=1, disable=None, leave=False):
        first = start
        for piece in (*tokenizer.encode_in_slabs(tok, text), np.array(end, dtype="<u2")):
            ids.append(piece)
            start += len(piece)
        spans.append({"name": doc.name, "style": doc.style, "start": first, "stop": start})
    _write(path, b"".join(piece.tobytes() for piece in ids))
    texts = [text for _, text in parts]
    characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    largest = max((int(piece.max()) for piece in ids if len(piece)), default=0)
    return {"tokens": start, "largest": largest, "characters": characters, "bytes": size, "documents": spans}


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _report(out: Path, docs: list[corpus.Document], meta: dict) -> None:
    kept, raw = sum(corpus.count_letters(doc.text) for doc in docs), sum(doc.raw_letters for doc in docs)
    print(f"{out}: {len(docs)} works, vocabulary {meta['vocab_size']:,}, styles: {', '.join(meta['styles']) or 'none'}")
    print(f"cleaning kept {kept / max(raw, 1):.2%} of the letters, removed {raw - kept:,}")
    print(f"{'split':>8} {'works':>6} {'characters':>12} {'tokens':>12} {'chars/token':>12} {'bytes/token':>12}")
    for name, entry in meta["splits"].items():
        tokens = max(entry["tokens"], 1)
        print(
            f"{name:>8} {len(entry['documents']):>6,} {entry['characters']:>12,} {entry['tokens']:>12,} "
            f"{entry['characters'] / tokens:>12.2f} {entry['bytes'] / tokens:>12.2f}"
        )


if __name__ == "__main__":
    configurator.launch(main, PrepareConfig, DataError, positional="corpus")
