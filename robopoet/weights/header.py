"""The part of a checkpoint beside its tensors, with types and ranges checked."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from robopoet import untrusted
from robopoet.errors import CheckpointError
from robopoet.text.tokenizer import SavedBPE, SavedChar
from robopoet.untrusted import Count

NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")

Size = Annotated[int, msgspec.Meta(ge=1, le=2**20)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
ExportDtype = Literal["float16", "float32"]  # of the weights in a file for another program


class ModelArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """nanoGPT's seven model arguments."""

    n_layer: Size
    n_head: Size
    n_embd: Size
    block_size: Size
    vocab_size: Size
    bias: bool = True
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd is {self.n_embd}, must be divisible by n_head, {self.n_head}")


class ModelExtra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Model arguments that nanoGPT does not have."""

    gelu: Literal["none", "tanh"] = "none"
    positions: Literal["learned", "rotary"] = "learned"


@dataclass(frozen=True)
class RunConfig:
    """The keys we read of the training config in a checkpoint."""

    dataset: str = ""
    optimizer: str = ""
    batch_size: Count = 1


@dataclass(frozen=True)
class Header:
    """A checkpoint without its tensors and the state of its run; nanoGPT's checkpoints have the first two fields."""

    model_args: ModelArgs
    config: RunConfig = RunConfig()
    model_extra: ModelExtra | None = None
    tokenizer: SavedBPE | SavedChar | None = None
    iter_num: Count = 0
    best_val_loss: float | None = None
    text_sha256: str = ""
    identity: dict[str, str] = field(default_factory=dict)  # of the dataset; older checkpoints have none
    licences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        args = self.model_args
        if self.model_extra is None or self.model_extra.positions == "learned":
            return
        if args.n_embd % (twice := 2 * args.n_head):  # pairs are rotated
            raise ValueError(f"n_embd is {args.n_embd}, must be divisible by twice n_head, {twice}")
        if args.block_size < 2:  # the first token stays in view
            raise ValueError("block_size is 1, must be at least 2 with rotary positions")

    @property
    def shape(self) -> dict[str, Any]:
        """All of the model's arguments: nanoGPT's, and ours or their defaults."""
        return msgspec.structs.asdict(self.model_args) | msgspec.structs.asdict(self.model_extra or ModelExtra())


def read_header(content: dict[str, Any], path: Path) -> Header:
    """The header in `content`, which was loaded from `path`; raises CheckpointError on a wrong type or range."""
    loss = content.get("best_val_loss")
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:  # nanoGPT saves a tensor
        content = content | {"best_val_loss": float(loss)}
    return untrusted.convert(content, Header, path, CheckpointError, "it is not a checkpoint, or is damaged")
