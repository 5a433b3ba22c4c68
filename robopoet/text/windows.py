"""Windows are pure functions: row i of step s depends on (seed, s, i) alone, so there is no loader state to save.

A split is a bin's tokens, on the device or on the disk. Training reads it in windows of block_size tokens. Each epoch
visits every window once, in its own random order and with its own offset of the grid of windows. Evaluation walks each
document of a split from its first token to its last.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from robopoet.errors import DataError
from robopoet.text.dataset import Bin, Meta, SplitName, open_bin

ON_DEVICE_BYTES = 2**30  # bins up to this size live on the device; larger ones are read from the disk
SEARCHED_TOKENS = 2**24  # searched at a time for the ends of documents

# ---------------------------------------------------------------------------------------------------------------------
# a split


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and the style of each span of them.

    tokens: (n_tokens,) uint16, on the device, or on the disk until they are needed. starts, stops: (n_spans,) int64
    token positions. styles: each span's style. tags: (n_spans,) int64 id of each span's style tag, -1 if the corpus has
    no tags. end: the id that ends each document, if a span may hold several; else -1.
    """

    path: Path
    tokens: torch.Tensor | Bin
    starts: np.ndarray
    stops: np.ndarray
    styles: list[str]
    tags: np.ndarray
    end: int = -1

    @cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each document's start, stop and index of span: (n_documents,) int64 each."""
        if self.end < 0:  # a span is a document
            return self.starts, self.stops, np.arange(len(self.starts))
        firsts = range(0, len(self.tokens), SEARCHED_TOKENS)
        ends = [first + np.flatnonzero(self.read(first, first + SEARCHED_TOKENS) == self.end) for first in firsts]
        stops = np.concatenate(ends) + 1
        starts = np.concatenate([[0], stops[:-1]])
        return starts, stops, np.searchsorted(self.stops, starts, side="right")

    def gather(self, starts: np.ndarray, length: int, device: torch.device) -> torch.Tensor:
        """Windows of `length` tokens from `starts` on: (len(starts), length) int64 ids.

        Positions beyond the end of the split hold some valid id.
        """
        if isinstance(self.tokens, torch.Tensor):
            index = put(starts, device)[:, None] + torch.arange(length, device=device)
            return self.tokens[index.clamp_(max=len(self.tokens) - 1)].long() & 0xFFFF
        self.tokens.check()
        rows = np.zeros((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            window = self.tokens.read(start, start + length)
            row[: len(window)] = window
        return put(rows, device)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids `start` to `stop`: (n,) uint16."""
        if isinstance(self.tokens, torch.Tensor):
            return self.tokens[start:stop].cpu().numpy().view(np.uint16)
        return self.tokens.read(start, stop)

    def verified(self) -> None:
        """Wait until all of a bin on the disk is verified; raises DataError if it is another than prepared."""
        if isinstance(self.tokens, Bin):
            self.tokens.check(wait=True)


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy `array` to `device`; to a GPU from pinned memory, as other copies wait for the step that is running."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def open_split(folder: Path, name: SplitName, meta: Meta, block_size: int, device: torch.device) -> Split:
    """Open `folder/name.bin`; raises DataError when it is missing, too short, or not the one meta.json describes.

    That is known at once of a small bin; a large one is verified while it is in use. Training needs a whole window,
    an evaluation one target.
    """
    split, found = meta.splits[name], open_bin(folder, name, meta)
    wanted, way = (block_size + 1, "add text or lower block_size") if name == "train" else (2, "add text")
    if split.tokens < wanted:
        raise DataError(f"{found.path}: has {split.tokens} tokens, must have at least {wanted}; {way}")
    tokens: torch.Tensor | Bin = found
    if 2 * split.tokens <= ON_DEVICE_BYTES:
        ids = found.load().astype(np.int16)  # same bits; few operations take uint16
        tokens = torch.from_numpy(ids).to(device)
    else:
        found.verify_meanwhile()
    docs = split.documents
    return Split(
        found.path,
        tokens,
        np.array([doc.start for doc in docs], dtype=np.int64),
        np.array([doc.stop for doc in docs], dtype=np.int64),
        [doc.style for doc in docs],
        np.array([meta.styles.get(doc.style, -1) for doc in docs], dtype=np.int64),
        split.end,
    )


# ---------------------------------------------------------------------------------------------------------------------
# training


class TrainWindows:
    """An endless sequence of rows: in each epoch every window of a split once, in random order.

    tag_prob: the probability that a window's first input is replaced by its style's tag.
    """

    def __init__(self, split: Split, block_size: int, seed: int, tag_prob: float):
        self.split, self.block_size, self.seed, self.tag_prob = split, block_size, seed, tag_prob
        n_tokens = len(split.tokens)
        self.per_epoch = (n_tokens - min(block_size, n_tokens - block_size)) // block_size
        self.n_offsets = n_tokens - self.per_epoch * block_size  # at the largest, the split's last token is a target

    @lru_cache(maxsize=2)  # noqa: B019  (a step may touch two epochs; the object lives as long as the run)
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The starts of an epoch's windows, in order of training, and which of them get their tag."""
        rng = np.random.default_rng((self.seed, epoch))
        offset = rng.integers(self.n_offsets)
        starts = offset + rng.permutation(self.per_epoch) * self.block_size
        return starts, rng.random(self.per_epoch) < self.tag_prob

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows `first` to `first + count` of the sequence: window starts and tags (-1: none), (count,) int64 each."""
        epochs, places = np.divmod(np.arange(first, first + count), self.per_epoch)
        starts, tags = np.empty(count, np.int64), np.full(count, -1)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            epoch_starts, tagged = self._epoch(int(epoch))
            starts[here] = epoch_starts[places[here]]
            span = np.searchsorted(self.split.stops, starts[here], side="right")
            tags[here] = np.where(tagged[places[here]], self.split.tags[span], -1)
        return starts, tags

    def batch(self, first: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The same rows as inputs and targets: (count, block_size) int64 ids each, on `device`."""
        starts, tags = self.rows(first, count)
        window = self.split.gather(starts, self.block_size + 1, device)
        return _put_tags(window[:, :-1], tags), window[:, 1:]


# ---------------------------------------------------------------------------------------------------------------------
# evaluation


@dataclass(frozen=True)
class EvalPlan:
    """How an evaluation reads a split: the shape of its batches, and how many.

    limit: of the batches, whose windows are spread evenly over the split, the same ones each time (0: the full split).
    even: all ranks get the same number of batches, as sharded models need. A rank that would have one batch fewer gets
    a last batch of one row whose `span` is empty; it must not be counted.
    """

    block_size: int
    batch_size: int
    limit: int = 0
    even: bool = False


class EvalBatch(NamedTuple):
    """inputs, targets: (B, T) int64 ids, targets -1 beyond a document's end. span: (B,) index of each row's span."""

    inputs: torch.Tensor
    targets: torch.Tensor
    span: np.ndarray


def eval_batches(
    split: Split, plan: EvalPlan, device: torch.device, rank: int = 0, ranks: int = 1
) -> Iterator[EvalBatch]:
    """This rank's share of the batches that walk a split in order: of n ranks, each takes every n-th batch.

    No window crosses the end of a document, and every token but a document's first is a target exactly once.
    """
    first, stops, span = split.documents
    lengths = stops - first - 1  # targets
    counts = -(-lengths // plan.block_size)  # windows
    document = np.repeat(np.arange(len(counts)), counts)  # each window's document
    offsets = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * plan.block_size
    starts, remaining = first[document] + offsets, lengths[document] - offsets
    if plan.limit and plan.limit * plan.batch_size < len(starts):
        count = plan.limit * plan.batch_size
        chosen = (2 * np.arange(count) + 1) * len(starts) // (2 * count)  # the middle of each of `count` equal parts
        document, starts, remaining = document[chosen], starts[chosen], remaining[chosen]
    n_batches = math.ceil(len(starts) / plan.batch_size)
    padded = n_batches + (-n_batches % ranks if plan.even else 0)
    for i in range(rank, padded, ranks):
        rows = slice(i * plan.batch_size, (i + 1) * plan.batch_size) if i < n_batches else slice(1)
        window = split.gather(starts[rows], plan.block_size + 1, device)
        beyond = torch.arange(plan.block_size) >= torch.from_numpy(remaining[rows])[:, None]
        targets = window[:, 1:].masked_fill(beyond.to(device), -1)
        spans = span[document[rows]]
        inputs = _put_tags(window[:, :-1], split.tags[spans])
        yield EvalBatch(inputs, targets, spans if i < n_batches else spans[:0])
    split.verified()


def _put_tags(inputs: torch.Tensor, tags: np.ndarray) -> torch.Tensor:
    """Overwrite the first id of each row with its tag, unless that is -1."""
    ids = put(tags, inputs.device)
    inputs = inputs.contiguous()
    inputs[:, 0] = torch.where(ids >= 0, ids, inputs[:, 0])
    return inputs
