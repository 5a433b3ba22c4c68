"""How other programs name and hold our tensors, as a table for each, and one way to rename by it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from model import GPT, GPTConfig
from robopoet.errors import CheckpointError
from robopoet.weights.header import ExportDtype

Weights = dict[str, torch.Tensor]  # name -> tensor

OURS, C_ATTN, C_FC = "transformer", ".attn.c_attn.", ".mlp.c_fc."
LEFT_OUT = ("lm_head.weight", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # the embeddings; constants


@dataclass(frozen=True)
class Layout:
    """The tensors of another program's model.

    prefix: what its names begin with, in place of our "transformer". names: a part of our names -> of its. apart:
    C_ATTN or C_FC -> its names of that tensor's parts, if it holds them apart. paired: those of them in which the
    numbers that rotary positions rotate together are neighbours. transposed: endings of the matrices that it holds
    transposed. biases: whether its layers have any.
    """

    prefix: str
    names: dict[str, str] = field(default_factory=dict)
    apart: dict[str, tuple[str, ...]] = field(default_factory=dict)
    paired: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    biases: bool = True

    def theirs(self, model: GPT) -> Weights:
        """A model's weights in float32, without lm_head.weight, the tied one, under its names and in its shapes.

        A bias that the model lacks is zeros, if the layout has biases.
        """
        made: Weights = {}
        c = model.config
        for name, w in _with_biases(model).items() if self.biases else _untied(model).items():
            their_name = self.prefix + name.removeprefix(OURS)
            for ours, theirs in self.names.items():
                their_name = their_name.replace(ours, theirs)
            their_name = their_name.removeprefix(".")  # it has no prefix
            if whole := next((whole for whole in self.apart if whole in name), None):
                for part, rows in zip(self.apart[whole], w.split(rows_of_parts(whole, c)), strict=True):
                    if part in self.paired:
                        rows = _regroup(rows, 2, c.head_size // 2)
                    made[their_name.replace(whole, part)] = rows.clone()
            else:
                made[their_name] = w.t() if name.endswith(self.transposed) else w
        return made

    def ours(self, weights: Weights, config: GPTConfig) -> Weights:
        """The reverse of `theirs`; raises ValueError or RuntimeError if weights that become one don't fit."""
        found: Weights = {}
        apart: dict[tuple[str, str], Weights] = {}
        for name, w in weights.items():
            name = f"{OURS}." + name.removeprefix(f"{self.prefix}.")  # some files leave it out
            for ours, theirs in self.names.items():
                name = name.replace(theirs, ours)
            whole, part = next(
                ((whole, part) for whole, parts in self.apart.items() for part in parts if part in name), ("", "")
            )
            if whole:
                apart.setdefault((name.replace(part, whole), whole), {})[part] = w
            elif not name.endswith(LEFT_OUT):
                found[name] = w.t() if name.endswith(self.transposed) and w.dim() == 2 else w
        for (name, whole), parts in apart.items():
            wanted = dict(zip(self.apart[whole], rows_of_parts(whole, config), strict=True))
            rows = {part: w.shape[0] if w.dim() else 0 for part, w in parts.items()}
            if rows != wanted or len({(w.shape[1:], w.dtype) for w in parts.values()}) > 1:
                rows = ", ".join(f"{n} of {part.split('.')[-2]}" for part, n in wanted.items())
                kinds = ", ".join(
                    f"{part.split('.')[-2]} {tuple(w.shape)} {w.dtype}" for part, w in sorted(parts.items())
                )
                raise ValueError(f"{name} needs rows of one length and dtype, {rows}; found {kinds}")
            for part in self.paired:
                if part in parts:
                    parts[part] = _regroup(parts[part], config.head_size // 2, 2)
            found[name] = torch.cat([parts[part] for part in wanted])
        return found


def rows_of_parts(whole: str, config: GPTConfig) -> list[int]:
    """The rows of the queries, keys and values in C_ATTN, or of the gate and the up matrix in C_FC."""
    if whole == C_FC:
        return [config.inner] * 2
    return [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]


def _regroup(rows: torch.Tensor, groups: int, size: int) -> torch.Tensor:
    """The rows of each head, which are `groups` groups of `size`: each group's first, then each group's second, ..."""
    return rows.unflatten(0, (-1, groups, size)).transpose(1, 2).reshape(rows.shape)


def in_dtype(weight: torch.Tensor, name: str, dtype: ExportDtype) -> torch.Tensor:
    """A finite `weight` in `dtype`; raises CheckpointError, which names it, if that can't hold one of its numbers."""
    cast = weight.to(getattr(torch, dtype))
    if not cast.isfinite().all():
        raise CheckpointError(f"export: {name} has numbers too large for {dtype}; use --export_dtype=float32")
    return cast


def _untied(model: GPT) -> Weights:
    return {name: p.float() for name, p in model.state_dict().items() if name != "lm_head.weight"}


def _with_biases(model: GPT) -> Weights:
    """The model's weights, and zeros for each bias that it lacks."""
    weights = _untied(model)
    for name, p in list(weights.items()):
        if name.endswith(".weight") and not name.endswith(("wte.weight", "wpe.weight")):
            weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(p)))
    return weights


class NoInit(TorchFunctionMode):
    """Skips initialisation: on the meta device it would import torch's compiler, two seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if getattr(func, "__module__", "") == "torch.nn.init" else func(*args, **kwargs)


def without_memory(config: GPTConfig, n_layer: int) -> GPT:
    """The model's first `n_layer` blocks and what is around them, on the meta device: a file may claim any size."""
    with torch.device("meta"), NoInit():
        return GPT(GPTConfig(**vars(config) | {"n_layer": n_layer}))
