"""Healing a prompt's end: the model writes the prompt's last word itself, in tokens as it learned them.

"Captain Ah" ends in other tokens than a text that goes on with "ab", and " Ahab" can't be chosen any more. So the model
reads the prompt without its last word. Until that stands there, a text goes on with the prompt's own tokens, or with
one that begins with all that is left and may write more, each as likely as the model finds it given that the word is
written.
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
    """A prompt's text and its ids; those that the model reads, at least one, and those that it may write otherwise.

    rest: what these last ones write. is_text: whether it was given as a text, before which an excerpt may be read.
    """

    text: str
    ids: list[int]
    read: list[int]
    own: tuple[int, ...] = ()
    rest: bytes = b""
    is_text: bool = False

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
    return Prompt(text, ids, read or tok.encode("\n"), tuple(ids[len(read) :]), given)


@functools.cache
def _pattern(pattern: str) -> regex.Pattern[str]:
    r"""A tokenizer's pattern; Python's \s has characters that are no white space to tiktoken."""
    return regex.compile(pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"\P{White_Space}"))


class Healing:
    """A tokenizer's tokens by what they begin with."""

    def __init__(self, tok: BPETokenizer):
        self.tokens, self.ids = tok.tokens, np.array(sorted(range(len(tok.tokens)), key=tok.tokens.__getitem__))
        self.ordered = [tok.tokens[id] for id in self.ids.tolist()]

    def beginning(self, left: bytes) -> torch.Tensor:
        """The ids whose bytes begin with `left`, (n,) int64, at least one if it is a token."""
        first = bisect.bisect_left(self.ordered, left)
        last = bisect.bisect_right(self.ordered, left, lo=first, key=lambda token: token[: len(left)])
        return torch.from_numpy(self.ids[first:last])

    def odds(self, own: Sequence[int], logprobs: torch.Tensor) -> list[float]:
        """How likely what is left of a prompt's end is written, after each of its ids but the last; logarithms.

        logprobs: the model's, after each of those, (len(own) - 1, V).
        """
        found: list[float] = []
        for place in range(len(own) - 1, 0, -1):
            row, left = logprobs[place - 1], b"".join(self.tokens[id] for id in own[place:])
            ways = row[self.beginning(left)]
            if found:
                ways = torch.cat([ways, row[[own[place]]] + found[-1]])
            found.append(ways.logsumexp(0).item())
        return found[::-1]


class Rest:
    """The end of a prompt that a text writes first. own: the prompt's ids for it. odds: from Healing.odds().

    left: the bytes that remain.
    """

    def __init__(self, healing: Healing, own: Sequence[int], odds: Sequence[float]):
        self.healing, self.own, self.odds = healing, own, odds
        self.left, self.n_written = b"".join(healing.tokens[id] for id in own), 0

    def __len__(self) -> int:
        return len(self.left)

    def given(self, logits: torch.Tensor, copying: Collection[int] = ()) -> torch.Tensor:
        """Logits (V,) of the next token, given that the prompt's end is written; -inf of those that can't write it.

        copying: ids that are left out too, but where they write no more than the prompt.
        """
        found, ids = torch.full_like(logits, -torch.inf), self.healing.beginning(self.left)
        if len(copying):
            copied = set(copying)
            kept = [id for id in ids.tolist() if id not in copied or self.healing.tokens[id] == self.left]
            ids = torch.tensor(kept, dtype=torch.int64)
        found[ids] = logits[ids]
        own = self.own[self.n_written]
        if len(self.healing.tokens[own]) < len(self.left):
            found[own] = logits[own] + self.odds[self.n_written]
        return found

    def told(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (V,) given that the prompt's end is written; -inf of what writes no more than that."""
        found, ids = self.given(logprobs).log_softmax(-1), self.healing.beginning(self.left)
        nothing_new = [id for id in ids[:1].tolist() if self.healing.tokens[id] == self.left]  # it is the first of them
        found[[*nothing_new, self.own[self.n_written]]] = -torch.inf
        return found

    def push(self, id: int) -> None:
        """Append an id to the text."""
        self.left, self.n_written = self.left[len(self.healing.tokens[id]) :], self.n_written + 1
