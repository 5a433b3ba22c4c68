"""Splits of random ids, for the tests of datasets and windows."""

from pathlib import Path

import numpy as np

from robopoet import files
from robopoet.errors import DataError
from robopoet.text.dataset import FORMAT, SPLITS, Meta, Span, SplitMeta
from robopoet.text.tokenizer import END, CharTokenizer

STYLES = {"alice": 60_001, "king": 60_002}
VOCAB = 60_003
TOKENIZER = CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + 60_000))), [END, "<|alice|>", "<|king|>"])


def write_split(
    folder: Path, docs: list[tuple[str, int]], styles: dict[str, int] = STYLES, seed: int = 0, name: str = "train"
) -> Meta:
    """A bin of random ids with documents of these (style, length), and empty other bins; returns their meta."""
    tokens = np.random.default_rng(seed).integers(0, 60_000, sum(n for _, n in docs)).astype("<u2")
    stops = np.cumsum([n for _, n in docs]).tolist()
    spans = tuple(
        Span(f"d{i}", style, stop - n, stop) for i, ((style, n), stop) in enumerate(zip(docs, stops, strict=True))
    )
    splits = {each: describe(folder / f"{each}.bin", tokens[:0], ()) for each in SPLITS}
    splits[name] = describe(folder / f"{name}.bin", tokens, spans)
    return Meta(FORMAT, "", "0" * 64, VOCAB, styles, ("alice: MIT",), splits, TOKENIZER.saved)


def describe(path: Path, tokens: np.ndarray, spans: tuple[Span, ...], end: int = -1) -> SplitMeta:
    """Write a bin; returns what meta.json says of it."""
    tokens.tofile(path)
    return SplitMeta(len(tokens), int(tokens.max(initial=0)), 0, 0, files.sha256(DataError, path), spans, end)


DOCS = [("alice", 40), ("king", 1), ("king", 100), ("alice", 9), ("king", 3), ("alice", 50)]
