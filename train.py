"""Train a GPT, in one process or many; or evaluate a checkpoint.

python train.py config/demo.yaml --max_iters=500
torchrun --standalone --nproc_per_node=2 train.py config/robopoet.yaml
python train.py config/demo.yaml --eval_only=true --split=test --init_from=out/demo/best.pt
"""

import contextlib
import dataclasses
import fcntl
import functools
import math
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import configurator
from configurator import ConfigError, bounds
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError, DataError, DivergedError, RankError
from robopoet.machine import Machine, Signals, find_machine, why_no_compile
from robopoet.recording import Graphed
from robopoet.text import tokenizer
from robopoet.text.batches import (
    EvalPlan,
    Meta,
    Split,
    TrainWindows,
    eval_batches,
    find_dataset,
    open_split,
    read_meta,
)
from robopoet.training.log import Log, Meter, Sink, describe, status, tensorboard_sink, wandb_sink
from robopoet.training.optimizer import configure_optimizers, shared_as, whole
from robopoet.untrusted import convert
from robopoet.weights import checkpoint
from robopoet.writing.generate import generate


@dataclass(frozen=True)
class TrainConfig:
    """The keys of train.py; those that nanoGPT has too are called as there.

    given: those that a person gave, on the command line or in YAML.
    """

    given: ClassVar[frozenset[str]] = frozenset()

    # the run
    out_dir: str = "out"  # where checkpoints and metrics.jsonl go
    init_from: str = "scratch"  # scratch, resume, auto (resume if there is something to), a checkpoint, or gpt2
    eval_only: bool = False  # evaluate `split` and stop
    split: Literal["val", "test", "train"] = "val"  # which split eval_only evaluates
    seed: int = 1337  # of initialisation, order of windows, and dropout
    # data
    dataset: str = "robopoet"  # a folder that prepare.py filled, or its name under data/
    batch_size: int = 32  # rows of a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches of a step, over all ranks
    block_size: int = 128  # tokens of a row
    tag_prob: float = 0.9  # share of rows that begin with their style's tag
    # model
    n_layer: int = 6  # blocks
    n_head: int = 8  # attention heads
    n_embd: int = 256  # width
    dropout: float = 0.1  # probability, after embeddings, attention and MLP
    bias: bool = True  # biases in Linear and LayerNorm
    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # muon trains the blocks' matrices, AdamW the rest or all
    learning_rate: float = 1e-2  # AdamW's peak; alone it bears a tenth of that
    muon_learning_rate: float = 0.02  # Muon's peak; follows the same schedule
    weight_decay: float = 0.1  # of matrices and embeddings, decoupled
    beta1: float = 0.8  # AdamW's first moment
    beta2: float = 0.99  # AdamW's second moment
    grad_clip: float = 1.0  # largest gradient norm (0: no clipping)
    # schedule
    max_iters: int = 600  # optimizer steps in all
    epochs: float = 0.0  # passes over the train split; overrides max_iters unless 0
    decay_lr: bool = True  # decay by half a cosine (false: constant after warmup)
    warmup_iters: int = 20  # steps of linear warmup; if not given, it fits a short run
    lr_decay_iters: int = 0  # step at which min_lr is reached (0: the last)
    min_lr: float = 0.0  # learning rate from there on
    # evaluation and logs
    eval_interval: int = 200  # steps between evaluations, each of which saves
    eval_iters: int = 0  # batches of an evaluation (0: the whole split)
    patience: int = 0  # evaluations without a better val loss before stopping (0: never)
    log_interval: int = 10  # steps between status lines
    tensorboard: bool = False  # write events to out_dir
    wandb: Literal["off", "online", "offline"] = "off"  # Weights & Biases
    wandb_project: str = "robopoet"  # its project
    wandb_run_name: str = ""  # its name for this run (out_dir's unless given)
    # machine
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: the fastest
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: on CUDA alone, eager is faster on CPU
    record: bool = False  # replay each step as a CUDA graph: faster, but not yet proven on a GPU; one process alone
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of torch.distributed
    timeout_s: float = 600.0  # how long a rank waits for the others before it gives up
    shard: bool = False  # FSDP2: weights, gradients and optimizer states shared out among ranks

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all ranks and micro-batches."""
        return self.gradient_accumulation_steps * self.batch_size

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = bounds(self, "batch_size gradient_accumulation_steps block_size n_layer n_head n_embd", 1)
        found += bounds(self, "max_iters eval_interval log_interval", 1)
        found += bounds(self, "warmup_iters lr_decay_iters eval_iters patience epochs grad_clip weight_decay min_lr", 0)
        found += bounds(self, "tag_prob", 0, 1) + bounds(self, "dropout beta1 beta2", 0, 0.9999)
        found += bounds(self, "learning_rate muon_learning_rate", 1e-12) + bounds(self, "seed", 0, 2**63 - 1)
        found += bounds(self, "timeout_s", 1)
        if self.n_head > 0 and self.n_embd % self.n_head:
            found.append(f"n_embd: found {self.n_embd}, must be divisible by n_head, {self.n_head}")
        if self.decay_lr and self.min_lr > self.learning_rate:
            found.append(f"min_lr: found {self.min_lr}, must be at most learning_rate, {self.learning_rate}")
        if self.eval_only and self.init_from == "scratch":
            found.append("init_from: found scratch, but eval_only needs a checkpoint: --init_from=out/demo/best.pt")
        return found


# ---------------------------------------------------------------------------------------------------------------------
# the parts; bench times these very functions


def micro_batches(cfg: TrainConfig, machine: Machine) -> tuple[int, int]:
    """How many micro-batches a step has on each rank, and their rows; raises ConfigError if the ranks can't share."""
    rows = cfg.rows_per_step
    if rows % machine.world_size:
        raise ConfigError(
            f"batch_size: {cfg.gradient_accumulation_steps} x {cfg.batch_size} = {rows} rows a step can't be shared "
            f"equally by {machine.world_size} ranks; choose a multiple"
        )
    share = rows // machine.world_size
    count = math.ceil(share / cfg.batch_size)
    while share % count:  # equal micro-batches of at most batch_size rows
        count += 1
    return count, share // count


