"""The part of a checkpoint beside its tensors, with types and ranges checked."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from model import GPTConfig
from robopoet import files
from robopoet.errors import CheckpointError, shorten
from robopoet.files import Count
from robopoet.text.tokenizer import Saved

NANOGPT_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
Amount = Annotated[float, msgspec.Meta(ge=0)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=2**40)]
ExportDtype = Literal["float16", "float32"]  # how a file for another program stores the weights
SAMPLING = {"temperature": 0.9, "top_k": 0, "top_p": 0.95}  # sample.py's, for other programs that take an export


class ModelArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """nanoGPT's seven model arguments; GPTConfig checks their values."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    bias: bool = True
    dropout: float = 0.0


class ModelExtra(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Model arguments that nanoGPT does not have."""

    gelu: str = "none"
    positions: str = "learned"
    norm: str = "layernorm"
    mlp: str = "gelu"
    n_kv_head: int | None = None
    n_inner: int | None = None
    rope_theta: float = 10_000.0


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
    tokenizer: Saved | None = None
    iter_num: Count = 0
    best_val_loss: float | None = None
    text_sha256: str = ""
    identity: dict[str, str] = field(default_factory=dict)  # the dataset's; older checkpoints have none
    licences: tuple[str, ...] = ()
    excerpts: dict[str, tuple[Count, ...]] = field(default_factory=dict)  # style -> what it reads before a prompt

    def __post_init__(self) -> None:
        GPTConfig(**self.shape)  # raises if there is no such model
        largest = max((id for ids in self.excerpts.values() for id in ids), default=0)
        if largest >= self.model_args.vocab_size:
            raise ValueError(f"an excerpt has id {largest}, the vocabulary {self.model_args.vocab_size}")

    @property
    def shape(self) -> dict[str, Any]:
        """All of the model's arguments: nanoGPT's, and ours or their defaults."""
        return msgspec.structs.asdict(self.model_args) | msgspec.structs.asdict(self.model_extra or ModelExtra())


def credit(name: str, licence: str) -> str:
    """What a checkpoint's licences say of the weights that it started from."""
    return printable(f"the model {name}: {licence}")


def printable(licence: str) -> str:
    """One that a file gives, as a line of printable characters."""
    return "".join(filter(str.isprintable, shorten(licence)))


def config_entries(config: GPTConfig) -> dict[str, dict[str, Any]]:
    """A model's shape as entries of a checkpoint: `model_args` (nanoGPT's seven) and `model_extra`."""
    values = dataclasses.asdict(config)
    extra = {key: value for key, value in values.items() if key not in NANOGPT_ARGS}
    return {"model_args": {key: values[key] for key in NANOGPT_ARGS}, "model_extra": extra}


def read_header(content: dict[str, Any], path: Path) -> Header:
    """The header in `content`, which was loaded from `path`; raises CheckpointError on a wrong type or range."""
    loss = content.get("best_val_loss")
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:  # nanoGPT saves a tensor
        content = content | {"best_val_loss": float(loss)}
    return files.convert(content, Header, path, CheckpointError, "it is not a checkpoint, or is damaged")


# ---------------------------------------------------------------------------------------------------------------------
# the state of a run; its tensors are checked where it is restored


@dataclass(frozen=True)
class SavedConfig:
    """The keys without which a config is none, and what else we read; train.py checks them all by its own rules."""

    dataset: str
    optimizer: str
    ema: float = 0.0


@dataclass(frozen=True)
class SavedGroup:
    """What we read of an optimizer's group: the numbers of its parameters. Its settings come from the config."""

    params: tuple[int, ...]


@dataclass(frozen=True)
class SavedOptimizer:
    """An optimizer's state_dict(). state: the number of a parameter -> name -> tensor."""

    state: dict[int, dict[str, Any]]
    param_groups: tuple[SavedGroup, ...]


@dataclass(frozen=True)
class SavedScaler:
    """What changes of a GradScaler."""

    scale: Annotated[float, msgspec.Meta(ge=2.0**-126, le=2.0**127)]
    _growth_tracker: Count


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint holds to resume a run.

    average: name -> tensor; empty if there is none. teachers: name -> SHA-256. What has a default is
    missing in older checkpoints.
    """

    model_extra: ModelExtra
    config: SavedConfig
    optimizer_states: tuple[SavedOptimizer, ...]
    scaler: SavedScaler | None  # a float16 run's
    iter_num: Count
    best_val_loss: Amount
    bad_evals: Count
    seconds: Seconds
    first_val_loss: Amount = math.inf
    best_iter: Count = 0
    other_s: Seconds = 0.0
    run_id: str = ""
    average: dict[str, Any] = field(default_factory=dict)
    teachers: dict[str, str] = field(default_factory=dict)


def read_run(content: dict[str, Any], path: Path) -> SavedRun:
    """The state of the run in `content`, which was loaded from `path`; raises CheckpointError if it has none."""
    if content.get("scaler") == {}:
        content = content | {"scaler": None}
    advice = f"it holds no run to resume; use --init_from={path}"
    return files.convert(content, SavedRun, path, CheckpointError, advice)
