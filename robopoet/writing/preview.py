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
    """What sample.py writes by default, in at most `n_tokens`, with `model`, which learns the dataset in `folder`.

    excerpts: style -> ids that it reads first.
    """

    def __init__(
        self,
        model: GPT,
        folder: Path,
        meta: Meta,
        tok: Tokenizer,
        machine: Machine,
        n_tokens: int,
        excerpts: dict[str, list[int]],
    ):
        self.poet = Poet.of_model(model, tok, machine, excerpts)
        self.folder, self.meta, self.n_tokens = folder, meta, n_tokens

    def __call__(self) -> dict[str, str | int]:
        """A sample's text and the words of its longest copy, unless the training text is too large to search."""
        self.poet.model.eval()
        (text,) = self.poet.write(max_new_tokens=self.n_tokens)
        copied = {"copied_words": len(self.originality.check(text).longest.split())} if self.originality else {}
        return {"text": text} | copied

    @functools.cached_property
    def originality(self) -> Originality | None:
        """The index of the training text, unless it is too large or can't be sorted here."""
        with contextlib.suppress(DataError):
            if self.meta.splits["train"].bytes <= LARGEST:
                return Originality(self.folder, self.meta.text_sha256, self.meta.identity)
        return None