def lr_at(step: int, cfg: TrainConfig) -> float:
    """The share of its peak that a learning rate has at `step`: linear warmup, then half a cosine down to min_lr."""
    floor = cfg.min_lr / cfg.learning_rate
    last = cfg.lr_decay_iters or cfg.max_iters
    if step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    if not cfg.decay_lr:
        return 1.0
    if step >= last:
        return floor
    progress = (step - cfg.warmup_iters) / (last - cfg.warmup_iters)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def new_model(cfg: TrainConfig, vocab_size: int) -> GPT:
    """A freshly initialised model of the shape that `cfg` asks for, the same for the same seed."""
    torch.manual_seed(cfg.seed)
    shape = {key: getattr(cfg, key) for key in checkpoint.NANOGPT_ARGS if key != "vocab_size"}
    return GPT(GPTConfig(vocab_size=vocab_size, **shape))


def dropout_seed(*place: int) -> int:
    """A seed of its own for each (seed, step, rank), so that no random state needs saving."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


@dataclass
class State:
    """What a step works on. `forward` is `model`, compiled and wrapped as the run wants it.

    trouble: (2,) int64 on the device, the first step whose loss or gradient was not finite on any rank (-1: none so
    far) and whether this rank's loss was not. sync_next: told before each backward whether ranks average its gradients.
    """

    model: GPT
    forward: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    trouble: torch.Tensor
    sync_next: Callable[[bool], None] = lambda wanted: None
    graphed_update: Graphed | None = None


def build_state(cfg: TrainConfig, machine: Machine, model: GPT) -> State:
    """Move `model` to the device, or this rank's share of it, compile and wrap it, and make its optimizers."""
    sharded = cfg.shard and machine.world_size > 1
    if sharded:  # each module is moved as it is shared out: no device ever has the whole model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # logits: no one writes into them
        mesh = init_device_mesh(machine.device.type, (machine.world_size,))
        for module in (*model.transformer.h, model):
            fully_shard(module, mesh=mesh)
    else:
        model.to(machine.device)
    records = cfg.record and machine.device.type == "cuda" and machine.world_size == 1
    if cfg.record and not records:
        configurator.warn("record: needs a CUDA device and one process alone; going on unrecorded")
    betas = (cfg.beta1, cfg.beta2)
    rates = cfg.learning_rate, cfg.muon_learning_rate
    optimizers = configure_optimizers(model, cfg.optimizer, *rates, cfg.weight_decay, betas, machine.dtype, records)
    forward: torch.nn.Module = model
    if cfg.compile == "true" or (cfg.compile == "auto" and machine.device.type == "cuda"):
        if reason := why_no_compile(machine.device):
            configurator.warn(f"compile: {reason} on this machine; going on uncompiled")
        else:
            forward = torch.compile(model)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype is torch.float16)
    state = State(model, forward, optimizers, scaler, torch.tensor([-1, 0], device=machine.device))
    if sharded:
        state.sync_next = model.set_requires_gradient_sync
    elif machine.world_size > 1:
        state.forward = DistributedDataParallel(forward)
        state.sync_next = functools.partial(setattr, state.forward, "require_backward_grad_sync")
    if records:
        state.graphed_update = Graphed(functools.partial(update, state, cfg, machine))
    return state


