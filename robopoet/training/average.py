"""An average of a model's weights over its last steps, which predicts better than the last weights alone."""

import contextlib
from collections.abc import Iterator

import torch

from model import GPT
from robopoet.training.sharding import shard_like


class Average:
    """An exponential moving average of weights, of a sharded model its own shards (Polyak and Juditsky 1992).

    decay: what a step keeps of it; early, at step n, (1 + n) / (10 + n) if that is less, to forget the first weights.
    """

    def __init__(self, model: GPT, decay: float):
        self.model, self.decay = model, decay
        self.params = list(model.parameters())
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`."""
        kept = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), self.params, 1 - kept)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the average as its weights, and its own again afterwards."""
        own = [p.detach().clone() for p in self.params]
        self._copy(list(self.weights.values()))
        try:
            yield
        finally:
            self._copy(own)

    @torch.no_grad()
    def _copy(self, weights: list[torch.Tensor]) -> None:
        if hasattr(self.model, "reshard"):  # FSDP2 would keep the full embeddings of the last forward pass
            self.model.reshard()
        for p, weight in zip(self.params, weights, strict=True):
            p.copy_(weight)

    @torch.no_grad()
    def load(self, saved: dict[str, torch.Tensor]) -> None:
        """Take a checkpoint's average, which is not sharded; raises KeyError or RuntimeError if it does not fit."""
        for name, weight in self.weights.items():
            weight.copy_(shard_like(saved[name], weight))
