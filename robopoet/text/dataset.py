"""A prepared dataset: a folder with train.bin, val.bin and test.bin (uint16 token ids), and meta.json about them."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch

from configurator import HOME, did_you_mean
from robopoet import untrusted
from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.text.tokenizer import END, SavedBPE, SavedChar
from robopoet.untrusted import Count, Positive, Sha256

FORMAT = 3  # of bins and meta.json; raising it makes earlier ones stale
ON_DEVICE_BYTES = 2**30  # bins up to this size live on the device; larger ones are memory-mapped
SEARCHED_TOKENS = 2**24  # searched at a time for the ends of documents
HASHED_BYTES = 2**28  # a larger bin is hashed by blocks of that size in all, spread over the file
BLOCK_BYTES = 2**20
SPLITS = ("train", "val", "test")


def find_dataset(name: str) -> Path:
    """The folder of bins called `name`: a path, or a folder under data/, here or beside the scripts.

    Raises DataError, which lists the datasets that are prepared.
    """
    places = Path("data"), HOME / "data"
    for folder in (Path(name), *(place / name for place in places)):
        if name and (folder / "meta.json").is_file():
            return folder
    known = sorted({path.parent.name for place in places for path in place.glob("*/meta.json")})
    has_manifest = any((place / name / "corpus.yaml").is_file() for place in places)
    advice = f"data/{name}" if has_manifest else f"--input='my/*.txt' --out=data/{Path(name).name or 'mine'}"
    near = did_you_mean(Path(name).name, known) or f"; run `python prepare.py {advice}`"
    raise DataError(
        f"dataset: {name!r} is not prepared (prepared: {', '.join(known) or 'none'}){near}, or if it is in another "
        "folder, use --dataset=PATH, or run this where the model was trained"
    )


# ---------------------------------------------------------------------------------------------------------------------
# meta.json

Id = Annotated[int, msgspec.Meta(ge=0, lt=2**16)]


@dataclass(frozen=True)
class Span:
    """The tokens `start` to `stop` of a split: one document, or in a large corpus `works` documents of one style."""

    name: str
    style: str
    start: Count
    stop: Count
    works: Positive = 1


@dataclass(frozen=True)
class SplitMeta:
    """What meta.json says of a split.

    tokens: how many. largest: the largest id. characters, bytes: the size of its text. sha256: the bin's, by
    `bin_sha256`. documents: spans that cover the split. end: the id that ends each document, if a span may hold
    several; else -1.
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
    """What meta.json says of a folder of bins. styles: name -> id of its tag; empty if the corpus has no tags."""

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
                raise ValueError(f"styles: the tokenizer's tag of {style!r} is not {id}")
        for name, split in self.splits.items():
            if split.largest >= self.vocab_size:
                raise ValueError(f"{name}.bin holds token {split.largest}, the vocabulary has {self.vocab_size}")
            if split.end not in (-1, tags.get(END)):
                raise ValueError(f"{name}: its documents end with {split.end}, which is not the tokenizer's {END}")
            if self.styles and not self.styles.keys() >= (unknown := {span.style for span in split.documents}):
                raise ValueError(f"{name} has documents of a style without a tag: {unknown - self.styles.keys()}")

    @property
    def identity(self) -> dict[str, str]:
        """What tells this dataset from others of its text and tokenizer; every checkpoint keeps it.

        As a share grows, no cut of a document moves back: splits of one text that are equally long are the same.
        """
        lengths = {name: f"{split.characters:,} characters" for name, split in self.splits.items()}
        return lengths | {"tags": ", ".join(self.styles) or "none"}

    def changes(self, identity: dict[str, str]) -> dict[str, str]:
        """What differs from another dataset's identity, as {"val": "319 characters -> 851 characters"}."""
        ours = self.identity
        return {key: f"{old} -> {ours[key]}" for key, old in identity.items() if ours.get(key, old) != old}


@dataclass(frozen=True)
class Header:
    """The one key of meta.json that every format has."""

    format: int = 0


