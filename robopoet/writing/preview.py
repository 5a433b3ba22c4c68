"""What a run shows of its model at each evaluation: a sample, and how much of it is copied."""

import contextlib
import functools
from pathlib import Path

from model import GPT
from robopoet.errors import DataError
from robopoet.machine import Machine
from robopoet.text.dataset import Meta
from robopoet.text.tokenizer import Tokenizer
from robopoet.writing.originality import Originality
from robopoet.writing.poet import Poet

LARGEST = 10_000_000  # bytes of a training text that is searched for copies: sorting it takes seconds


class Preview:
    """What sample.py writes by default, in at most `n_tokens`, with a model that learns the dataset in `folder`."""

    def __init__(self, folder: Path, meta: Meta, tok: Tokenizer, machine: Machine, n_tokens: int):
        self.folder, self.meta, self.tok, self.machine, self.n_tokens = folder, meta, tok, machine, n_tokens

    def __call__(self, model: GPT) -> dict[str, str | int]:
        """A sample's text and the words of its longest copy, unless the training text is too large to search."""
        model.eval()
        (text,) = Poet.of_model(model, self.tok, self.machine).write(max_new_tokens=self.n_tokens)
        copied = {"copied_words": len(self.originality.check(text).longest.split())} if self.originality else {}
        return {"text": text} | copied

    @functools.cached_property
    def originality(self) -> Originality | None:
        """The index of the training text, unless it is too large or can't be sorted here."""
        with contextlib.suppress(DataError):
            if self.meta.splits["train"].bytes <= LARGEST:
                return Originality(self.folder, self.meta.text_sha256, self.meta.identity)
        return None
