"""Batches as pure functions: row i of step s depends on (seed, s, i) alone, so there is no loader state to lose.

Training reads a split in windows of block_size tokens. Each epoch visits every window once, in its own permuted order,
with its own offset of the window grid. Evaluation walks each document of a split from its first token to its last.
Of many documents meta.json has one span for each run of a style; where one ends in it, evaluation reads in the bin.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
import torch

from configurator import HOME
from robopoet import untrusted
from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.text.tokenizer import END, SavedBPE, SavedChar
from robopoet.untrusted import Count, Positive, Sha256

FORMAT = 3  # of bins and meta.json; a higher one makes earlier ones stale
ON_DEVICE_BYTES = 2**30  # bins up to this size live on the device; larger ones stay on disk, mapped
SEARCHED_TOKENS = 2**24  # at a time, for documents' ends
HASHED_BYTES = 2**28  # of a larger bin as many bytes are hashed, in blocks spread over it
BLOCK_BYTES = 2**20
SPLITS = ("train", "val", "test")


def find_dataset(name: str) -> Path:
    """The folder of bins called `name`: a path, or a folder under data/, here or beside the scripts.

    Raises DataError, which lists those that there are.
    """
    places = Path("data"), HOME / "data"
    for folder in (Path(name), *(place / name for place in places)):
        if name and (folder / "meta.json").is_file():
            return folder
    known = ", ".join(sorted({path.parent.name for place in places for path in place.glob("*/meta.json")}))
    has_manifest = any((place / name / "corpus.yaml").is_file() for place in places)
    advice = f"data/{name}" if has_manifest else f"--input='my/*.txt' --out=data/{Path(name).name or 'mine'}"
    raise DataError(
        f"dataset: {name!r} is not prepared ({known or 'nothing'} is); run `python prepare.py {advice}`, or if it is "
        "in another folder, name that one, --dataset=PATH, or start from where it was trained"
    )


# ---------------------------------------------------------------------------------------------------------------------
# meta.json

Id = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]


@dataclass(frozen=True)
class Span:
    """The tokens `start` to `stop` of a split: a document, or where there are many, a run of `works` of one style."""

    name: str
    style: str
    start: Count
    stop: Count
    works: Positive = 1


@dataclass(frozen=True)
class SplitMeta:
    """A split's bin: its tokens, the greatest of them, the text behind it, its hash (`bin_sha256`), and its documents.

    end: the last id of each document where a span holds several, or else -1.
    """

    tokens: Count
    largest: Id
    characters: Count
    bytes: Count
    sha256: Sha256
    documents: tuple[Span, ...]
    end: Annotated[int, msgspec.Meta(ge=-1, lt=2**16)] = -1

    def __post_init__(self) -> None:
        edges = [(span.start, span.stop) for span in self.documents]
        gaps = [stop != start for (_, stop), (start, _) in pairwise([(0, 0), *edges, (self.tokens, self.tokens)])]
        if any(gaps) or any(start > stop for start, stop in edges):
            raise ValueError("its documents don't cover its tokens one after the other")


@dataclass(frozen=True)
class Meta:
    """What meta.json says of a folder of bins. styles: each one's tag; empty where the corpus has no tags."""

    format: Literal[FORMAT]
    fingerprint: str
    text_sha256: Sha256
    vocab_size: Annotated[int, msgspec.Meta(ge=1, le=2**16)]
    styles: dict[str, Id]
    licences: tuple[str, ...]
    splits: dict[Literal[SPLITS], SplitMeta]
    tokenizer: SavedBPE | SavedChar

    def __post_init__(self) -> None:
        tags, n_ids = self.tokenizer.special_ids, self.tokenizer.vocab_size
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits are {', '.join(self.splits)}, must be {', '.join(SPLITS)}")
        if self.vocab_size != n_ids:
            raise ValueError(f"vocab_size is {self.vocab_size}, the tokenizer has {n_ids} ids")
        for style, id in self.styles.items():
            if tags.get(tokenizer.style_token(style)) != id:
                raise ValueError(f"styles: the tokenizer's tag of {style!r} is another than {id}")
        for name, split in self.splits.items():
            if split.largest >= self.vocab_size:
                raise ValueError(f"{name}.bin holds token {split.largest}, the vocabulary has {self.vocab_size}")
            if split.end not in (-1, tags.get(END)):
                raise ValueError(f"{name}: its documents end with {split.end}, which is not the tokenizer's {END}")
            if self.styles and not self.styles.keys() >= (unknown := {span.style for span in split.documents}):
                raise ValueError(f"{name} has documents of a style without a tag: {unknown - self.styles.keys()}")


