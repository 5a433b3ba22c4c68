"""Classical coders that know the train split, to compare a language model's bits per byte with."""

import lzma
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyppmd
import zstandard

from robopoet.text import tokenizer
from robopoet.text.dataset import Meta
from robopoet.text.tokenizer import Tokenizer
from robopoet.writing.originality import read_texts

Coder = Callable[[bytes], float]  # text -> the bits that it needs after the known text


def _after(known: bytes, compress: Callable[[bytes], bytes]) -> Coder:
    """The compressed size of both texts minus that of the known one."""
    size = len(compress(known))
    return lambda text: 8.0 * (len(compress(known + text)) - size)


def xz(known: bytes) -> Coder:
    """LZMA at its best preset, with a dictionary as large as the text."""

    def compress(data: bytes) -> bytes:
        size = max(len(data), 2**16)
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
        return lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)

    return _after(known, compress)


def zstd(known: bytes) -> Coder:
    """Zstandard at its highest level, with the known text as its dictionary and a window over both."""
    dictionary = zstandard.ZstdCompressionDict(known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)

    def bits(text: bytes) -> float:
        sizes = {"source_size": len(text), "dict_size": len(known)}  # they set the window
        parameters = zstandard.ZstdCompressionParameters.from_level(22, **sizes)
        return 8.0 * len(zstandard.ZstdCompressor(dict_data=dictionary, compression_params=parameters).compress(text))

    return bits


def ppmd(known: bytes, order: int) -> Coder:
    """PPMd, variant I (Shkarin 2002), with enough memory to forget nothing."""
    return _after(known, lambda data: pyppmd.compress(data, max_order=order, mem_size=2**29))


class KneserNey:
    """An n-gram model with interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1999).

    ids: (n,) int64 token ids to learn from. order: the tokens of its longest n-gram. Each length has one discount,
    n1 / (n1 + 2 n2); what unigrams leave is spread evenly over the vocabulary.
    """

    def __init__(self, ids: np.ndarray, vocab_size: int, order: int):
        self.vocab_size, self.order = vocab_size, order
        keys, counts = [], []
        grams = np.zeros(len(ids), np.int64)  # the index of the k-gram that starts at each position
        for k in range(1, order + 1):
            shorter = grams
            found = np.unique(shorter[: len(ids) - k + 1] * vocab_size + ids[k - 1 :], True, True, True)
            key, first, grams, count = found
            if k > 1:  # a shorter gram counts once per distinct token before it
                counts[-1] = np.bincount(shorter[first + 1], minlength=len(keys[-1]))
            keys.append(key)
            counts.append(count)
        self.levels = []
        for key, count in zip(keys, counts, strict=True):
            once, twice = (count == 1).sum(), (count == 2).sum()
            discount = once / (once + 2 * twice) if once else 0.5  # in a tiny text none may occur once
            totals = np.bincount(key // vocab_size, count)
            types = np.bincount(key // vocab_size, count > 0)
            self.levels.append((key, count, totals, types, discount))

    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        """Each id's probability given the ids before it, from the order-th id on: (n - order + 1,) float64."""
        n = len(ids)
        probs = np.full(n - self.order + 1, 1 / self.vocab_size)
        context = np.zeros(n, np.int64)  # the index of the gram without its last id, -1 if unseen
        for k, (keys, counts, totals, types, discount) in enumerate(self.levels, 1):
            context = context[: n - k + 1]
            wanted = context * self.vocab_size + ids[k - 1 :]  # negative, so not found, if the context is unseen
            at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            grams = np.where(keys[at] == wanted, at, -1)
            gram, before = grams[self.order - k :], context[self.order - k :]
            before = np.where(before < len(totals), before, -1)  # seen only at the end of the text
            total = np.where(before >= 0, totals[before], 0)
            kept = np.where(gram >= 0, np.maximum(counts[gram] - discount, 0), 0)
            mixed = (kept + discount * types[before] * probs) / np.maximum(total, 1)
            probs, context = np.where(total > 0, mixed, probs), grams
        return probs

    def bits(self, known: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The bits of each of `ids` given the ids before it; `known` precedes the first: (n,) float64."""
        return -np.log2(self.probabilities(np.concatenate([known[len(known) - self.order + 1 :], ids])))


class Texts:
    """A split: `ids` (n,) int64, all its `text`, and by style `text_of`, `targets`, and `size`, the targets' bytes.

    targets: the positions that a model's loss counts: all but each document's first. They include <|endoftext|>, which
    has no bytes. Raises DataError when the bins can't be used.
    """

    def __init__(self, folder: Path, name: str, meta: Meta, tok: Tokenizer):
        documents = meta.splits[name].documents
        texts = read_texts(folder, name)
        self.ids = np.fromfile(folder / f"{name}.bin", "<u2").astype(np.int64)
        self.styles = list(dict.fromkeys(doc.style for doc in documents))
        lengths = tokenizer.token_bytes(tok)[self.ids]
        self.text = "".join(texts)
        self.text_of, self.spans, self.targets, self.size = {}, {}, {}, {}
        for style in self.styles:
            of_style = [i for i, doc in enumerate(documents) if doc.style == style]
            self.text_of[style] = "".join(texts[i] for i in of_style)
            self.spans[style] = [(documents[i].start, documents[i].stop) for i in of_style]
            self.targets[style] = np.concatenate([np.arange(start + 1, stop) for start, stop in self.spans[style]])
            self.size[style] = int(lengths[self.targets[style]].sum())


def bits_per_byte(
    known: Texts, val: Texts, test: Texts, evaluated: dict[str, Any], vocab_size: int
) -> list[dict[str, Any]]:
    """The bits per byte that each coder needs for the test split: for all of it at once, and for each style.

    evaluated: the model's loss on it. The orders of PPMd and of the n-grams are the best ones on the val split.
    """
    bits = {style: loss / math.log(2) * len(test.targets[style]) for style, loss in evaluated["loss_by_style"].items()}
    by_style = {style: bits[style] / test.size[style] for style in bits}
    found = [{"coder": "RoboPoet", "bpb": evaluated["bpb"], "bpb_by_style": by_style}]

    n_grams = [KneserNey(known.ids, vocab_size, order) for order in (3, 4, 5)]
    best = min(n_grams, key=lambda model: model.bits(known.ids, val.ids).sum())
    each = best.bits(known.ids, test.ids)
    bits = {style: each[targets].sum() for style, targets in test.targets.items()}
    by_style = {style: bits[style] / test.size[style] for style in bits}
    bpb = sum(bits.values()) / sum(test.size.values())
    found.append({"coder": f"Kneser-Ney, {best.order} tokens", "bpb": bpb, "bpb_by_style": by_style})

    text = known.text.encode()
    ppmds = {order: ppmd(text, order) for order in (4, 6, 8, 10, 12)}
    order = min(ppmds, key=lambda order: ppmds[order](val.text.encode()))
    named = {f"PPMd, order {order}": ppmds[order], "xz -9e": xz(text), "zstd -22": zstd(text)}
    for name, coder in named.items():
        each = {style: coder(part.encode()) / len(part.encode()) for style, part in test.text_of.items()}
        bpb = coder(test.text.encode()) / len(test.text.encode())
        found.append({"coder": name, "bpb": bpb, "bpb_by_style": each})
    return found