def encode_meta(meta: Meta) -> bytes:
    """The content of meta.json: one line of JSON, whose last key is the SHA-256 of everything before that key."""
    body = msgspec.json.encode(meta)[:-1]
    return body + _seal(body)


def _seal(body: bytes) -> bytes:
    return b',"sha256":"%b"}\n' % hashlib.sha256(body).hexdigest().encode()


def read_meta(folder: Path) -> Meta:
    """Read `folder/meta.json`; raises DataError when it is missing, of an earlier format, altered or inconsistent."""
    path = folder / "meta.json"
    if not path.exists():
        raise DataError(f"{path}: not found; run `python prepare.py {folder}` first")
    raw = untrusted.read_bytes(path, DataError)
    header = untrusted.decode_json(raw, Header, path, DataError, "run prepare.py again")
    if header.format != FORMAT:
        raise DataError(f"{path}: is of format {header.format}, must be {FORMAT}; run prepare.py again")
    body = raw[: -len(_seal(b""))]
    if raw != body + _seal(body):
        raise DataError(f"{path}: its SHA-256 does not match its content; it was altered; run prepare.py again")
    return untrusted.decode_json(raw, Meta, path, DataError, "run prepare.py again")


def bin_sha256(path: Path) -> str:
    """The hash of a bin: of all bytes, or above 256 MB, of blocks spread evenly from its first byte to its last."""
    size, blocks = path.stat().st_size, HASHED_BYTES // BLOCK_BYTES
    with open(path, "rb") as f:
        if size <= HASHED_BYTES:
            return hashlib.file_digest(f, "sha256").hexdigest()
        sha = hashlib.sha256()
        for i in range(blocks):
            f.seek(i * (size - BLOCK_BYTES) // (blocks - 1))
            sha.update(f.read(BLOCK_BYTES))
    return sha.hexdigest()


def part_of(folder: Path, name: str) -> Path:
    """Where prepare.py writes a bin. It may be there still when meta.json, which is written last, describes it."""
    return folder / f"{name}.bin.part"


def is_bin(path: Path, split: SplitMeta) -> bool:
    """Whether `path` is the bin that meta.json describes."""
    return path.is_file() and path.stat().st_size == 2 * split.tokens and bin_sha256(path) == split.sha256


def check_bin(folder: Path, name: str, meta: Meta) -> Path:
    """The path of the bin `name`; raises DataError when it is missing or not the one meta.json describes."""
    path, split = folder / f"{name}.bin", meta.splits[name]
    if is_bin(part := part_of(folder, name), split):
        return part
    if not path.exists():
        raise DataError(f"{path}: not found; run `python prepare.py {folder}` first")
    if (size := untrusted.check_regular(path, DataError)) != 2 * split.tokens:
        raise DataError(f"{path}: is {size} bytes long, meta.json says {2 * split.tokens}; run prepare.py --force")
    try:
        found = bin_sha256(path)
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    if found != split.sha256:
        raise DataError(f"{path}: its SHA-256 does not match meta.json; it was altered; run prepare.py --force")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# a split


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and the style of each span of them.

    tokens: (n_tokens,) uint16, on the device or memory-mapped. starts, stops: (n_spans,) int64 token positions.
    styles: each span's style. tags: (n_spans,) int64 id of each span's style tag, -1 if the corpus has no tags.
    end: the id that ends each document, if a span may hold several; else -1.
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
        """Each document's start, stop and index of span: (n_documents,) int64 each."""
        if self.end < 0:  # a span is a document
            return self.starts, self.stops, np.arange(len(self.starts))
        tokens = np.memmap(self.path, dtype="<u2", mode="r")
        firsts = range(0, len(tokens), SEARCHED_TOKENS)
        ends = [first + np.flatnonzero(tokens[first : first + SEARCHED_TOKENS] == self.end) for first in firsts]
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
        rows = np.zeros((len(starts), length), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            window = self.tokens[start : start + length]
            row[: len(window)] = window
        return put(rows, device)


def put(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy `array` to `device`; to a GPU from pinned memory, as other copies wait for the step that is running."""
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
        tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)  # same bits; few operations take uint16
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
