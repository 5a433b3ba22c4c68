"""Generating without copying: which tokens would complete a run of words that stands in the training text."""

import bisect
import codecs
import functools
from typing import Self

from robopoet.text.tokenizer import Tokenizer
from robopoet.writing.originality import Originality, fold


class Written:
    """Tokens by the words that they write, joined by spaces: by all of them and by the first few."""

    def __init__(self):
        self.found: dict[bytes, list[int]] = {}

    @functools.cached_property
    def ordered(self) -> list[bytes]:
        """What is written, sorted; asked for once all tokens are added."""
        return sorted(self.found)

    def add(self, words: list[str], id: int) -> None:
        """Add a token."""
        for n in range(1, len(words) + 1):
            self.found.setdefault(" ".join(words[:n]).encode(), []).append(id)

    def ids(self, words: bytes, cut: bool) -> list[int]:
        """The tokens whose first words are these; cut: or begin with these. None if there are none."""
        if not words or not cut:
            return self.found.get(words, [])
        first = bisect.bisect_left(self.ordered, words)
        last = bisect.bisect_left(self.ordered, words + b"\xff", lo=first)  # no byte of UTF-8
        return [id for longer in self.ordered[first:last] for id in self.found[longer]]


class Continuations:
    """What the tokens write that can follow the bytes of an unfinished character, `begun`.

    joining: they go on with a word. opening: they begin another. most: words that a token writes at most. long: tokens
    that write `n` words or more, which is a copy if the tokens were learned from the text.
    """

    def __init__(self, tokens: list[bytes], begun: bytes, n: int):
        self.joining, self.opening = Written(), Written()
        self.most = 1
        self.long: list[int] = []
        for id, token in enumerate(tokens):
            if (0x80 <= token[0] < 0xC0) == bool(begun):
                text = fold(_decode(begun + token)[0])
                words = text.split()
                if len(words) >= n:
                    self.long.append(id)
                elif words:
                    (self.opening if text[0] == " " else self.joining).add(words, id)
                    self.most = max(self.most, len(words))


class Copies:
    """The runs of `n` words of a training text, and the tokens that may complete one.

    cut: a stop text may end a passage within a word, so a token is also left out if it writes a word that begins with
    one that would complete a run.
    """

    def __init__(self, originality: Originality, tok: Tokenizer, n: int, cut: bool = False):
        self.n, self.cut, self.tokens = n, cut, tok.tokens
        self.followers = functools.lru_cache(maxsize=10_000)(originality.followers)
        self.continuations = functools.lru_cache(maxsize=1_000)(functools.partial(Continuations, tok.tokens, n=n))


class Copied:
    """The last words of a growing text: which ids would complete a run that is copied.

    A word counts as soon as it is there in full, even if letters could follow, so that a text may end anywhere.
    """

    def __init__(self, copies: Copies, text: str = ""):
        self.copies = copies
        self.words: tuple[bytes, ...] = ()  # the last n - 1 before the unfinished one
        self.unfinished = b""
        self.begun = b""  # the bytes of an unfinished character
        self._push(text.encode())

    def fork(self) -> Self:
        """The same text, to grow on its own."""
        other = type(self)(self.copies)
        other.words, other.unfinished, other.begun = self.words, self.unfinished, self.begun
        return other

    def push(self, id: int) -> None:
        """Append a token; a special one has no text."""
        if id < len(self.copies.tokens):
            self._push(self.copies.tokens[id])

    def ids(self) -> list[int]:
        """The ids that would complete a run."""
        cut, continuations = self.copies.cut, self.copies.continuations(self.begun)
        before = (*self.words, self.unfinished) if self.unfinished else self.words
        found = list(continuations.long)
        for count in range(1, continuations.most + 1):  # the run ends with the token's word of this number
            for words in self._followers(self.words, count):
                if words.startswith(self.unfinished):
                    found += continuations.joining.ids(words[len(self.unfinished) :], cut)
            for words in self._followers(before, count):
                found += continuations.opening.ids(words, cut)
        return found

    def _push(self, more: bytes) -> None:
        text, self.begun = _decode(self.begun + more)
        text = self.unfinished.decode() + fold(text)
        words = [word.encode() for word in text.split()]
        self.unfinished = words.pop() if words and text[-1] != " " else b""
        if words:
            self.words = (*self.words, *words)[-(self.copies.n - 1) :]

    def _followers(self, words: tuple[bytes, ...], count: int) -> frozenset[bytes]:
        """The next `count` words wherever the last of these stand in the training text, n words in all."""
        before = words[-(self.copies.n - count) :]
        return self.copies.followers(before, count) if len(before) == self.copies.n - count else frozenset()


def _decode(raw: bytes) -> tuple[str, bytes]:
    """The text of these bytes, and those of a character that is unfinished at the end."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(raw), decoder.getstate()[0]
