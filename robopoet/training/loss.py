"""What a training loss compares, where that is not each token with the full vocabulary: sampled softmax, and teachers.

A sampled softmax compares a step's own ids with some of the others, not with all (Bengio and Senécal 2008, IEEE
Transactions on Neural Networks 19(4); Jean et al. 2015, arXiv:1412.2007). Teachers are models whose predictions a run
learns beside the text's own tokens (Hinton et al. 2015, arXiv:1503.02531).
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from model import GPT, Candidates, GPTConfig
from robopoet.errors import ConfigError
from robopoet.machine import Machine
from robopoet.ops import in_float64
from robopoet.text.dataset import Meta
from robopoet.text.windows import Split
from robopoet.training.folder import replaces
from robopoet.training.run import warn_of_other_splits
from robopoet.weights import checkpoint

WINDOW = 4096  # ids are counted in up to as many windows of as many tokens


def sampling_weights(split: Split, vocab_size: int, device: torch.device) -> torch.Tensor:
    """The power 0.75 of each id's frequency: (vocab_size,) float64, all above 0, on `device` if it has float64.

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
    rest = ordered.flip(0).cumsum(0).flip(0)  # each place's weight and all behind it
    factors = (size - torch.arange(len(ordered), device=ordered.device)) / rest  # c, if all places before are certain
    first = (factors * ordered <= 1 + 1e-9).int().argmax()
    return (weights * factors[first]).clamp(max=1)


class SampledSoftmax:
    """Draws the ids with which a step's targets are compared: all ids among the targets of all ranks, and some others.

    size: how many in all; at least a quarter of it are others.
    """

    def __init__(self, split: Split, vocab_size: int, size: int, machine: Machine):
        self.weights, self.size, self.machine = sampling_weights(split, vocab_size, machine.device), size, machine

    def __call__(self, targets: torch.Tensor) -> tuple[torch.Tensor, Candidates]:
        """This rank's targets, any shape, int64, as places among the candidates; -1 stays.

        All ranks call it together and get the same candidates. Others are drawn without replacement by systematic
        sampling (Madow 1949), with the default generator of the first rank's device. Minus the log of its probability
        is added to a drawn id's logit: so the sum of all ids' exponentials is estimated without bias.
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


def model_sha256(model: GPT) -> str:
    """The SHA-256, in hexadecimal, of a model on the CPU: of its weights, and of what they don't show."""
    c, plain = model.config, GPTConfig()
    kind = [f"{c.n_head} heads, GELU {c.gelu}"]
    kind += [f"{key} {getattr(c, key)}" for key in ("norm", "rope_theta") if getattr(c, key) != getattr(plain, key)]
    sha = hashlib.sha256(", ".join(kind).encode())
    for p in model.parameters():
        sha.update(p.detach().numpy().data)
    return sha.hexdigest()


class Teachers:
    """The checkpoints at `paths`, of whose mean prediction the loss takes `share`, for a run that writes to `out_dir`.

    sha256: path -> hash. Raises ConfigError if one has another tokenizer than the dataset or a shorter context than
    `block_size`, or if the run would replace it, CheckpointError if it can't be read.
    """

    def __init__(
        self, paths: list[str], share: float, block_size: int, out_dir: str, dataset: str, meta: Meta, machine: Machine
    ):
        self.share = share
        self.models: list[GPT] = []
        self.sha256: dict[str, str] = {}
        for path in map(Path, paths):
            if replaces(Path(out_dir), path):
                raise ConfigError(f"teacher: {path} is what this run replaces; choose another out_dir")
            content = checkpoint.load(path)
            if checkpoint.tokenizer_of(content, path).to_json() != meta.tokenizer.to_json():
                raise ConfigError(f"teacher: {path} has another tokenizer than {dataset}")
            warn_of_other_splits(content, path, dataset, meta)
            model = checkpoint.build_model(content, path)
            self.sha256[str(path)] = model_sha256(model)
            if (context := model.config.block_size) < block_size:
                raise ConfigError(f"teacher: {path} has a block_size of {context}, the run {block_size}; lower that")
            self.models.append(model.requires_grad_(False).to(machine.device).eval())

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, candidates: Candidates | None) -> torch.Tensor:
        """The probabilities to learn: the models' mean for `share`, the text's own token for the rest.

        inputs, targets: (B, T) int64; with candidates, targets are places among them. Returns (B, T, V or the
        number of candidates) float32.
        """
        keys = {"targets": targets, "candidates": candidates, "reduction": "none"}  # this loss takes the least memory
        first, *others = self.models
        probs = first(inputs, **keys)[0].softmax(-1, dtype=torch.float32)
        for model in others:
            probs += model(inputs, **keys)[0].softmax(-1, dtype=torch.float32)
        probs.mul_(self.share / len(self.models))
        own = targets[..., None]
        return probs.scatter_add_(2, own, probs.new_full(own.shape, 1 - self.share))
