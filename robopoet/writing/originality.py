"""How much of a passage is copied from the text that the model was trained on.

from robopoet.writing.originality import Originality
print(Originality(Path("data/robopoet"), text_sha256).check(passage).describe())
"""

import bisect
import contextlib
import hashlib
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.text.batches import Meta, check_bin, open_split, read_meta

LENGTHS = (4, 8, 12)  # of word sequences
FORMAT = 1  # of the cache; a higher one makes earlier ones stale
BETWEEN = b"\xff"  # parts the works, so that no run crosses from one to the next; never a byte of UTF-8


@dataclass(frozen=True)
class Report:
    """What `Originality.check` found; a word is what white space parts, so `thee,` is another word than `thee`.

    longest: the longest run of whole words that stands in the training text, a space between words; "" if none does.
    work: the name of the first work that has it. new: for 4, 8 and 12 words, the share of the passage's sequences of
    so many successive words, each place counted, that stand nowhere in the training text; None if it has no such
    sequence. Case and punctuation count; white space of any kind and length is one space, there and in the passage.
    """

    longest: str
    work: str
    new: dict[int, float | None]

    def describe(self) -> str:
        """Two lines for a terminal."""
        shares = [f"{share:.0%} of its {n}-word sequences" for n, share in self.new.items() if share is not None]
        longest = f'{len(self.longest)} characters, "{textwrap.shorten(self.longest, 80)}" ({self.work})'
        return (
            f"longest copy: {longest if self.longest else 'none'}\n"
            f"not in the training text: {', '.join(shares) or 'too short to tell'}"
        )


class Originality:
    """The training text of a dataset, ready to be searched: every place in it, in the order of what follows there.

    folder: of the bins; a suffix array of the train split (Manber & Myers 1990; sorted by Yuta Mori's divsufsort) is
    kept there. text_sha256: the checkpoint's hash of the text it was trained on. Raises DataError when the dataset is
    not prepared, damaged, or another text than that.
    """

    def __init__(self, folder: Path, text_sha256: str):
        meta = read_meta(folder)
        if meta.text_sha256 != text_sha256:
            raise DataError(
                f"{folder}/meta.json: text_sha256 is {meta.text_sha256}, the checkpoint was trained on "
                f"{text_sha256 or 'an unknown text'}; name the dataset that it was trained on"
            )
        self._works = [doc.name for doc in meta.splits["train"].documents]
        key = _fingerprint(folder, meta)
        cache = folder / "originality.npz"
        try:
            with np.load(cache) as saved:  # a zip, so every byte of these is under a CRC
                self._text, self._places = saved["text"].tobytes(), saved["places"]
                if str(saved["key"]) != key or len(self._text) != len(self._places):
                    raise ValueError("of another text, or with a header that calls for less than there is")
        except Exception:  # absent, stale, or whatever a damaged zip raises
            self._text = BETWEEN.join(f" {' '.join(text.split())} ".encode() for text in read_texts(folder, "train"))
            self._places = _suffix_array(self._text)
            _write(cache, key=key, text=np.frombuffer(self._text, np.uint8), places=self._places)

    def check(self, text: str) -> Report:
        """How much of `text` stands in the training text."""
        words = text.split()
        passage = f" {' '.join(words)} ".encode()
        spaces = np.cumsum([0] + [len(word.encode()) + 1 for word in words]).tolist()  # one before each word, and last
        known, runs = [], []  # for each word, how many words from it on stand together in the training text
        for first, start in enumerate(spaces[:-1]):
            stop = start + self._match(passage[start:])
            known.append(bisect.bisect_left(spaces, stop) - 1 - first)  # words with the space behind them
            runs.append(" ".join(words[first : first + known[-1]]))
        longest = max(runs, key=len, default="")
        return Report(longest, self._work(longest) if longest else "", {n: _share_new(known, n) for n in LENGTHS})

    def _match(self, wanted: bytes) -> int:
        """How many bytes `wanted` shares, from its first on, with the place where it shares most, at least 1."""
        # the places are in order, so the one that shares most stands beside where `wanted` would
        i = bisect.bisect_left(self._places, wanted, key=self._follows(len(wanted)))
        beside = [self._text[place : place + len(wanted)] for place in self._places[max(i - 1, 0) : i + 1]]
        return max(_shared(wanted, found) for found in beside)

    def _work(self, run: str) -> str:
        """The name of the first work that has `run`."""
        wanted = f" {run} ".encode()
        follows = self._follows(len(wanted))
        first = bisect.bisect_left(self._places, wanted, key=follows)
        last = bisect.bisect_right(self._places, wanted, lo=first, key=follows)
        return self._works[self._text.count(BETWEEN, 0, int(self._places[first:last].min()))]

    def _follows(self, length: int) -> Callable[[int], bytes]:
        text = self._text
        return lambda place: text[place : place + length]


def _shared(a: bytes, b: bytes) -> int:
    """How many first bytes are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _share_new(known: list[int], n: int) -> float | None:
    """The share of sequences of n words that are new, by how many words are known from each word on."""
    starts = known[: len(known) - n + 1] if n <= len(known) else []
    return sum(count < n for count in starts) / len(starts) if starts else None


def _suffix_array(text: bytes) -> np.ndarray:
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise DataError("originality: needs pydivsufsort: pip install pydivsufsort") from None
    return divsufsort(text)


def read_texts(folder: Path, split_name: str) -> list[str]:
    """The text of each document of a split, decoded from its bin; raises DataError when that can't be used."""
    meta = read_meta(folder)
    tok = tokenizer.from_json(meta.tokenizer)
    split = open_split(folder, split_name, meta, 1, torch.device("cpu"))
    ids = np.asarray(split.tokens).view(np.uint16)
    spans = zip(split.starts, split.stops, strict=True)
    return [tok.decode_bytes(ids[start:stop].tolist()).decode(errors="replace") for start, stop in spans]


def _fingerprint(folder: Path, meta: Meta) -> str:
    """A hash of all that the train split's text depends on."""
    check_bin(folder, "train", meta)
    return hashlib.sha256(msgspec.json.encode([FORMAT, meta.tokenizer, meta.splits["train"]])).hexdigest()


def _write(path: Path, **arrays: object) -> None:
    """Write the cache whole or not at all; where it can't be kept, it is made again each time."""
    part = path.with_name(path.name + ".part")
    with contextlib.suppress(OSError):
        try:
            with part.open("wb") as f:
                np.savez(f, **arrays)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