def rows_of(step: int, rank: int, cfg: TrainConfig, machine: Machine) -> tuple[int, int]:
    """The first of the rows that a rank has in a step, and how many they are."""
    count, rows = micro_batches(cfg, machine)
    return step * cfg.rows_per_step + rank * count * rows, count * rows


def train_step(
    state: State, windows: TrainWindows, cfg: TrainConfig, machine: Machine, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on global batch `step`; returns this rank's mean loss (nats/token) and the gradient norm.

    Both are scalars on the device: reading them waits for it. If either is not finite on any rank, nothing is updated
    and state.trouble says so.
    """
    inputs, targets = windows.batch(*rows_of(step, machine.rank, cfg, machine), machine.device)
    machine.seed(dropout_seed(cfg.seed, step, machine.rank))
    number = torch.full((), step, device=machine.device)
    if state.graphed_update:
        rate = torch.full((), lr_at(step, cfg), device=machine.device)  # a number would be recorded as it is now
        return state.graphed_update(inputs, targets, number, rate)
    return update(state, cfg, machine, inputs, targets, number, lr_at(step, cfg))


def update(
    state: State,
    cfg: TrainConfig,
    machine: Machine,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    step: torch.Tensor,
    rate: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, backward and optimizers on a rank's rows (rows, T), without waiting for the device; as train_step.

    step: its number, int64 scalar. rate: the share of its peak that each learning rate has. Gradients are synchronised
    once, in the last micro-batch.
    """
    state.forward.train()
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
    count, rows = micro_batches(cfg, machine)
    total = torch.zeros((), device=machine.device)
    for micro, (x, y) in enumerate(zip(inputs.split(rows), targets.split(rows), strict=True)):
        state.sync_next(micro == count - 1)
        with machine.autocast():
            _, loss = state.forward(x, y)
        state.scaler.scale(loss / count).backward()
        total += loss.detach() / count
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    if state.scaler.is_enabled():  # if one optimizer may not step, none does
        flags = [flag for o in state.optimizers for flag in state.scaler._found_inf_per_device(o).values()]
        overflow = torch.stack(flags).amax()
        for flag in flags:
            flag.copy_(overflow)
    norm = whole(torch.nn.utils.clip_grad_norm_(state.model.parameters(), cfg.grad_clip or math.inf))
    bad = look_for_trouble(state, machine, step, total, norm)
    for optimizer in state.optimizers:
        reads_verdict = optimizer.defaults.get("fused") is not False  # AdamW unfused, as on MPS, does not
        if reads_verdict and not state.scaler.is_enabled():
            optimizer.found_inf = bad  # read on the device: nothing waits
        if reads_verdict or not bad:
            state.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    state.scaler.update()
    return total, norm


def look_for_trouble(
    state: State, machine: Machine, step: torch.Tensor, loss: torch.Tensor, norm: torch.Tensor
) -> torch.Tensor:
    """1.0 if a rank's loss or the gradient norm is not finite, else 0.0; notes the first such step in state.trouble.

    All stays on the device. With float16 the loss alone counts: gradients overflow now and then; the scaler sees to it.
    """
    finite = loss.isfinite() if state.scaler.is_enabled() else loss.isfinite() & norm.isfinite()
    bad = (~finite).float()
    if machine.world_size > 1:
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    here = torch.stack([step, ~loss.isfinite()])
    state.trouble.copy_(torch.where((state.trouble[0] < 0) & (bad > 0), here, state.trouble))
    return bad


@torch.no_grad()
def evaluate(model: GPT, split: Split, token_bytes: np.ndarray, cfg: TrainConfig, machine: Machine) -> dict[str, Any]:
    """Loss (nats/token), its standard error, perplexity and bits per byte over a split, and the loss of each style.

    The whole split in order, or its first eval_iters batches; shared among ranks and summed in float64. The standard
    error is that of the mean over windows.
    """
    start = time.perf_counter()
    model.eval()
    names = list(dict.fromkeys(split.styles))
    style_of = torch.tensor([names.index(style) for style in split.styles])
    lengths = torch.from_numpy(token_bytes).to(machine.device)
    # per style: nats, targets, bytes, windows, sum and sum of squares of the windows' mean losses
    sums = torch.zeros(6, len(names), dtype=torch.float64)
    plan = EvalPlan(cfg.block_size, cfg.batch_size, cfg.eval_iters)
    for inputs, targets, span in eval_batches(split, plan, machine, even=cfg.shard):
        with machine.autocast():
            _, losses = model(inputs, targets, reduction="none")
        losses, targets = losses[: len(span)], targets[: len(span)]  # less the row that evens batches out
        counted = targets >= 0
        size = (lengths[targets.clamp(min=0)] * counted).sum(1)
        nats, count, size = (part.cpu().double() for part in (losses.sum(1), counted.sum(1), size))
        per_row = torch.stack([nats, count, size, torch.ones_like(nats), nats / count, (nats / count) ** 2])
        sums.index_add_(1, style_of[torch.from_numpy(span)], per_row)
    sums = machine.all_reduce(sums)
    nats, count, size, n, mean, square = sums.sum(1).tolist()
    return {
        "loss": nats / count,
        "loss_se": math.sqrt(max(square / n - (mean / n) ** 2, 0.0) / n),
        "ppl": math.exp(min(nats / count, 700)),
        "bpb": nats / math.log(2) / size,
        "loss_by_style": {name: (sums[0, i] / sums[1, i]).item() for i, name in enumerate(names) if sums[1, i]},
        "tokens": int(count),
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def compare_tags(
    model: GPT, split: Split, tags: dict[str, int], cfg: TrainConfig, machine: Machine
) -> dict[tuple[str, str], tuple[float, float]]:
    """What a wrong tag costs: (style, tag of another) -> nats/token more than under the right one, standard error.

    Means over windows; the standard error is that of the difference, window by window.
    """
    names = list(tags)
    if not names:
        return {}
    style_of = torch.tensor([names.index(style) for style in split.styles])
    # per style and tag: windows, differences of their mean losses, squares of these
    sums = torch.zeros(3, len(names), len(names), dtype=torch.float64)
    tagged = [dataclasses.replace(split, tags=np.full_like(split.tags, tag)) for tag in tags.values()]
    plan = EvalPlan(cfg.block_size, cfg.batch_size, cfg.eval_iters)
    for right, *others in zip(*(eval_batches(each, plan, machine) for each in (split, *tagged)), strict=True):
        with machine.autocast():
            loss, *losses = (model(b.inputs, b.targets, reduction="none")[1].sum(1) for b in (right, *others))
        more = (torch.stack(losses, dim=1) - loss[:, None]) / (right.targets >= 0).sum(1, keepdim=True)  # (rows, tags)
        more = more.cpu().double()
        per_row = torch.stack([torch.ones_like(more), more, more**2])
        sums.index_add_(1, style_of[torch.from_numpy(right.span)], per_row)
    n, total, square = machine.all_reduce(sums)
    mean = total / n
    error = ((square / n - mean**2).clamp(min=0) / n).sqrt()
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j and n[i, j]]
    return {(names[i], names[j]): (mean[i, j].item(), error[i, j].item()) for i, j in pairs}


def write_sample(model: GPT, tok: tokenizer.Tokenizer, machine: Machine) -> str:
    """A hundred tokens that go on from a line end, for the loggers; its randomness is its own, not training's."""
    random = torch.Generator(machine.device).manual_seed(0)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        probs = (logits[:, : len(tok.tokens)].float() / 0.8).softmax(-1)  # no special token
        return torch.multinomial(probs, 1, generator=random)[:, 0]

    model.eval()
    start = torch.tensor([tok.encode("\n") or [0]], device=machine.device)
    ids = [id.item() for id in generate(model, start, 100, choose)]
    return tok.decode_bytes(ids).decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# starting, going on, saving


@dataclass
class Progress:
    """How far a run has come; a checkpoint holds it beside weights and optimizers.

    seconds: of training alone. run_id: the run's own, in its metrics too ("" in those of old).
    """

    iter_num: int = 0
    best_val_loss: float = math.inf
    bad_evals: int = 0
    seconds: float = 0.0
    run_id: str = ""


def load_start(cfg: TrainConfig) -> tuple[dict[str, Any] | None, Path, bool]:
    """The checkpoint that init_from names, its path, and whether the run goes on from there or only starts there."""
    out = Path(cfg.out_dir)
    latest, previous = out / "ckpt.pt", out / "ckpt.prev.pt"
    if cfg.init_from == "scratch" or (cfg.init_from == "auto" and not latest.exists() and not previous.exists()):
        if cfg.eval_only:
            raise ConfigError(f"init_from: auto found no ckpt.pt in {out}; name one, as --init_from=out/demo/best.pt")
        if cfg.init_from == "auto" and (out / "previous" / "ckpt.pt").exists():
            configurator.warn(
                f"{out} has no ckpt.pt, a new run begins; --out_dir={out / 'previous'} resumes the one there"
            )
        return None, latest, False
    if cfg.init_from not in ("resume", "auto"):
        if (out / "previous").resolve() in Path(cfg.init_from).resolve().parents and not cfg.eval_only:
            raise ConfigError(
                f"init_from: {cfg.init_from} may be replaced by a new run in {out}; choose another out_dir"
            )
        return checkpoint.load(Path(cfg.init_from)), Path(cfg.init_from), False
    try:
        return checkpoint.load(latest), latest, True
    except CheckpointError as e:
        if cfg.init_from == "resume" or not previous.exists():
            raise
        configurator.warn(f"{e}; resuming from {previous}")
        return checkpoint.load(previous), previous, True


SHAPE = tuple(key for key in checkpoint.NANOGPT_ARGS if key not in ("vocab_size", "dropout"))
OWN = ("out_dir", "init_from", "eval_only", "split")  # keys that no checkpoint decides


def complete(cfg: TrainConfig, start: dict[str, Any], path: Path, resumes: bool) -> TrainConfig:
    """`cfg` with what was not given from the checkpoint: every key on resuming and evaluating, else the model's shape.

    Raises CheckpointError when a shape was given that the model can't have: all but a shorter block_size in a new run.
    """
    given = cfg.given | {field.name for field in dataclasses.fields(cfg) if getattr(cfg, field.name) != field.default}
    taken = {key: start["model_args"][key] for key in SHAPE}
    problems = [
        f"{key}: the checkpoint has {taken[key]}, the config {getattr(cfg, key)}; leave it out"
        for key in SHAPE
        if key in given and getattr(cfg, key) != taken[key]
        if resumes or key != "block_size" or cfg.block_size > taken[key]
    ]
    if problems:
        raise CheckpointError(f"{path}: " + "\n  ".join(problems))
    if (resumes or cfg.eval_only) and {"config", "model_extra"} <= start.keys():  # a run's own, no foreign model
        saved = convert(start["config"], TrainConfig, path, CheckpointError, "its config is damaged")
        taken = {**dataclasses.asdict(saved), **taken}
        if "max_iters" in given:
            taken["epochs"] = 0.0  # which would overrule it
    return dataclasses.replace(cfg, **{key: value for key, value in taken.items() if key not in given | {*OWN}})


def differences(cfg: TrainConfig, saved: dict[str, Any]) -> str:
    """How the keys of a resumed run differ from those saved in its checkpoint, as `max_iters 600 -> 900`."""
    keys = {key: value for key, value in dataclasses.asdict(cfg).items() if key in saved and key not in OWN}
    return ", ".join(f"{key} {saved[key]} -> {value}" for key, value in keys.items() if saved[key] != value)


def check_fit(start: dict[str, Any], path: Path, resumes: bool, cfg: TrainConfig, meta: Meta) -> None:
    """Raise CheckpointError if the data is not the checkpoint's or, on resuming, the optimizer."""
    problems = []
    if resumes and start.get("text_sha256") != meta.text_sha256:
        raise CheckpointError(
            f"{path}: it was trained on another text than {cfg.dataset}; a new run can start from its weights: "
            f"prepare.py --tokenizer={path}, then --init_from={path} with another --out_dir"
        )
    theirs, ours = checkpoint.tokenizer_of(start, path).to_json(), meta.tokenizer.to_json()
    if not resumes:  # a new run may have special tokens that the checkpoint has not
        ours["specials"] = ours["specials"][: len(theirs["specials"])]
    if theirs != ours:
        problems.append(f"its tokenizer is not the dataset's; prepare that again, with --tokenizer={path}")
    if resumes and (saved := checkpoint.read_header(start, path).config.optimizer) != cfg.optimizer:
        problems.append(f"optimizer: the checkpoint has {saved}, the config {cfg.optimizer}")
    if problems:
        raise CheckpointError(f"{path}: " + "\n  ".join(problems))


def restore(start: dict[str, Any], path: Path, state: State) -> Progress:
    """Put optimizers and scaler back where they were; returns how far the run had come."""
    try:
        for optimizer, saved in zip(state.optimizers, start["optimizer_states"], strict=True):
            asked = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
            params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
            moments = {i: {k: shared_as(v, params[i]) for k, v in of_p.items()} for i, of_p in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": moments})
            for group, settings in zip(optimizer.param_groups, asked, strict=True):
                group.update(settings)  # rates and decay are the config's, which may have changed
        if start["scaler"]:  # empty unless that run was in float16
            state.scaler.load_state_dict(start["scaler"])
        start.setdefault("run_id", "")
        return Progress(**{field.name: start[field.name] for field in dataclasses.fields(Progress)})
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}: holds no run to resume ({e}); use --init_from={path}") from None


def save(
    out: Path, state: State, progress: Progress, is_best: bool, cfg: TrainConfig, meta: Meta, machine: Machine
) -> None:
    """Write ckpt.pt, keeping the one before as ckpt.prev.pt, and best.pt if this is the best model so far.

    All ranks call it: what they share out is put together, and the main one writes.
    """

    def gather(tensor: torch.Tensor) -> torch.Tensor | None:
        if (gathered := whole(tensor)) is tensor:
            return tensor
        return gathered.cpu() if machine.is_main else None  # no device has more than one of them at a time

    content = {
        **checkpoint.model_entries(state.model),
        **dataclasses.asdict(progress),
        "config": dataclasses.asdict(cfg),
        "tokenizer": meta.tokenizer.to_json(),
        "text_sha256": meta.text_sha256,
        "licences": list(meta.licences),
    }
    content["model"] = tree_map_only(torch.Tensor, gather, content["model"])
    content["model"]["lm_head.weight"] = content["model"]["transformer.wte.weight"]  # the same still, and written once
    optimizer_states = [tree_map_only(torch.Tensor, gather, optimizer.state_dict()) for optimizer in state.optimizers]
    if not machine.is_main:
        return
    if is_best:
        checkpoint.save(out / "best.pt", content)
    content["optimizer_states"] = optimizer_states
    content["optimizer"] = content["optimizer_states"][0]  # AdamW's, where nanoGPT looks for it
    content["scaler"] = state.scaler.state_dict()
    checkpoint.save(out / "ckpt.pt", content, keep=out / "ckpt.prev.pt")


def prepare_out_dir(out: Path) -> BinaryIO:
    """Make `out` and lock it for as long as the returned file is open; raises ConfigError if that can't be done.

    The lock is the system's and goes with the process, however that ends.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "wb")  # noqa: SIM115
    except OSError as e:
        raise ConfigError(f"out_dir: {out} can't be written ({e.strerror}); choose another") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"out_dir: another run is writing to {out}; wait for it, or choose another") from None
    return lock


CHECKPOINTS = ("ckpt.pt", "ckpt.prev.pt", "ckpt.damaged.pt", "best.pt")


def check_space(out: Path, model: GPT, resumes: bool) -> None:
    """Raise ConfigError unless the disk holds best.pt, ckpt.pt, ckpt.prev.pt and one that is being written."""
    weights = 4 * model.num_params()
    needed = weights + 3 * (3 * weights)  # two moments beside the weights
    replaced = out if resumes else out / "previous"
    there = sum(path.stat().st_size for name in CHECKPOINTS if (path := replaced / name).exists())
    free = shutil.disk_usage(out).free
    if free + there < needed:
        raise ConfigError(
            f"out_dir: {out} has {free / 2**20:,.0f} MB free, the checkpoints take {(needed - there) / 2**20:,.0f} MB "
            "more; choose another disk, or free some space"
        )


def set_aside(out: Path) -> bool:
    """Move an earlier run's files from `out` to out/previous, in place of those there; whether there was such a run.

    A process that is killed on the way has lost nothing: the next call finishes what it began. Raises ConfigError if a
    run is writing to out/previous.
    """
    part, previous = out / "previous.part", out / "previous"
    found = [path for name in CHECKPOINTS if (path := out / name).exists()]
    if not found and not part.exists():
        return False
    if previous.exists():
        prepare_out_dir(previous).close()
    part.mkdir(exist_ok=True)
    for path in (*found, *out.glob("metrics.jsonl"), *out.glob("events.out.tfevents.*")):  # what is resumed from first
        os.replace(path, part / path.name)
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(part, previous)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# the run

RESUMABLE = 75  # exit code (EX_TEMPFAIL): ended by a signal, saved, --init_from=auto goes on


def main(cfg: TrainConfig) -> None:
    """Train, or evaluate a checkpoint, as `cfg` says."""
    # --- config and machine
    out = Path(cfg.out_dir)
    start, start_path, resumes = load_start(cfg)
    if start:
        cfg = complete(cfg, start, start_path, resumes)
    machine = find_machine(cfg.device, cfg.dtype, cfg.backend, cfg.timeout_s)
    micro_batches(cfg, machine)

    # --- data and model
    folder = find_dataset(cfg.dataset)
    meta = read_meta(folder)
    if start:
        check_fit(start, start_path, resumes, cfg, meta)
    val = open_split(folder, cfg.split if cfg.eval_only else "val", meta, cfg.block_size, machine.device)
    train = None if cfg.eval_only else open_split(folder, "train", meta, cfg.block_size, machine.device)
    tok = tokenizer.from_json(meta.tokenizer)
    token_bytes = tokenizer.token_bytes(tok)
    torch.manual_seed(cfg.seed)
    if start:
        model = checkpoint.build_model(start, start_path, cfg.dropout, meta.vocab_size)
        model.crop_block_size(cfg.block_size)
    else:
        model = new_model(cfg, meta.vocab_size)
    size = f"ranks: {machine.world_size}, parameters: {model.num_params():,}"
    if train is None:
        result = evaluate(model.to(machine.device), val, token_bytes, cfg, machine)
        costs = compare_tags(model, val, meta.styles, cfg, machine) if len(meta.styles) in range(2, 9) else {}
        if machine.is_main:
            print(f"{machine.device}, {str(machine.dtype)[6:]}, {size}\n{start_path} on {val.path}: {describe(result)}")
            for (style, other), (more, error) in costs.items():
                print(f"{style} under {other}'s tag: {more:+.4f} ± {error:.4f} nats/token")
        return close(machine)
    lock = prepare_out_dir(out) if machine.is_main else None
    if lock:
        check_space(out, model, resumes)

    # --- schedule and optimizer
    windows = TrainWindows(train, cfg.block_size, cfg.seed, cfg.tag_prob)
    cfg = fit_schedule(cfg, windows.per_epoch)
    state = build_state(cfg, machine, model)

    # --- resume, or begin
    progress = restore(start, start_path, state) if resumes else Progress(run_id=secrets.token_hex(4))
    if resumes and machine.is_main and start_path == out / "ckpt.prev.pt":
        with contextlib.suppress(FileNotFoundError):  # or the next save would keep it in the place of a whole one
            os.replace(out / "ckpt.pt", out / "ckpt.damaged.pt")
    if machine.world_size > 1:
        dist.barrier()  # every rank has read what it starts from
    was_there = set_aside(out) if machine.is_main and not resumes else False
    log = Log(out, progress.iter_num, progress.run_id, machine, open_sinks(cfg, machine, progress.run_id))
    log.say(f"{machine.device}, {str(machine.dtype)[6:]}, {size}")
    if was_there:
        log.say(f"{out} held an earlier run: moved to {out / 'previous'}, in place of what was there")
        log.say(f"to resume that one instead: --init_from=auto --out_dir={out / 'previous'}")
    if resumes:
        log.say(f"resuming from {start_path}, step {progress.iter_num}")
        if changed := differences(cfg, start["config"]):
            log.say(f"other than in the checkpoint: {changed}")
        if progress.iter_num >= cfg.max_iters:
            larger = "--epochs" if cfg.epochs else "--max_iters"
            log.say(f"finished: step {progress.iter_num} of max_iters {cfg.max_iters}; a larger {larger} trains on")
    del start

    # --- loop
    meter = Meter(machine, model, cfg.rows_per_step * cfg.block_size)
    end, unsaved = False, ""
    bar = tqdm(total=cfg.max_iters, initial=progress.iter_num, unit="step", disable=None if machine.is_main else True)
    with Signals(machine, cfg.timeout_s) as signals, machine.expecting_others(cfg.timeout_s):
        while (
            progress.iter_num < cfg.max_iters and not (cfg.patience and progress.bad_evals >= cfg.patience) and not end
        ):
            loss, norm = train_step(state, windows, cfg, machine, progress.iter_num)
            progress.iter_num += 1
            meter.steps += 1
            bar.update()
            end, save_now = signals.agreed()
            evaluates = progress.iter_num % cfg.eval_interval == 0 or progress.iter_num == cfg.max_iters
            logs = evaluates or meter.compile_s is None or progress.iter_num % cfg.log_interval == 0
            if (logs or end or save_now or machine.device.type == "cpu") and state.trouble[0] >= 0:
                raise DivergedError(describe_trouble(state, windows, cfg, machine, out))
            if logs or end:
                lr = cfg.learning_rate * lr_at(progress.iter_num - 1, cfg)
                record = meter.lap(progress.iter_num, progress.seconds, loss, norm, lr)
                progress.seconds = record["seconds"]
                log.write(record)
                log.say(status(record, cfg.max_iters))
            is_best = False
            if evaluates:
                result = evaluate(model, val, token_bytes, cfg, machine)
                writes = log.sinks and not (cfg.shard and machine.world_size > 1)  # no rank can alone, with its share
                text = {"text": write_sample(model, tok, machine)} if writes else {}
                log.write({"kind": "eval", "iter": progress.iter_num, "split": "val", **result, **text})
                log.say(f"step {progress.iter_num:>6}  val {describe(result)}")
                is_best = result["loss"] < progress.best_val_loss
                progress.best_val_loss = min(result["loss"], progress.best_val_loss)
                progress.bad_evals = 0 if is_best else progress.bad_evals + 1
            if evaluates or end or save_now:
                unsaved = try_to_save(out, state, progress, is_best, cfg, meta, machine)
                log.say(unsaved or f"saved {out / 'ckpt.pt'}, step {progress.iter_num}")
                meter.restart()
    bar.close()
    log.close()
    if lock:
        lock.close()
    close(machine)
    if unsaved:
        raise ConfigError(unsaved)
    if cfg.patience and progress.bad_evals >= cfg.patience:
        log.say(f"stopped: {progress.bad_evals} evaluations without a better val loss; a larger --patience trains on")
    if end and progress.iter_num < cfg.max_iters:
        log.say(f"ended by a signal; --init_from=auto goes on from step {progress.iter_num}")
        raise SystemExit(0 if machine.launched else RESUMABLE)
    log.say(f"best val loss {progress.best_val_loss:.4f} in {progress.seconds:.0f} s of training: {out / 'best.pt'}")


def fit_schedule(cfg: TrainConfig, windows_per_epoch: int) -> TrainConfig:
    """`cfg` with max_iters as `epochs` asks, and a warmup that fits into the decay; raises ConfigError if one was given
    that does not.
    """
    steps = math.ceil(cfg.epochs * windows_per_epoch / cfg.rows_per_step) if cfg.epochs else cfg.max_iters
    last, warmup = cfg.lr_decay_iters or steps, cfg.warmup_iters
    if warmup > last:
        if "warmup_iters" in cfg.given or warmup != TrainConfig.warmup_iters:
            raise ConfigError(f"warmup_iters: found {warmup}, must be at most {last}, the last step of the decay")
        warmup = last // 10
    return dataclasses.replace(cfg, max_iters=steps, warmup_iters=warmup)


def open_sinks(cfg: TrainConfig, machine: Machine, run_id: str) -> list[Sink]:
    """The loggers that `cfg` asks for, on the rank that has them."""
    sinks, keys = [], dataclasses.asdict(cfg)
    if cfg.tensorboard and machine.is_main:
        sinks.append(Sink("TensorBoard", functools.partial(tensorboard_sink, cfg.out_dir, keys)))
    if cfg.wandb != "off" and machine.is_main:
        arguments = cfg.out_dir, cfg.wandb, cfg.wandb_project, cfg.wandb_run_name, keys, run_id
        sinks.append(Sink("wandb", functools.partial(wandb_sink, *arguments)))
    return sinks


def try_to_save(out: Path, state: State, progress: Progress, *rest: Any) -> str:
    """`save`; returns what went wrong, if the disk did. What was saved before still stands."""
    try:
        save(out, state, progress, *rest)
    except OSError as e:
        return f"step {progress.iter_num} could not be saved to {out}: {e.strerror or e}; the checkpoint before stands"
    return ""


def describe_trouble(state: State, windows: TrainWindows, cfg: TrainConfig, machine: Machine, out: Path) -> str:
    """What to tell when a step was not finite: its number, the ranks whose loss was not, and the rows they read."""
    step, here = state.trouble.tolist()
    votes = torch.zeros(machine.world_size)
    votes[machine.rank] = here
    ranks = [rank for rank, vote in enumerate(machine.all_reduce(votes).tolist()) if vote]
    lines = [f"step {step}: the {'loss' if ranks else 'gradient'} is not finite; nothing was updated by it"]
    for rank in ranks or range(machine.world_size):
        first, count = rows_of(step, rank, cfg, machine)
        starts, _ = windows.rows(first, count)
        lines.append(
            f"rank {rank}: rows {first} to {first + count - 1}, tokens {starts.tolist()} of {windows.split.path}"
        )
    lines.append(f"a lower learning_rate may help; {out} keeps what was saved before")
    return "\n  ".join(lines)


def close(machine: Machine) -> None:
    """Leave the process group together: a rank that goes first can abort the others."""
    if machine.world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    configurator.launch(main, TrainConfig, DataError, CheckpointError, DivergedError, RankError)
