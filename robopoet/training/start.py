"""What a run starts from: nothing, a checkpoint's weights, or the run that a checkpoint was saved by."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from configurator import ConfigError, revise, warn
from robopoet.errors import CheckpointError
from robopoet.text.dataset import SPLITS, Meta
from robopoet.training.average import Average
from robopoet.training.folder import earlier_runs, replaces
from robopoet.training.optimizer import state_shapes
from robopoet.training.run import Progress
from robopoet.training.sharding import shard_like
from robopoet.untrusted import convert
from robopoet.weights import checkpoint
from robopoet.weights.header import NANOGPT_ARGS, SavedOptimizer, read_header, read_run

Config = TypeVar("Config")  # a TrainConfig
SHAPE = (*(key for key in NANOGPT_ARGS if key not in ("vocab_size", "dropout")), "positions")
OWN = ("out_dir", "init_from", "eval_only", "split")  # keys that no checkpoint decides


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from (None: from scratch), its path, and whether the run resumes."""

    content: dict[str, Any] | None
    path: Path
    resumes: bool

    def release(self) -> None:
        """Free the checkpoint's tensors once the run has copied them."""
        if self.content:
            self.content.clear()


def find_start(init_from: str, out: Path, eval_only: bool) -> Start:
    """What `init_from` names; raises ConfigError or CheckpointError if there is no such thing."""
    latest, previous = out / "ckpt.pt", out / "ckpt.prev.pt"
    if init_from == "scratch" or (init_from == "auto" and not latest.exists() and not previous.exists()):
        if eval_only:
            raise ConfigError(f"init_from: auto found no ckpt.pt in {out}; name one, e.g. --init_from=out/demo/best.pt")
        kept = [folder for folder in (out / "previous", *earlier_runs(out)) if (folder / "ckpt.pt").exists()]
        if init_from == "auto" and kept:
            warn(f"{out} has no ckpt.pt, a new run begins; --out_dir={kept[-1]} resumes the one there")
        return Start(None, latest, False)
    if init_from not in ("resume", "auto"):
        if not eval_only and replaces(out, Path(init_from)):
            raise ConfigError(f"init_from: {init_from} is what this run replaces; choose another out_dir")
        return Start(checkpoint.load(Path(init_from)), Path(init_from), False)
    try:
        return Start(checkpoint.load(latest), latest, True)
    except CheckpointError as e:
        if init_from == "resume" or not previous.exists():
            raise
        warn(f"{e}; resuming from {previous}")
        return Start(checkpoint.load(previous), previous, True)


def complete(cfg: Config, start: Start) -> Config:
    """`cfg` with the keys that were not given taken from the checkpoint.

    A resumed run and an evaluation take every key, a new run the model's shape. Raises CheckpointError if a given key
    contradicts that shape; only a new run may shorten block_size.
    """
    if start.content is None:
        return revise(cfg, init_from="scratch")  # auto found nothing
    if start.resumes and not cfg.eval_only:
        read_run(start.content, start.path)  # raises if there is none
    given = cfg.given | {field.name for field in dataclasses.fields(cfg) if getattr(cfg, field.name) != field.default}
    shape = read_header(start.content, start.path).shape
    taken = {key: shape[key] for key in SHAPE}
    problems = []
    for key in given.intersection(SHAPE):
        least = 2 if taken["positions"] == "rotary" else 1
        may_shorten = key == "block_size" and not start.resumes and least <= cfg.block_size < taken[key]
        if getattr(cfg, key) != taken[key] and not may_shorten:
            problems.append(f"{key}: the checkpoint has {taken[key]}, the config {getattr(cfg, key)}; leave it out")
    if problems:
        raise CheckpointError(f"{start.path}: " + "\n  ".join(problems))
    if (start.resumes or cfg.eval_only) and {"config", "model_extra"} <= start.content.keys():  # one of our own runs
        saved = convert(start.content["config"], type(cfg), start.path, CheckpointError, "its config is damaged")
        taken = {**dataclasses.asdict(saved), **taken}
        if cfg.eval_only:
            del taken["eval_iters"]  # the full split, however much of it the run read
        if "max_iters" in given:
            taken |= {"epochs": 0.0, "minutes": 0.0, "plans": ()}  # they would override it
    begun = {"init_from", "minutes"} if start.resumes and not cfg.eval_only else set()  # stay as the run began
    cfg = revise(cfg, **{key: value for key, value in taken.items() if key in begun or key not in given | {*OWN}})
    if problems := cfg.problems():
        raise CheckpointError(f"{start.path}: " + "; ".join(problems))
    return cfg


def differences(cfg: Config, saved: dict[str, Any]) -> str:
    """The keys of a resumed run that differ from its checkpoint's, as `max_iters 600 -> 900`."""
    keys = {key: value for key, value in dataclasses.asdict(cfg).items() if key in saved and key not in OWN}
    return ", ".join(f"{key} {saved[key]} -> {value}" for key, value in keys.items() if saved[key] != value)


def describe_resuming(cfg: Config, start: Start, progress: Progress) -> list[str]:
    """What a run that resumes prints first."""
    if not start.resumes:
        return []
    lines = [f"resuming from {start.path}, step {progress.iter_num}"]
    if changed := differences(cfg, start.content["config"]):
        lines.append(f"changed since the checkpoint: {changed}")
    if progress.iter_num >= cfg.max_iters:
        larger = "--epochs" if cfg.epochs and not cfg.minutes else "--max_iters"
        lines.append(f"finished: step {progress.iter_num} of max_iters {cfg.max_iters}; a larger {larger} trains on")
    return lines


