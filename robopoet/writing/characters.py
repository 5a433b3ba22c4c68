"""Which ids keep a text valid UTF-8: a byte-level vocabulary has tokens that hold only a part of a character."""

import numpy as np
import torch

from robopoet.text.tokenizer import Tokenizer

# The states of a UTF-8 decoder: between characters; after bytes that need one, two or three more; after E0, ED, F0 and
# F4, which restrict the next byte (no longer form than needed, no surrogates, at most U+10FFFF); and after an error.
START, ONE, TWO, THREE, E0, ED, F0, F4, ERROR = range(9)
STEPS = [  # (state, first byte, last byte, next state); any other byte is an error. Unicode 16, table 3-7
    (START, 0x00, 0x7F, START),
    (START, 0xC2, 0xDF, ONE),
    (START, 0xE1, 0xEF, TWO),
    (START, 0xE0, 0xE0, E0),
    (START, 0xED, 0xED, ED),
    (START, 0xF1, 0xF3, THREE),
    (START, 0xF0, 0xF0, F0),
    (START, 0xF4, 0xF4, F4),
    (ONE, 0x80, 0xBF, START),
    (TWO, 0x80, 0xBF, ONE),
    (THREE, 0x80, 0xBF, TWO),
    (E0, 0xA0, 0xBF, ONE),
    (ED, 0x80, 0x9F, ONE),
    (F0, 0x90, 0xBF, TWO),
    (F4, 0x80, 0x8F, TWO),
]


def transitions(tok: Tokenizer, vocab_size: int) -> np.ndarray:
    """The state after each id in each state, (9, vocab_size) uint8.

    Ids that have no text, special tokens among them, may only stand between characters.
    """
    step = np.full((9, 256), ERROR, np.uint8)
    for state, first, last, after in STEPS:
        step[state, first : last + 1] = after
    lengths = np.array([len(token) for token in tok.tokens], np.int64)
    starts, raw = lengths.cumsum() - lengths, np.frombuffer(b"".join(tok.tokens), np.uint8)
    table = np.arange(9, dtype=np.uint8)[:, None].repeat(vocab_size, axis=1)
    for i in range(lengths.max(initial=0)):
        ids = np.flatnonzero(lengths > i)
        table[:, ids] = step[table[:, ids], raw[starts[ids] + i]]
    table[1:, len(lengths) :] = ERROR
    return table


class Characters:
    """Which ids texts may go on with, by the states of a decoder after each of them, (B,) int64, START at first.

    table: from transitions().
    """

    def __init__(self, table: np.ndarray, device: torch.device):
        self.table, self.allowed = table, torch.from_numpy(table != ERROR).to(device)  # (9, V)

    def allow(self, states: np.ndarray, ids: torch.Tensor) -> torch.Tensor:
        """Whether each text may go on with its id, (B,) int64 -> (B,) bool."""
        return torch.from_numpy(self.after(states, ids) != ERROR).to(ids.device)

    def mask(self, states: np.ndarray, logits: torch.Tensor) -> torch.Tensor:
        """Set the logits, (B, V), of all that each text may not go on with to -inf."""
        return torch.where(self.allowed[states], logits, -torch.inf)

    def after(self, states: np.ndarray, ids: torch.Tensor) -> np.ndarray:
        """The state of each text once it has gained its id, (B,) int64."""
        return self.table[states, ids.cpu().numpy()].astype(np.int64)


def find_characters(tok: Tokenizer, vocab_size: int, device: torch.device) -> Characters | None:
    """Those of a vocabulary; None if each of its tokens is whole characters."""
    table = transitions(tok, vocab_size)
    return Characters(table, device) if table[START].any() else None
