"""Sampled softmax: a training loss that compares a step's own ids with a sample of the others, not with all.

Bengio and Senécal 2008, IEEE Transactions on Neural Networks 19(4); Jean et al. 2015, arXiv:1412.2007.
"""

import numpy as np
import torch

from model import Sample
from robopoet.machine import Machine
from robopoet.ops import in_float64
from robopoet.text.dataset import Split

WINDOW = 4096  # ids are counted in up to as many windows of as many tokens


def sampling_weights(split: Split, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Of each id, the power 0.75 of its frequency: (vocab_size,) float64, all above 0, on `device` if it has float64.

    The power is word2vec's (Mikolov et al. 2013, arXiv:1310.4546). A large split is counted in parts spread over it.
    """
    windows = min(-(-len(split.tokens) // WINDOW), WINDOW)
    starts = np.linspace(0, len(split.tokens), windows, endpoint=False).astype(np.int64)
    counts = torch.bincount(split.gather(starts, WINDOW, device).flatten(), minlength=vocab_size)
    return in_float64(counts + 1) ** 0.75


def inclusion_probabilities(weights: torch.Tensor, size: int) -> torch.Tensor:
    """min(1, c weights), with the c for which they add up to `size`: (V,) float64.

    weights: (V,) float64, above 0; V >= size.
    """
    ordered = weights.sort(descending=True).values
    rest = ordered.flip(0).cumsum(0).flip(0)  # of each place and those behind it
    factors = (size - torch.arange(len(ordered), device=ordered.device)) / rest  # c, if all places before are certain
    first = (factors * ordered <= 1 + 1e-9).int().argmax()
    return (weights * factors[first]).clamp(max=1)


class SampledSoftmax:
    """Draws the ids with which a step's targets are compared: all ids among the targets of all ranks, and some others.

    size: how many in all; at least a quarter of it are others.
    """

    def __init__(self, split: Split, vocab_size: int, size: int, machine: Machine):
        self.weights, self.size, self.machine = sampling_weights(split, vocab_size, machine.device), size, machine

    def __call__(self, targets: torch.Tensor) -> tuple[torch.Tensor, Sample]:
        """This rank's targets, any shape, int64, as places among the ids of the sample; -1 stays.

        All ranks call it together and get the same sample. Others are drawn without replacement by systematic sampling
        (Madow 1949), with the default generator of the first rank's device. Minus the log of its probability is added
        to a drawn id's logit: so the sum of all ids' exponentials is estimated without bias.
        """
        device, targets = targets.device, targets.to(self.weights.device)
        own = torch.zeros_like(self.weights, dtype=torch.bool)
        own[targets[targets >= 0]] = True
        own = self.machine.all_reduce(own.float()) > 0
        ids, others = own.nonzero()[:, 0], (~own).nonzero()[:, 0]
        shifts = torch.zeros_like(ids, dtype=torch.float32)
        n_drawn = min(max(self.size - len(ids), self.size // 4), len(others))
        if n_drawn:
            probs = inclusion_probabilities(self.weights[others], n_drawn)
            point = torch.rand((), device=own.device)  # the first rank's is taken
            point = self.machine.all_reduce(point * self.machine.is_main).double()
            points = torch.arange(n_drawn, device=own.device) + point
            drawn = torch.searchsorted(probs.cumsum(0), points, right=True)
            ids, shifts = torch.cat([ids, others[drawn]]), torch.cat([shifts, -probs[drawn].log().float()])
        places = torch.zeros_like(own, dtype=torch.int64)
        places[ids] = torch.arange(len(ids), device=own.device)
        places = torch.where(targets >= 0, places[targets.clamp(min=0)], -1)
        return places.to(device), (ids.to(device), shifts.to(device))
