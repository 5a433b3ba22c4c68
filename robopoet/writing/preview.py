"""What a run shows of its model at each evaluation: a sample, and how much of it is copied."""

import contextlib
import functools
from pathlib import Path

import numpy as np
import torch

from model import GPT
from robopoet.errors import DataError
from robopoet.machine import Machine
from robopoet.text.dataset import Meta
from robopoet.text.tokenizer import StreamDecoder, Tokenizer
from robopoet.writing.characters import Characters, find_characters
from robopoet.writing.generate import generate
from robopoet.writing.originality import Originality

LARGEST = 10_000_000  # bytes of a training text that is searched for copies: sorting it takes seconds


class Preview:
    """Samples of `n_tokens` tokens from a model that learns the dataset in `folder`."""

    def __init__(self, folder: Path, meta: Meta, tok: Tokenizer, machine: Machine, n_tokens: int):
        self.folder, self.meta, self.tok, self.machine, self.n_tokens = folder, meta, tok, machine, n_tokens

    def __call__(self, model: GPT) -> dict[str, str | int]:
        """A sample's text and the words of its longest copy, unless the text is too large to search.

        It continues a line end, and draws from a random stream of its own.
        """
        random, tok = torch.Generator(self.machine.device).manual_seed(0), self.tok
        characters = self.characters and self.characters.at(np.zeros(1, np.int64))

        def sample(logits: torch.Tensor) -> torch.Tensor:
            logits = logits[:, : len(tok.tokens)].float() / 0.8  # no special token
            ids = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
            if characters:
                if not characters.allow(ids).all():
                    ids = torch.multinomial(characters.mask(logits).softmax(-1), 1, generator=random)[:, 0]
                characters.push(ids)
            return ids

        model.eval()
        start = torch.tensor([tok.encode("\n") or [0]], device=self.machine.device)
        ids = [id.item() for id in generate(model, start, self.n_tokens, sample)]
        text = StreamDecoder(tok).push(ids)
        copied = {"copied_words": len(self.originality.check(text).longest.split())} if self.originality else {}
        return {"text": text} | copied

    @functools.cached_property
    def characters(self) -> Characters | None:
        """What keeps the sample valid UTF-8, if the tokenizer has tokens that hold only a part of a character."""
        return find_characters(self.tok, len(self.tok.tokens), self.machine.device)

    @functools.cached_property
    def originality(self) -> Originality | None:
        """The index of the training text, unless it is too large or can't be sorted here."""
        with contextlib.suppress(DataError):
            if self.meta.splits["train"].bytes <= LARGEST:
                return Originality(self.folder, self.meta.text_sha256, self.meta.identity)
        return None
