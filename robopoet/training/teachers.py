"""Models that teach a run: it learns their predictions beside the text's own tokens."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from configurator import ConfigError
from model import GPT, Sample
from robopoet.machine import Machine
from robopoet.text.dataset import Meta
from robopoet.training.folder import replaces
from robopoet.training.start import warn_of_other_splits
from robopoet.weights import checkpoint


def model_sha256(model: GPT) -> str:
    """The SHA-256, in hexadecimal, of a model on the CPU: of its weights, and of what they don't show."""
    sha = hashlib.sha256(f"{model.config.n_head} heads, GELU {model.config.gelu}".encode())
    for p in model.parameters():
        sha.update(p.detach().numpy())
    return sha.hexdigest()


class Teachers:
    """The checkpoints that cfg.teacher names (Hinton et al. 2015, arXiv:1503.02531); cfg: a TrainConfig.

    sha256: name -> hash. Raises ConfigError if one has another tokenizer than the dataset or a shorter context, or
    if the run would replace it, CheckpointError if it can't be read.
    """

    def __init__(self, cfg: Any, meta: Meta, machine: Machine):
        self.share, self.models, self.sha256 = cfg.teacher_share, [], {}
        for name in cfg.teacher.split(","):
            path = Path(name.strip())
            if replaces(Path(cfg.out_dir), path):
                raise ConfigError(f"teacher: {path} is what this run replaces; choose another out_dir")
            content = checkpoint.load(path)
            if checkpoint.tokenizer_of(content, path).to_json() != meta.tokenizer.to_json():
                raise ConfigError(f"teacher: {path} has another tokenizer than {cfg.dataset}")
            warn_of_other_splits(content, path, cfg.dataset, meta)
            model = checkpoint.build_model(content, path)
            self.sha256[str(path)] = model_sha256(model)
            if (context := model.config.block_size) < cfg.block_size:
                raise ConfigError(
                    f"teacher: {path} has a block_size of {context}, the run {cfg.block_size}; lower that"
                )
            self.models.append(model.requires_grad_(False).to(machine.device).eval())

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, sample: Sample | None) -> torch.Tensor:
        """The probabilities to learn: the models' mean for `share`, the text's own token for the rest.

        inputs, targets: (B, T) int64; with a sample, targets are places in it. Returns (B, T, V or the sample's size)
        float32.
        """
        keys = {"targets": targets, "sample": sample, "reduction": "none"}  # this loss takes the least memory
        first, *others = self.models
        probs = first(inputs, **keys)[0].softmax(-1, dtype=torch.float32)
        for model in others:
            probs += model(inputs, **keys)[0].softmax(-1, dtype=torch.float32)
        probs.mul_(self.share / len(self.models))
        own = targets[..., None]
        return probs.scatter_add_(2, own, probs.new_full(own.shape, 1 - self.share))
