"""A prepared dataset: a folder with train.bin, val.bin and test.bin (uint16 token ids), and meta.json about them."""

import contextlib
import hashlib
import os
import pickle
from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Annotated, Any, Literal, get_args

import msgspec
import numpy as np
from filelock import FileLock, Timeout

from robopoet import files, portable
from robopoet.errors import DataError, did_you_mean
from robopoet.files import HOME, Count, Positive, Sha256
from robopoet.text import tokenizer
from robopoet.text.tokenizer import END, Saved, SavedChar

MAX_VOCAB_SIZE = 2**16  # ids are stored as uint16
Format = Literal[3]  # version of bins and meta.json; raising it makes earlier ones stale
FORMAT: Format = 3
BLOCK_BYTES = 2**20  # hashed at a time
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
UNFINISHED = ("meta.json.part", "meta.pkl.part", *(f"{name}.bin.part" for name in SPLITS))


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

Id = Annotated[int, msgspec.Meta(ge=0, lt=MAX_VOCAB_SIZE)]
VocabSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_VOCAB_SIZE)]


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

    tokens: how many. largest: the largest id. characters, bytes: the size of its text. sha256: the bin's. documents:
    spans that cover the split. end: the id that ends each document, if a span may hold several; else -1.
    """

    tokens: Count
    largest: Id
    characters: Count
    bytes: Count
    sha256: Sha256
    documents: tuple[Span, ...]
    end: Annotated[int, msgspec.Meta(ge=-1, lt=MAX_VOCAB_SIZE)] = -1

    def __post_init__(self) -> None:
        edges = [(span.start, span.stop) for span in self.documents]
        gaps = [stop != start for (_, stop), (start, _) in pairwise([(0, 0), *edges, (self.tokens, self.tokens)])]
        if any(gaps) or any(start > stop for start, stop in edges):
            raise ValueError("its documents don't cover its tokens one after the other")


@dataclass(frozen=True)
class Meta:
    """What meta.json says of a folder of bins.

    styles: name -> id of its tag; empty if the corpus has no tags. start: the pretrained model whose tokenizer this is,
    from which a run of minutes starts; "": none.
    """

    format: Format
    fingerprint: str
    text_sha256: Sha256
    vocab_size: VocabSize
    styles: dict[str, Id]
    licences: tuple[str, ...]
    splits: dict[SplitName, SplitMeta]
    tokenizer: Saved
    start: str = ""

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

    def load_tokenizer(self) -> tokenizer.Tokenizer:
        """The tokenizer whose ids the bins hold."""
        return tokenizer.from_json(self.tokenizer)

    def changes(self, identity: dict[str, str]) -> dict[str, str]:
        """What differs from another dataset's identity, as {"val": "319 characters -> 851 characters"}."""
        ours = self.identity
        return {key: f"{old} -> {ours[key]}" for key, old in identity.items() if ours.get(key, old) != old}


@dataclass(frozen=True)
class MetaFormat:
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
    raw = files.read_bytes(path, DataError)
    header = files.decode_json(raw, MetaFormat, path, DataError, "run prepare.py again")
    if header.format != FORMAT:
        raise DataError(f"{path}: is of format {header.format}, must be {FORMAT}; run prepare.py again")
    body = raw[: -len(_seal(b""))]
    if raw != body + _seal(body):
        raise DataError(f"{path}: its SHA-256 does not match its content; it was altered; run prepare.py again")
    return files.decode_json(raw, Meta, path, DataError, "run prepare.py again")


# ---------------------------------------------------------------------------------------------------------------------
# bins


