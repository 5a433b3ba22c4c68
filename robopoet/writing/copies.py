"""Generating without copying: which tokens would complete a run of words that stands in the training text."""

import bisect
import functools
from typing import Self

from robopoet.text.tokenizer import Tokenizer
from robopoet.writing.originality import Originality


class FirstWords:
    """The ids of tokens by the first word of their text."""

    def __init__(self):
        self.found: dict[bytes, list[int]] = {}

    @functools.cached_property
    def ordered(self) -> list[bytes]:
        """The words, sorted; asked for once all tokens are added."""
        return sorted(self.found)

    def add(self, word: bytes, id: int) -> None:
        """Add a token."""
        self.found.setdefault(word, []).append(id)

    def ids(self, word: bytes, cut: bool) -> list[int]:
        """The tokens whose first word is `word`; cut: or begins with it. None if it is empty."""
        if not word or not cut:
            return self.found.get(word, [])
        first = bisect.bisect_left(self.ordered, word)
        last = bisect.bisect_left(self.ordered, word + b"\xff", lo=first)  # no byte of UTF-8
        return [id for longer in self.ordered[first:last] for id in self.found[longer]]


class Copies:
    """The runs of `n` words of a training text, and the tokens that may complete one.

    cut: a stop text may end a passage within a word, so a token is also left out if it writes a word that begins with
    one that would complete a run.
    """

    def __init__(self, originality: Originality, tok: Tokenizer, n: int, cut: bool = False):
        self.n, self.cut, self.tokens = n, cut, tok.tokens
        self.followers = functools.lru_cache(maxsize=10_000)(originality.followers)
        self.joining, self.opening = FirstWords(), FirstWords()  # tokens that go on with a word; that open one
        self.several: list[int] = []  # tokens that hold several words: left out, whatever they would complete
        for id, token in enumerate(tok.tokens):
            text = _decode(token)
            words = text.split()
            if len(words) > 1:
                self.several.append(id)
            elif words:
                (self.opening if text[0].isspace() else self.joining).add(_encode(words[0]), id)


class Copied:
    """The last words of a growing text: which ids would complete a run that is copied.

    A word counts as soon as it is there in full, even if letters could follow, so that a text may end anywhere.
    """

    def __init__(self, copies: Copies, text: str = ""):
        self.copies = copies
        self.words: tuple[bytes, ...] = ()  # the last n - 1 before the unfinished one
        self.unfinished = b""
        self._push(text.encode())

    def fork(self) -> Self:
        """The same text, to grow on its own."""
        other = type(self)(self.copies)
        other.words, other.unfinished = self.words, self.unfinished
        return other

    def push(self, id: int) -> None:
        """Append a token; a special one has no text."""
        if id < len(self.copies.tokens):
            self._push(self.copies.tokens[id])

    def ids(self) -> list[int]:
        """The ids that would complete a run."""
        copies, found = self.copies, list(self.copies.several)
        for word in self._followers(self.words):
            if word.startswith(self.unfinished):
                found += copies.joining.ids(word[len(self.unfinished) :], copies.cut)
        for word in self._followers((*self.words, self.unfinished) if self.unfinished else self.words):
            found += copies.opening.ids(word, copies.cut)
        return found

    def _push(self, more: bytes) -> None:
        text = _decode(self.unfinished + more)
        words = [_encode(word) for word in text.split()]
        self.unfinished = words.pop() if words and not text[-1].isspace() else b""
        if words:
            self.words = (*self.words, *words)[-(self.copies.n - 1) :]

    def _followers(self, words: tuple[bytes, ...]) -> frozenset[bytes]:
        """The words that follow the last n - 1 of these in the training text."""
        before = words[-(self.copies.n - 1) :]
        return self.copies.followers(before) if len(before) == self.copies.n - 1 else frozenset()


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
