"""Healing a prompt's end: the model writes the prompt's last word itself, in tokens as it learned them.

"Captain Ah" ends in other tokens than a text that goes on with "ab", and " Ahab" can't be chosen any more. So the model
reads the prompt without its last word, and until that stands there chooses among the tokens that agree with it.
"""

import bisect
import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import regex
import torch

from robopoet.text.tokenizer import BPETokenizer, Tokenizer

GIVEN_TOKENS, GIVEN_BYTES = 8, 64  # the most that is given back
WORD_CHARS = 1_000  # characters in which a prompt's last word is looked for


class Prompt(NamedTuple):
    """A prompt's text and its own ids; those that the model reads, at least one, and the bytes that it then writes."""

    text: str
    ids: list[int]
    read: list[int]
    rest: bytes = b""

    @property
    def before(self) -> str:
        """The text without what the model writes of it."""
        return self.text.removesuffix(self.rest.decode())


def heal(tok: Tokenizer, text: str, ids: list[int]) -> Prompt:
    """A prompt of these ids, whose last word the model writes if its tokens could have been others.

    The word is the last piece into which the tokenizer's pattern cuts the text, such as " Ahab", a space or a full
    stop; of a long one its last tokens. A line's end is none. If nothing else is left, a line's end is read.
    """
    if not isinstance(tok, BPETokenizer) or not text or text.endswith("\n"):
        return Prompt(text, ids, ids)
    *_, piece = _pattern(tok.pattern).finditer(text[-WORD_CHARS:])
    most, n, given = min(len(piece[0].encode()), GIVEN_BYTES), 0, b""
    for count in range(1, min(GIVEN_TOKENS, len(ids)) + 1):
        longer = tok.decode_bytes(ids[-count:])
        if len(longer) > most:
            break
        if longer[0] & 0xC0 != 0x80:  # a character begins here
            n, given = count, longer
    read = ids[: len(ids) - n]
    return Prompt(text, ids, read or tok.encode("\n"), given)


@functools.cache
def _pattern(pattern: str) -> regex.Pattern[str]:
    r"""A tokenizer's pattern; Python's \s has characters that are no white space to tiktoken."""
    return regex.compile(pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}"))


class Healing:
    """Which tokens can write what is left of a prompt's end."""

    def __init__(self, tok: BPETokenizer):
        self.tok, self.tokens = tok, tok.tokens
        self.ids = sorted(range(len(tok.tokens)), key=tok.tokens.__getitem__)
        self.ordered = [tok.tokens[id] for id in self.ids]
        self.fitting = functools.lru_cache(maxsize=1_000)(self._fitting)
        self._after = functools.lru_cache(maxsize=10_000)(self._search)

    def _fitting(self, before: bytes, left: bytes) -> np.ndarray:
        """The ids that may come next after the token `before` (b"": another text's) where `left` is to be written.

        They agree with it, and tokenizing what they write gives them again, with what must follow: the model has
        learned no other tokens, and can't go on from them.
        """
        return np.array(self._after(before, left) or self.agreeing(left), np.int64)

    def agreeing(self, left: bytes) -> list[int]:
        """The ids whose bytes begin with `left` or are its beginning."""
        found = []
        for n in range(1, len(left)):
            place = bisect.bisect_left(self.ordered, left[:n])
            found += self.ids[place : place + (self.ordered[place : place + 1] == [left[:n]])]
        first = bisect.bisect_left(self.ordered, left)
        last = bisect.bisect_right(self.ordered, left, lo=first, key=lambda token: token[: len(left)])
        return found + self.ids[first:last]

    def _search(self, before: bytes, left: bytes) -> list[int]:
        found = self._joined(before, self.agreeing(left))
        rests = ((id, left[len(self.tokens[id]) :]) for id in found)
        return [id for id, rest in rests if not rest or self._after(self.tokens[id], rest)]

    def _joined(self, before: bytes, ids: list[int]) -> list[int]:
        """Those of these ids that stay two tokens behind `before`; what is not whole characters can't be told."""
        if not before:
            return ids
        texts: dict[int, str] = {}
        for id in ids:
            try:
                texts[id] = (before + self.tokens[id]).decode()
            except UnicodeDecodeError:
                continue
        pairs = self.tok.encode_pieces(list(texts.values())) if texts else []
        merged = {id for id, pair in zip(texts, pairs, strict=True) if pair[-1] != id or len(pair) != 2}
        return [id for id in ids if id not in merged]


class Rest:
    """The end of a prompt that a text writes first: which ids may come next. left: the bytes that remain."""

    def __init__(self, healing: Healing, left: bytes):
        self.healing, self.left, self.before = healing, left, b""

    def __len__(self) -> int:
        return len(self.left)

    def ids(self, copying: Collection[int] = ()) -> np.ndarray:
        """The ids that may come next, (n,) int64; none of `copying` that writes beyond the prompt."""
        found = self.healing.fitting(self.before, self.left)
        if not len(copying):
            return found
        reach, copied = self.beyond(found), np.isin(found, list(copying))
        if (kept := found[~(reach & copied)]).size:
            return kept
        agreeing = np.array(self.healing.agreeing(self.left), np.int64)
        return agreeing[~self.beyond(agreeing)]

    def beyond(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Whether each id writes more than the prompt's end, (n,) bool."""
        return np.array([len(self.healing.tokens[id]) > len(self.left) for id in ids], np.bool)

    def given(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities, (V,), given that the prompt's end is written; -inf of all that write no more than that."""
        ids = self.ids()
        own, reach = torch.from_numpy(ids), torch.from_numpy(ids[self.beyond(ids)])
        found = torch.full_like(logprobs, -torch.inf)
        found[reach] = logprobs[reach] - logprobs[own].logsumexp(-1)
        return found

    def push(self, id: int) -> None:
        """Append an id to the text."""
        self.before, self.left = self.healing.tokens[id], self.left[len(self.healing.tokens[id]) :]
