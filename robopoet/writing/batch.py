"""Passages that are generated together, and the rows that they have in the model."""

import torch

from robopoet.writing.passage import Passage
from robopoet.writing.sampler import Sampler


class Batch:
    """Passages that are generated together. Each has one row in the model for each style in its blend, side by side.

    sampler: of these passages. logprobs: also keep each token's log-probability.
    """

    def __init__(self, passages: list[Passage], sampler: Sampler, logprobs: bool):
        self.passages, self.sampler, self.logprobs = passages, sampler, logprobs
        self.styles = len(sampler.texts[0].weights)  # in the blend
        self.active = list(range(len(passages)))  # the passages that have rows, in the rows' order

    @property
    def is_done(self) -> bool:
        """Whether every passage is done."""
        return all(self.passages[i].done for i in self.active)

    def push(self, ids: torch.Tensor) -> list[str]:
        """Append each row's id, (rows,) int64, to its passage; returns the text that each passage releases."""
        next_ids = ids[:: self.styles].tolist()
        logprobs = self.sampler.logprobs.tolist() if self.logprobs else [None] * len(next_ids)
        released, texts = [""] * len(self.passages), self.sampler.texts
        for i, id, logprob, text in zip(self.active, next_ids, logprobs, texts, strict=True):
            passage = self.passages[i]
            released[i] = passage.get_stuck() if text.is_stuck else passage.push(id, logprob)
            if passage.n_new == passage.settings.max_new_tokens:
                released[i] += passage.finish()
        return released

    def drop_done(self) -> torch.Tensor | None:
        """Drop the rows of passages that are done; returns the rows to keep, int64, or None if all stay.

        On a GPU only when at least half are done: a CUDA graph must be captured again for another number of rows.
        """
        kept = [place for place, i in enumerate(self.active) if not self.passages[i].done]
        device = self.sampler.forbidden.device
        if len(kept) == len(self.active) or (device.type != "cpu" and 2 * len(kept) > len(self.active)):
            return None
        self.active = [self.active[place] for place in kept]
        self.sampler.arrange([self.sampler.texts[place] for place in kept])
        rows = [place * self.styles + style for place in kept for style in range(self.styles)]
        return torch.tensor(rows, device=device)