def check_fit(start: Start, dataset: str, optimizer: str, meta: Meta) -> None:
    """Raise CheckpointError if the dataset or, on resuming, the optimizer is not the checkpoint's."""
    if start.content is None:
        return
    problems, path = [], start.path
    if start.resumes and start.content.get("text_sha256") != meta.text_sha256:
        raise CheckpointError(
            f"{path}: it was trained on another text than {dataset}; a new run can start from its weights: "
            f"prepare.py --tokenizer={path}, then --init_from={path} with another --out_dir"
        )
    theirs, ours = checkpoint.tokenizer_of(start.content, path).to_json(), meta.tokenizer.to_json()
    if not start.resumes:  # a new run may add special tokens to the checkpoint's
        ours["specials"] = ours["specials"][: len(theirs["specials"])]
    header = read_header(start.content, path)
    if start.resumes and (changes := meta.changes(header.identity)):
        problems.append(f"it was trained on another cut of {dataset}'s text, {_list(changes)}; prepare that as it was")
    elif theirs != ours:
        problems.append(f"its tokenizer is not the dataset's; prepare that again, with --tokenizer={path}")
    elif not start.resumes:
        warn_of_other_splits(start.content, path, dataset, meta)
    if start.resumes and (saved := header.config.optimizer) != optimizer:
        problems.append(f"optimizer: the checkpoint has {saved}, the config {optimizer}")
    if problems:
        raise CheckpointError(f"{path}: " + "\n  ".join(problems))


def warn_of_other_splits(content: dict[str, Any], path: Path, dataset: str, meta: Meta) -> None:
    """Warn that a checkpoint may have read what it is evaluated on: it was trained on other splits of the same text."""
    header = read_header(content, path)
    changes = meta.changes({key: length for key, length in header.identity.items() if key in SPLITS})
    if changes and header.text_sha256 == meta.text_sha256:
        warn(f"{path} was trained on another cut of {dataset}'s text and may have read its val split: {_list(changes)}")


def _list(changes: dict[str, str]) -> str:
    return ", ".join(f"{key} {change}" for key, change in changes.items())


def restore(
    start: Start,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    average: Average | None,
    teachers: dict[str, str],
) -> Progress:
    """Give optimizers, scaler and the weights' average their saved states; returns how far the run had come.

    teachers: name -> SHA-256. Raises CheckpointError unless all are such as this run itself would save.
    """
    path, saved = start.path, read_run(start.content, start.path)
    for name in teachers.keys() & saved.teachers.keys():
        if teachers[name] != saved.teachers[name]:
            raise CheckpointError(
                f"teacher: {name} is not the model that has taught this run so far; put that back, or begin a new run"
            )
    if any(weight.dtype is not torch.float32 for weight in start.content["model"].values()):
        raise CheckpointError(f"{path}: its weights are not all float32, as a run's are; use --init_from={path}")
    if len(saved.optimizer_states) != len(optimizers):
        found = len(saved.optimizer_states)
        raise CheckpointError(f"{path}: has the states of {found} optimizers, the run has {len(optimizers)}")
    for i, (optimizer, state) in enumerate(zip(optimizers, saved.optimizer_states, strict=True)):
        _restore_optimizer(optimizer, state, f"the states of its optimizer {i}", path, saved.iter_num)
    if average and (saved.average or saved.config.ema):  # a run may begin to average when it is resumed
        shapes = {name: weight.shape for name, weight in average.weights.items()}
        checkpoint.check_tensors(saved.average, shapes, "its averages", path, (torch.float32,))
        average.load(saved.average)
    if scaler.is_enabled() and saved.scaler:
        scaler.load_state_dict(scaler.state_dict() | dataclasses.asdict(saved.scaler))
    return Progress(**{field.name: getattr(saved, field.name) for field in dataclasses.fields(Progress)})


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: SavedOptimizer, what: str, path: Path, steps: int
) -> None:
    """Give `optimizer` what it kept of each parameter.

    Its settings stay: rates and decay, as the config may have changed, and `fused`, which places the states.
    """
    groups = optimizer.state_dict()["param_groups"]
    if [list(group.params) for group in saved.param_groups] != [group["params"] for group in groups]:
        raise CheckpointError(f"{path}: {what} are not of this model's parameters")
    kept = {f"{i}.{name}": tensor for i, state in saved.state.items() for name, tensor in state.items()}
    checkpoint.check_tensors(kept, state_shapes(optimizer), what, path, (torch.float32,))
    for name, tensor in kept.items():
        least, most = {"step": (0, steps), "exp_avg_sq": (0, math.inf)}.get(name.split(".")[1], (-math.inf, math.inf))
        if not ((tensor >= least) & (tensor <= most)).all():
            raise CheckpointError(f"{path}: {what}: {name} is below {least} or above {most}")
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    states = {  # contiguous: fused AdamW assumes it
        i: {name: shard_like(tensor.contiguous(), params[i]) for name, tensor in state.items()}
        for i, state in saved.state.items()
    }
    optimizer.load_state_dict({"state": states, "param_groups": groups})
