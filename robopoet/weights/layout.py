"""How other programs name and hold our tensors, as a table for each, and one way to rename by it."""

from dataclasses import dataclass, field

import torch

from model import GPT
from robopoet.errors import CheckpointError
from robopoet.weights.header import ExportDtype

Weights = dict[str, torch.Tensor]  # name -> tensor

OURS, C_ATTN = "transformer", ".attn.c_attn."
LEFT_OUT = ("lm_head.weight", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # the embeddings; constants


@dataclass(frozen=True)
class Layout:
    """The tensors of another program's model.

    prefix: what its names begin with, in place of our "transformer". names: a part of our names -> of its. qkv: its
    names of c_attn's three parts, if it holds them apart. transposed: endings of the matrices that it holds transposed.
    """

    prefix: str
    names: dict[str, str] = field(default_factory=dict)
    qkv: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()

    def theirs(self, weights: Weights) -> Weights:
        """Our weights, without lm_head.weight, under its names and in its shapes."""
        made = {}
        for name, w in weights.items():
            their_name = self.prefix + name.removeprefix(OURS)
            for ours, theirs in self.names.items():
                their_name = their_name.replace(ours, theirs)
            if self.qkv and C_ATTN in name:
                for part, rows in zip(self.qkv, w.chunk(3), strict=True):
                    made[their_name.replace(C_ATTN, part)] = rows.clone()
            else:
                made[their_name] = w.t() if name.endswith(self.transposed) else w
        return made

    def ours(self, weights: Weights) -> Weights:
        """The reverse of `theirs`; raises ValueError or RuntimeError if weights that become one don't fit."""
        found, parts = {}, {}
        for name, w in weights.items():
            name = f"{OURS}." + name.removeprefix(f"{self.prefix}.")
            for ours, theirs in self.names.items():
                name = name.replace(theirs, ours)
            if part := next((part for part in self.qkv if part in name), None):
                parts.setdefault(name.replace(part, C_ATTN), {})[part] = w
            elif not name.endswith(LEFT_OUT):
                found[name] = w.t() if name.endswith(self.transposed) and w.dim() == 2 else w
        for name, three in parts.items():
            if len(three) < 3 or len({(w.shape, w.dtype) for w in three.values()}) > 1:
                kinds = ", ".join(f"{part.split('.')[2]} {tuple(w.shape)} {w.dtype}" for part, w in three.items())
                raise ValueError(f"{name} needs q_proj, k_proj and v_proj of one shape and dtype, found {kinds}")
            found[name] = torch.cat([three[part] for part in self.qkv])
        return found


def in_dtype(weight: torch.Tensor, name: str, dtype: ExportDtype) -> torch.Tensor:
    """A finite `weight` in `dtype`; raises CheckpointError, which names it, if that can't hold one of its numbers."""
    cast = weight.to(getattr(torch, dtype))
    if not cast.isfinite().all():
        raise CheckpointError(f"export: {name} has numbers too large for {dtype}; use --export_dtype=float32")
    return cast


def with_biases(model: GPT) -> Weights:
    """The model's weights in float32, without lm_head.weight, the tied one; a bias that it lacks is zeros."""
    weights = {name: p.float() for name, p in model.state_dict().items() if name != "lm_head.weight"}
    for name, p in list(weights.items()):
        if name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight")):
            weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(p)))
    return weights
