"""How much of a passage is copied from the text that the model was trained on.

from robopoet.writing.originality import Originality
print(Originality(Path("data/robopoet"), text_sha256).check(passage).describe())
"""

import bisect
import textwrap
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import torch

from robopoet.errors import DataError
from robopoet.text.dataset import SplitName, read_meta
from robopoet.text.windows import open_split

LENGTHS = (4, 8, 12)  # a report says how many sequences of so many words are new
BETWEEN_WORKS = b"\xff"  # between works, so that no match runs from one into the next; never a byte of UTF-8
WORD = regex.compile(r"[\p{L}\p{M}\p{N}]")
SILENT = regex.compile(r"['’‘ʼ＇`´\p{Cf}\p{Default_Ignorable_Code_Point}]")  # apostrophes, soft hyphens, joiners
SPACELESS = regex.compile(r"(?V1)[[\p{Han}\p{Hiragana}\p{Katakana}]&&[\p{L}\p{N}]]")  # each character stands for a word


class _Folds(dict[int, str]):
    """What each code point is in the normal form of a text, worked out when it is first met."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        parts = unicodedata.normalize("NFD", char.casefold())
        folded = "".join("" if SILENT.match(part) else part if WORD.match(part) else " " for part in parts)
        self[code] = f" {char} " if SPACELESS.match(char) else folded
        return self[code]


_folds = _Folds()


def fold(text: str) -> str:
    """The text as a reader compares it: words of letters, digits and their marks, without case, parted by spaces.

    Apostrophes are dropped, so that o'er is one word; all else parts words, so that well-known is two. A Chinese
    character or a kana is a word. Character by character, so that fold(a + b) is fold(a) + fold(b).
    """
    return text.translate(_folds)


@dataclass(frozen=True)
class Report:
    """What `Originality.check` finds. Words are those of fold(): without case and punctuation.

    longest: the longest run of words that also occurs in the training text, joined by spaces; "" if none does.
    work: the first work that contains it. new: for n = 4, 8 and 12, the share of the passage's n-word sequences that
    do not occur in the training text; None if the passage has fewer than n words.
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
    """A searchable index of the text that a model was trained on: the train split and its suffix array.

    folder: of the dataset's bins. text_sha256, identity: of that dataset, from the checkpoint. Manber & Myers 1990,
    "Suffix arrays"; sorted by Yuta Mori's divsufsort. Raises DataError when the dataset is not prepared, is damaged,
    holds another text or cuts it elsewhere, or pydivsufsort is not installed.
    """

    def __init__(self, folder: Path, text_sha256: str, identity: dict[str, str] | None = None):
        meta = read_meta(folder)
        if meta.text_sha256 != text_sha256:
            raise DataError(
                f"{folder}/meta.json: text_sha256 is {meta.text_sha256}, the checkpoint was trained on "
                f"{text_sha256 or 'an unknown text'}; name the dataset that it was trained on"
            )
        if change := meta.changes(identity or {}).get("train"):
            raise DataError(f"{folder}: its train split is not the checkpoint's ({change}); prepare it as it was")
        self._works = [doc.name for doc in meta.splits["train"].documents]
        texts = (" ".join(fold(text).split()) for text in read_texts(folder, "train"))
        self._text = BETWEEN_WORKS.join(f" {text} ".encode() for text in texts)
        self._suffixes = _suffix_array(self._text)  # where each suffix starts, in the suffixes' order

    def check(self, text: str) -> Report:
        """How much of `text` occurs in the training text."""
        words = fold(text).split()
        passage = f" {' '.join(words)} ".encode()
        # where each space is: one before each word, and one at the end
        spaces = np.cumsum([0] + [len(word.encode()) + 1 for word in words]).tolist()
        lengths: list[int] = []  # from each word on, the longest match: how many words, and which
        runs: list[str] = []
        for first, start in enumerate(spaces[:-1]):
            stop = start + self._match_length(passage[start:])
            lengths.append(bisect.bisect_left(spaces, stop) - 1 - first)  # a word counts if the space after it matches
            runs.append(" ".join(words[first : first + lengths[-1]]))
        longest = max(runs, key=len, default="")
        return Report(longest, self._work(longest) if longest else "", {n: _share_new(lengths, n) for n in LENGTHS})

    def followers(self, words: tuple[bytes, ...], count: int = 1) -> frozenset[bytes]:
        """The next `count` words, joined by spaces, wherever these words stand in the training text."""
        query = b" %b " % b" ".join(words)
        begins = (self._places(query) + len(query)).tolist()
        return frozenset(self._text[begin : self._end(begin, count)] for begin in begins)

    def _end(self, begin: int, count: int) -> int:
        """Where `count` words from `begin` on end; `begin` itself where the text has no more."""
        end = begin - 1
        for _ in range(count):
            if (end := self._text.find(b" ", end + 1)) < 0:
                return begin
        return end

    def _match_length(self, query: bytes) -> int:
        """Length in bytes of the longest prefix of `query` that occurs in the training text."""
        # the suffix that shares the longest prefix is a neighbour of the place where `query` would be inserted
        i = bisect.bisect_left(self._suffixes, query, key=self._prefix(len(query)))
        neighbours = [self._text[start : start + len(query)] for start in self._suffixes[max(i - 1, 0) : i + 1]]
        return max(_common_prefix_length(query, neighbour) for neighbour in neighbours)

    def _work(self, run: str) -> str:
        """The name of the first work that contains `run`."""
        first = int(self._places(f" {run} ".encode()).min())
        return self._works[self._text.count(BETWEEN_WORKS, 0, first)]

    def _places(self, query: bytes) -> np.ndarray:
        """Where `query` stands in the training text."""
        prefix = self._prefix(len(query))
        first = bisect.bisect_left(self._suffixes, query, key=prefix)
        if first == len(self._suffixes) or prefix(self._suffixes[first]) != query:
            return self._suffixes[:0]  # most often, and found in half the time
        return self._suffixes[first : bisect.bisect_right(self._suffixes, query, lo=first, key=prefix)]

    def _prefix(self, length: int) -> Callable[[int], bytes]:
        """A sort key: the first `length` bytes of the suffix that starts at a place."""
        text = self._text
        return lambda start: text[start : start + length]


def _common_prefix_length(a: bytes, b: bytes) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _share_new(lengths: list[int], n: int) -> float | None:
    """The share of n-word sequences that match nowhere, given how many words match from each word on."""
    starts = lengths[: len(lengths) - n + 1] if n <= len(lengths) else []
    return sum(length < n for length in starts) / len(starts) if starts else None


def _suffix_array(text: bytes) -> np.ndarray:
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise DataError("originality: needs pydivsufsort: pip install pydivsufsort") from None
    return divsufsort(text)


def read_texts(folder: Path, split_name: SplitName) -> list[str]:
    """The text of each document of a split, decoded from its bin; raises DataError if the bin can't be used."""
    meta = read_meta(folder)
    tok = meta.load_tokenizer()
    split = open_split(folder, split_name, meta, 1, torch.device("cpu"))
    spans = zip(split.starts, split.stops, strict=True)
    return [tok.decode_bytes(split.read(start, stop).tolist()).decode(errors="replace") for start, stop in spans]