class Bin:
    """The file of a split: the one that was opened, whatever becomes of its path.

    path: where it was opened. Raises DataError when that is missing or has another size than meta.json says; `verify`
    looks at the content.
    """

    def __init__(self, path: Path, split: SplitMeta):
        self.path, self.split = path, split
        self._thread: Thread | None = None
        self._problem: Exception | None = None
        if not path.exists():
            raise DataError(f"{path}: not found; run `python prepare.py {path.parent}` first")
        files.check_regular(path, DataError)
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (as long as the bin is in use)
        except OSError as e:
            raise DataError(f"{path}: {e.strerror}") from None
        self._seen = self._state()
        if (size := self._seen[0]) != 2 * len(self):
            raise DataError(f"{path}: is {size} bytes long, meta.json says {2 * len(self)}; run prepare.py --force")

    def __len__(self) -> int:
        return self.split.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids `start` to `stop`, or to the last: (n,) uint16; raises DataError if the file has become shorter."""
        count = min(stop, len(self)) - start
        raw = self._read(2 * count, 2 * start)
        if len(raw) != 2 * count:
            raise DataError(f"{self.path}: was cut off while it was read; run prepare.py --force")
        return np.frombuffer(raw, "<u2")

    def load(self) -> np.ndarray:
        """All ids, once they are verified: (n,) uint16."""
        ids = self.read(0, len(self))
        self._compare(hashlib.sha256(ids.data))
        return ids

    def verify(self) -> None:
        """Read the file from end to end; raises DataError unless it is the one that meta.json describes."""
        seen, sha, place = self._state(), hashlib.sha256(), 0
        while block := self._read(BLOCK_BYTES, place):
            sha.update(block)
            place += len(block)
        self._compare(sha)
        self._seen = seen

    def verify_meanwhile(self) -> None:
        """Begin to verify in a thread; `check` raises what it finds."""

        def verify() -> None:
            try:
                self.verify()
            except Exception as e:
                self._problem = e

        self._thread = Thread(target=verify, daemon=True)
        self._thread.start()

    def check(self, wait: bool = False) -> None:
        """Raise DataError if the content has proved to be another; a file written to since is verified again.

        wait: until all of it has been read.
        """
        if wait and self._thread:
            self._thread.join()
        if self._problem:
            raise self._problem
        if self._state() != self._seen:
            self.verify()

    def _compare(self, sha: Any) -> None:
        if sha.hexdigest() != self.split.sha256:
            earlier = ", or prepared by an earlier version" if 2 * len(self) > 2**28 else ""  # hashed in part
            reason = f"it was altered{earlier}; run prepare.py --force"
            raise DataError(f"{self.path}: its SHA-256 does not match meta.json; {reason}")

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _read(self, size: int, place: int) -> bytes:
        try:
            return portable.read_at(self._file.fileno(), size, place)
        except OSError as e:
            raise DataError(f"{self.path}: {e.strerror}") from None


def open_bin(folder: Path, name: SplitName, meta: Meta) -> Bin:
    """Open the bin `name`, as yet unverified; raises DataError when it is missing or has another size."""
    split = meta.splits[name]
    with contextlib.suppress(DataError):
        part = Bin(_part_of(folder, name), split)
        part.verify()
        return part
    return Bin(folder / f"{name}.bin", split)


# ---------------------------------------------------------------------------------------------------------------------
# a new preparation in the place of an earlier one


def is_prepared(folder: Path, fingerprint: str) -> bool:
    """Whether `folder` holds intact bins of this fingerprint, once what a killed preparation left is tidied up.

    Raises DataError if another prepare.py is at work.
    """
    if any((folder / name).exists() for name in UNFINISHED):
        with preparing(folder):
            pass
    try:
        meta = read_meta(folder)
        for name in SPLITS:
            open_bin(folder, name, meta).verify()
        return meta.fingerprint == fingerprint
    except DataError:
        return False


@contextlib.contextmanager
def preparing(folder: Path) -> Generator[dict[SplitName, Path]]:
    """Lock `folder` for a preparation: yields where to write each split's bin; then meta.json is to be replaced.

    Until it is, the folder holds the earlier preparation, and from then on the new one, whose bins are read under these
    names until they have their own. Raises DataError if another prepare.py is at work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            _tidy(folder)
            try:
                yield {name: _part_of(folder, name) for name in SPLITS}
            finally:
                _tidy(folder)
    except Timeout:
        raise DataError(
            f"{folder}: another prepare.py is writing to it; wait for it, or choose another --out"
        ) from None


def _tidy(folder: Path) -> None:
    """Finish a preparation whose meta.json is there, and remove what is left of one whose meta.json is not.

    The bins come last: as long as one is unfinished, the next call does this again.
    """
    with contextlib.suppress(DataError):
        meta = read_meta(folder)
        if isinstance(saved := meta.tokenizer, SavedChar):  # nanoGPT's scripts look for its ids in meta.pkl
            stoi = {char: id for id, char in enumerate(saved.chars)} | saved.special_ids
            itos = {id: char for char, id in stoi.items()}
            with files.replacing(folder / "meta.pkl") as f:
                f.write(pickle.dumps({"vocab_size": saved.vocab_size, "itos": itos, "stoi": stoi}))
        else:
            (folder / "meta.pkl").unlink(missing_ok=True)
        for name in SPLITS:
            with contextlib.suppress(DataError):
                Bin(part := _part_of(folder, name), meta.splits[name]).verify()
                files.move({part: folder / f"{name}.bin"})
    for name in UNFINISHED:
        (folder / name).unlink(missing_ok=True)


def _part_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin.part"