@dataclass(frozen=True)
class Header:
    """What every meta.json has, whatever its format."""

    format: int = 0


def encode_meta(meta: Meta) -> bytes:
    """meta.json: one line of JSON whose last key is the SHA-256 of all before it."""
    body = msgspec.json.encode(meta)[:-1]
    return body + _seal(body)


def _seal(body: bytes) -> bytes:
    return b',"sha256":"%b"}\n' % hashlib.sha256(body).hexdigest().encode()


def read_meta(folder: Path) -> Meta:
    """What `folder/meta.json` says; raises DataError when there is none, or it is old, altered or wrong."""
    path = folder / "meta.json"
    if not path.exists():
        raise DataError(f"{path}: not found; run `python prepare.py {folder}` first")
    raw = untrusted.read_bytes(path, DataError)
    header = untrusted.decode_json(raw, Header, path, DataError, "run prepare.py again")
    if header.format != FORMAT:
        raise DataError(f"{path}: is of format {header.format}, must be {FORMAT}; run prepare.py again")
    body = raw[: -len(_seal(b""))]
    if raw != body + _seal(body):
        raise DataError(f"{path}: its SHA-256 is not the one it carries, it was altered; run prepare.py again")
    return untrusted.decode_json(raw, Meta, path, DataError, "run prepare.py again")


def bin_sha256(path: Path) -> str:
    """The hash of a bin: of all its bytes, or if it is larger than 256 MB, of blocks spread over it from end to end."""
    size, blocks = path.stat().st_size, HASHED_BYTES // BLOCK_BYTES
    with open(path, "rb") as f:
        if size <= HASHED_BYTES:
            return hashlib.file_digest(f, "sha256").hexdigest()
        sha = hashlib.sha256()
        for i in range(blocks):
            f.seek(i * (size - BLOCK_BYTES) // (blocks - 1))
            sha.update(f.read(BLOCK_BYTES))
    return sha.hexdigest()


def check_bin(folder: Path, name: str, meta: Meta) -> Path:
    """The path of `folder/name.bin`; raises DataError when it is missing or not the one that meta.json describes."""
    path, split = folder / f"{name}.bin", meta.splits[name]
    if not path.exists():
        raise DataError(f"{path}: not found; run `python prepare.py {folder}` first")
    if (size := untrusted.check_regular(path, DataError)) != 2 * split.tokens:
        raise DataError(f"{path}: is {size} bytes long, meta.json says {2 * split.tokens}; run prepare.py --force")
    try:
        found = bin_sha256(path)
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    if found != split.sha256:
        raise DataError(f"{path}: its SHA-256 is not the one in meta.json, it was altered; run prepare.py --force")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# splits


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


def open_split(folder: Path, name: str, meta: Meta, block_size: int, device: torch.device) -> Split:
    """Open `folder/name.bin`; raises DataError when it is missing, too short, or not the one meta.json describes."""
    path, split = check_bin(folder, name, meta), meta.splits[name]
    if split.tokens < block_size + 1:
        raise DataError(
            f"{path}: has {split.tokens} tokens, must have at least block_size + 1 = {block_size + 1}; "
            "add text or lower block_size"
        )
    tokens: torch.Tensor | np.memmap = np.memmap(path, dtype="<u2", mode="r")
    if 2 * split.tokens <= ON_DEVICE_BYTES:
        tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # uint16's bits: few operations take uint16
    docs = split.documents
    return Split(
        path,
        tokens,
        np.array([doc.start for doc in docs], dtype=np.int64),
        np.array([doc.stop for doc in docs], dtype=np.int64),
        [doc.style for doc in docs],
        np.array([meta.styles.get(doc.style, -1) for doc in docs], dtype=np.int64),
        split.end,
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
