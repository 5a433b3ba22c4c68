"""Batches as pure functions: row i of step s depends on (seed, s, i) alone, so there is no loader state to lose.

Training reads a split in windows of block_size tokens. Each epoch visits every window once, in its own permuted order,
with its own offset of the window grid. Evaluation walks each document of a split from its first token to its last.
Of many documents meta.json has one span for each run of a style; where one ends in it, evaluation reads in the bin.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import DataError

ON_DEVICE_BYTES = 2**30  # bins up to this size live on the device; larger ones stay on disk, mapped
SEARCHED_TOKENS = 2**24  # at a time, for documents' ends
SCANNED_BYTES = 2**28  # in bins up to this size every token is looked at; larger ones are as meta.json says


def find_dataset(name: str) -> Path:
    """The folder of bins called `name`: a path, or a folder under data/, here or beside the scripts.

    Raises DataError, which lists those that there are.
    """
    places = Path("data"), Path(__file__).parent
    for folder in (Path(name), *(place / name for place in places)):
        if name and (folder / "meta.json").is_file():
            return folder
    known = ", ".join(sorted({path.parent.name for place in places for path in place.glob("*/meta.json")}))
    has_manifest = any((place / name / "corpus.yaml").is_file() for place in places)
    advice = f"data/{name}" if has_manifest else f"--input='my/*.txt' --out=data/{Path(name).name or 'mine'}"
    raise DataError(f"dataset: {name!r} is not prepared ({known or 'nothing'} is); run `python prepare.py {advice}`")


def read_meta(folder: Path) -> dict:
    """Read `folder/meta.json`, which prepare.py wrote; raises DataError when there is none or it is damaged."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        missing = {"vocab_size", "styles", "tokenizer", "text_sha256", "splits"} - meta.keys()
        for name in ("train", "val", "test"):
            entry = meta.get("splits", {}).get(name, {})
            missing |= {f"splits.{name}.{key}" for key in ("tokens", "documents") if key not in entry}
    except FileNotFoundError:
        raise DataError(f"{path}: not found; run `python prepare.py {folder}` first") from None
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise DataError(f"{path}: is not what prepare.py writes ({type(e).__name__}: {e}); prepare again") from None
    if missing:
        raise DataError(f"{path}: lacks {', '.join(sorted(missing))}; prepare again")
    return meta


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and which span of them belongs to which document, or to documents of which style.

    tokens: (n_tokens,) uint16, on the device or mapped from disk. starts, stops: (n_spans,) int64 token positions.
    styles: each span's style. tags: each span's style id, or -1 where the corpus has no tags. end: the last id of each
    document where a span holds several, or else -1.
    """

    path: Path
    tokens: torch.Tensor | np.memmap
    starts: np.ndarray
    stops: np.ndarray
    styles: list[str]
    tags: np.ndarray
    end: int = -1

    @cached_property
    def documents(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each document's first position, the one after its last, and its span: (n_documents,) int64 each."""
        if self.end < 0:
            return self.starts, self.stops, np.arange(len(self.starts))
        tokens = np.memmap(self.path, dtype="<u2", mode="r")
        firsts = range(0, len(tokens), SEARCHED_TOKENS)
        ends = [first + np.flatnonzero(tokens[first : first + SEARCHED_TOKENS] == self.end) for first in firsts]
        stops = np.concatenate(ends) + 1
        starts = np.concatenate([[0], stops[:-1]])
        return starts, stops, np.searchsorted(self.stops, starts, side="right")

    def gather(self, starts: np.ndarray, length: int, device: torch.device) -> torch.Tensor:
        """Windows of `length` tokens from `starts`, clamped to the end of the split: (len(starts), length) int64."""
        if isinstance(self.tokens, torch.Tensor):
            index = _put(starts, device)[:, None] + torch.arange(length, device=device)
            return self.tokens[index.clamp_(max=len(self.tokens) - 1)].long() & 0xFFFF
        rows = np.zeros((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            window = self.tokens[start : start + length]
            row[: len(window)] = window
        return _put(rows, device)


def _put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """`array` on `device`; to a GPU from pinned memory, for any other copy waits until the step before is done."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def open_split(folder: Path, name: str, meta: dict, block_size: int, device: torch.device) -> Split:
    """Open `folder/name.bin`; raises DataError when it is missing, too short, or not the one meta.json describes."""
    path = folder / f"{name}.bin"
    if not path.is_file():
        raise DataError(f"{path}: not found; run `python prepare.py {folder}` first")
    size, entry = path.stat().st_size, meta["splits"][name]
    if size != 2 * entry["tokens"]:
        raise DataError(f"{path}: is {size} bytes long, meta.json says {2 * entry['tokens']}; run prepare.py --force")
    if entry["tokens"] < block_size + 1:
        raise DataError(
            f"{path}: has {entry['tokens']} tokens, must have at least block_size + 1 = {block_size + 1}; "
            "add text or lower block_size"
        )
    tokens: torch.Tensor | np.memmap = np.memmap(path, dtype="<u2", mode="r")
    believed = size > SCANNED_BYTES and "largest" in entry
    if (largest := entry["largest"] if believed else int(tokens.max())) >= meta["vocab_size"]:
        place = "somewhere" if believed else f"byte {2 * int(np.argmax(tokens))}"
        raise DataError(
            f"{path}: {place} holds token {largest}, the vocabulary has {meta['vocab_size']}; run prepare.py --force"
        )
    if size <= ON_DEVICE_BYTES:
        tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # uint16's bits: few operations take uint16
    docs = entry["documents"]
    return Split(
        path,
        tokens,
        np.array([doc["start"] for doc in docs], dtype=np.int64),
        np.array([doc["stop"] for doc in docs], dtype=np.int64),
        [doc["style"] for doc in docs],
        np.array([meta["styles"].get(doc["style"], -1) for doc in docs], dtype=np.int64),
        entry.get("end", -1),
    )


class TrainWindows:
    """The order in which training sees a split.

    tag_prob: the chance that a window's first input is its style's tag instead of its first token.
    """

    def __init__(self, split: Split, block_size: int, seed: int, tag_prob: float):
        self.split, self.block_size, self.seed, self.tag_prob = split, block_size, seed, tag_prob
        n_tokens = len(split.tokens)
        self.per_epoch = (n_tokens - min(block_size, n_tokens - block_size)) // block_size
        self.n_offsets = n_tokens - self.per_epoch * block_size  # with the last, the last token is a target

    @lru_cache(maxsize=2)  # noqa: B019  (a step may touch two epochs; the object lives as long as the run)
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The starts of an epoch's windows in the order they come, and which of them carry their tag."""
        rng = np.random.default_rng((self.seed, epoch))
        offset = rng.integers(self.n_offsets)
        starts = offset + rng.permutation(self.per_epoch) * self.block_size
        return starts, rng.random(self.per_epoch) < self.tag_prob

    def rows(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows from `first` of the endless sequence: starts (count,) int64 and tags (count,) int64, -1 for none."""
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
        """Those rows as inputs and targets, each (count, block_size) int64 on `device`."""
        starts, tags = self.rows(first, count)
        window = self.split.gather(starts, self.block_size + 1, device)
        return _put_tags(window[:, :-1], tags), window[:, 1:]


class EvalBatch(NamedTuple):
    """inputs, targets: (B, T) int64, targets -1 beyond a document's end; span: (B,) index of each row's."""

    inputs: torch.Tensor
    targets: torch.Tensor
    span: np.ndarray


def eval_batches(
    split: Split,
    block_size: int,
    batch_size: int,
    device: torch.device,
    limit: int = 0,
    rank: int = 0,
    world_size: int = 1,
    even: bool = False,
) -> Iterator[EvalBatch]:
    """Walk a split in order in batches of `batch_size` rows, or its first `limit` batches; each rank has every n-th.

    No window crosses a document's end, and every token but each document's first is a target just once. even: all ranks
    have as many batches, as those need that compute together; the last may then be one row, of no span.
    """
    first, stops, span = split.documents
    lengths = stops - first - 1  # targets
    counts = -(-lengths // block_size)
    document = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = first[document] + within * block_size
    remaining = lengths[document] - within * block_size
    n_batches = math.ceil(len(starts) / batch_size)
    n_batches = min(n_batches, limit) if limit else n_batches
    for b in range(rank, n_batches + (-n_batches % world_size if even else 0), world_size):
        rows = slice(b * batch_size, (b + 1) * batch_size) if b < n_batches else slice(1)
        window = split.gather(starts[rows], block_size + 1, device)
        beyond = torch.arange(block_size) >= torch.from_numpy(remaining[rows])[:, None]
        targets = window[:, 1:].masked_fill(beyond.to(device), -1)
        spans = span[document[rows]]
        inputs = _put_tags(window[:, :-1], split.tags[spans])
        yield EvalBatch(inputs, targets, spans if b < n_batches else spans[:0])


def _put_tags(inputs: torch.Tensor, tags: np.ndarray) -> torch.Tensor:
    """Overwrite the first id of each row with its tag, where it has one (tag >= 0)."""
    ids = _put(tags, inputs.device)
    inputs = inputs.contiguous()
    inputs[:, 0] = torch.where(ids >= 0, ids, inputs[:, 0])
    return inputs
