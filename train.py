"""Train a GPT, in one process or many; or evaluate a checkpoint.

python train.py config/demo.yaml --max_iters=500
torchrun --standalone --nproc_per_node=2 train.py config/robopoet.yaml
python train.py config/demo.yaml --eval_only=true --split=test --init_from=out/demo/best.pt
"""

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
from model import GPT, GPTConfig
from robopoet.errors import ConfigError, bounds, is_out_of_memory, warn
from robopoet.machine import Graphed, Machine, Requests, Signals, compiled, find_machine, step_seed
from robopoet.text import dataset
from robopoet.text.windows import EvalPlan, Split, TrainWindows, open_split
from robopoet.training import optimizer, plan
from robopoet.training.evaluate import evaluate, result_line
from robopoet.training.log import Log, Meter, open_sinks
from robopoet.training.loss import SampledSoftmax, Teachers
from robopoet.training.memory import recompute_blocks, shard
from robopoet.training.run import Run, Start, find_start
from robopoet.training.schedule import Clock, Schedule, StepRows, bad_plans
from robopoet.writing.preview import Preview

RESUMABLE = 75  # exit code (EX_TEMPFAIL) after a signal: saved, --init_from=auto resumes


@dataclass(frozen=True)
class TrainConfig:
    """The keys of train.py, called as in nanoGPT where it has them. given: those set on the command line or in YAML."""

    given: frozenset[str] = field(default=frozenset(), kw_only=True, compare=False, metadata=configurator.NO_KEY)

    # the run
    out_dir: str = "out"  # where checkpoints and metrics.jsonl go
    init_from: str = "scratch"  # scratch, resume, auto (resume if out_dir has a checkpoint), a checkpoint, smollm2
    eval_only: bool = False  # evaluate `split` and stop
    split: Literal["val", "test", "train"] = "val"  # which split eval_only evaluates
    seed: int = 1337  # seed of the initialisation, the order of windows, dropout and the sampled softmax
    # data
    dataset: str = "robopoet"  # a folder that prepare.py filled, or its name under data/
    batch_size: int = 32  # rows in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step, over all ranks
    block_size: int = 128  # tokens in a row: the model's context
    tag_prob: float = 0.9  # share of rows that begin with their style's tag
    # model
    n_layer: int = 6  # number of blocks
    n_head: int = 8  # attention heads in a block
    n_embd: int = 256  # width: numbers that stand for a token
    dropout: float = 0.1  # dropout probability after embeddings, attention and MLP (0: off)
    bias: bool = True  # whether Linear and LayerNorm have biases
    positions: Literal["learned", "rotary"] = "learned"  # GPT-2's learned embeddings, or rotated queries and keys
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # GPT-2's normalisation, or Llama's, which has no mean and bias
    mlp: Literal["gelu", "swiglu"] = "gelu"  # GPT-2's MLP, or Llama's, whose third matrix gates the first
    n_kv_head: int | None = None  # heads of keys and values, which queries share (auto: n_head)
    # optimizer
    optimizer: Literal["muon", "adamw", "adafactor"] = "muon"  # muon: AdamW beside it; adafactor: the least memory
    learning_rate: float | None = None  # AdamW's peak learning rate (auto: 1e-2 beside Muon, 1e-3; Adafactor's 2e-3)
    muon_learning_rate: float = 0.02  # Muon's peak learning rate; follows the same schedule
    weight_decay: float = 0.1  # decoupled weight decay of matrices and embeddings (0: off)
    muon_weight_decay: float | None = None  # weight decay of the matrices that Muon trains (auto: weight_decay)
    beta1: float = 0.8  # decay of AdamW's first moment
    beta2: float = 0.99  # decay of AdamW's second moment
    grad_clip: float = 1.0  # clip gradients to this norm (0: off)
    teacher: str = ""  # distil from these checkpoints, such as a.pt,b.pt, beside the text (empty: off)
    teacher_share: float = 0.5  # share of the loss that the teachers' mean prediction makes up
    sampled_softmax: int = 0  # sampled softmax over this many ids (0: the full vocabulary)
    # schedule
    max_iters: int = 600  # optimizer steps in all
    epochs: float = 0.0  # passes over the train split, instead of max_iters (0: off); with minutes, at most so many
    minutes: float = 0.0  # time budget in minutes; chooses every key that you leave out (0: off)
    plans: tuple[str, ...] = ()  # what a run of minutes planned earlier, each UNTIL_STEP:max_iters:eval_interval
    decay_lr: bool = True  # decay the learning rate by half a cosine (false: constant after warmup)
    warmup_iters: int = 20  # steps of linear warmup (a tenth of the run if it is too short for them)
    lr_decay_iters: int | None = None  # step at which the learning rate reaches min_lr (auto: max_iters)
    ema: float = 0.0  # EMA decay; evaluation and best.pt use the average (0: off)
    min_lr: float = 0.0  # AdamW's learning rate after the decay; Muon's falls in proportion
    # evaluation and logs
    eval_interval: int | None = None  # steps between evaluations, each of which saves (auto: ten a run)
    eval_iters: int = 0  # evaluate on this many batches, spread over the split (0: the full split)
    patience: int = 0  # stop after this many evaluations without a better val loss (0: never)
    log_interval: int = 10  # steps between status lines
    sample_tokens: int = 60  # each evaluation logs a sample of this many tokens (0: off)
    tensorboard: bool = False  # write TensorBoard's event files to out_dir
    wandb: Literal["off", "online", "offline"] = "off"  # log to Weights & Biases
    wandb_project: str = "robopoet"  # project of the run there
    wandb_run_name: str | None = None  # name of the run there (auto: the name of out_dir)
    # machine
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of matrix products; auto: the fastest
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile; auto: only on CUDA; on a CPU eager is faster
    record: bool = False  # replay each step as a CUDA graph: faster, but not yet proven on a GPU; one process alone
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # backend of torch.distributed; auto: nccl on CUDA, else gloo
    timeout_s: float = 600.0  # seconds that a rank waits for the others before it gives up
    shard: bool = False  # shard weights, gradients and optimizer states among ranks (FSDP2)
    recompute: bool = False  # keep only the blocks' inputs for the backward pass: less memory, a third more time

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all ranks and micro-batches."""
        return self.gradient_accumulation_steps * self.batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all ranks and micro-batches."""
        return self.rows_per_step * self.block_size

    @property
    def peak_lr(self) -> float:
        """AdamW's peak learning rate."""
        return self.learning_rate or {"muon": 1e-2, "adamw": 1e-3, "adafactor": 2e-3}[self.optimizer]

    @property
    def matrix_decay(self) -> float:
        """The weight decay of the matrices that Muon trains."""
        return self.weight_decay if self.muon_weight_decay is None else self.muon_weight_decay

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The learning rate and the evaluations; for these eval_interval must have been chosen, as plan.finish does."""
        floor = self.min_lr / self.peak_lr if self.decay_lr else None
        keys = self.max_iters, self.warmup_iters, self.lr_decay_iters, floor, self.eval_interval or 0, self.plans
        return Schedule(*keys)

    def problems(self) -> list[str]:
        """What is wrong with these values, one per line."""
        found = bounds(self, "batch_size gradient_accumulation_steps", 1, 2**20)
        found += bounds(self, "max_iters log_interval timeout_s eval_interval lr_decay_iters", 1)
        found += bounds(self, "sample_tokens", 0, 10_000)  # a sample is written at each evaluation
        found += bounds(self, "eval_iters sampled_softmax grad_clip patience muon_weight_decay", 0)
        found += bounds(self, "warmup_iters epochs minutes min_lr weight_decay", 0)
        found += bounds(self, "tag_prob teacher_share", 0, 1) + bounds(self, "dropout beta1 beta2 ema", 0, 0.9999)
        found += bounds(self, "learning_rate muon_learning_rate", 1e-12) + bounds(self, "seed", 0, 2**63 - 1)
        found += bad_plans(self.plans)
        shape = plan.SHAPE if self.init_from == "scratch" else ("block_size", "positions")  # a checkpoint has the rest
        try:
            GPTConfig(**{key: getattr(self, key) for key in shape})
        except ValueError as e:
            found += str(e).splitlines()
        if self.shard and self.optimizer == "adafactor":
            found.append("shard: found true, but Adafactor's states can't be shared out; choose --optimizer=adamw")
        if self.decay_lr and self.min_lr > self.peak_lr:
            found.append(f"min_lr: found {self.min_lr}, must be at most learning_rate, {self.peak_lr}")
        if self.eval_only and self.init_from == "scratch":
            found.append("init_from: found scratch, but eval_only needs a checkpoint: --init_from=out/demo/best.pt")
        return found


# ---------------------------------------------------------------------------------------------------------------------
# model and optimizers


def make_model(cfg: TrainConfig, vocab_size: int, start: Start | None = None) -> GPT:
    """The model that a run starts with: freshly initialised from the seed, or the checkpoint's with new ids from it."""
    torch.manual_seed(cfg.seed)
    if start and start.content:
        return start.build_model(cfg.block_size, cfg.dropout, vocab_size)
    return GPT(GPTConfig(vocab_size=vocab_size, **{key: getattr(cfg, key) for key in (*plan.SHAPE, "dropout")}))


@dataclass
class State:
    """What a step works on. `forward` is `model`, compiled and wrapped as the run asks.

    sync_next: called before each micro-batch, with whether the ranks average gradients after it.
    """

    cfg: TrainConfig
    machine: Machine
    model: GPT
    forward: torch.nn.Module
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    rows: StepRows
    trouble: optimizer.Trouble
    sync_next: Callable[[bool], None] = lambda wanted: None
    sampled_softmax: SampledSoftmax | None = None
    teachers: Teachers | None = None
    average: optimizer.Average | None = None
    recorded_update: Graphed | None = None


def build_state(
    cfg: TrainConfig, machine: Machine, model: GPT, split: Split | None = None, meta: dataset.Meta | None = None
) -> State:
    """Move `model`, or this rank's shard of it, to the device, make its optimizers, compile and wrap it."""
    if cfg.recompute:
        recompute_blocks(model)
    sharded = cfg.shard and machine.world_size > 1
    shard(model, machine) if sharded else model.to(machine.device)
    recorded = cfg.record and machine.device.type == "cuda" and machine.world_size == 1
    recorded = recorded and not (cfg.sampled_softmax or cfg.recompute or cfg.optimizer == "adafactor")
    if cfg.record and not recorded:
        warn("record: needs a CUDA device, a single process, sampled_softmax=0 and recompute=false; not recording")
    rates: dict[str, Any] = {"lr": cfg.peak_lr, "weight_decay": cfg.weight_decay, "betas": (cfg.beta1, cfg.beta2)}
    rates |= {"muon_lr": cfg.muon_learning_rate, "muon_weight_decay": cfg.matrix_decay}
    optimizers = optimizer.configure_optimizers(model, machine, cfg.optimizer, **rates, recorded=recorded)
    forward = compiled(model, cfg.compile, machine.device)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype is torch.float16)
    rows = StepRows(cfg.batch_size, cfg.gradient_accumulation_steps, machine.world_size)
    state = State(cfg, machine, model, forward, optimizers, scaler, rows, optimizer.Trouble(machine))
    if sharded:
        state.sync_next = cast(Any, model).set_requires_gradient_sync  # FSDP2's
    elif machine.world_size > 1:
        state.forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)  # saves a copy
        state.sync_next = functools.partial(setattr, state.forward, "require_backward_grad_sync")
    if cfg.sampled_softmax:
        assert split
        state.sampled_softmax = SampledSoftmax(split, model.config.vocab_size, cfg.sampled_softmax, machine)
    if cfg.teacher:
        assert meta
        paths = [path.strip() for path in cfg.teacher.split(",")]
        state.teachers = Teachers(paths, cfg.teacher_share, cfg.block_size, cfg.out_dir, cfg.dataset, meta, machine)
    if cfg.ema:
        state.average = optimizer.Average(model, cfg.ema)
    if recorded:
        state.recorded_update = Graphed(functools.partial(update, state))
    return state


# ---------------------------------------------------------------------------------------------------------------------
# a step


def train_step(state: State, windows: TrainWindows, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step on global batch `step`; returns this rank's mean loss (nats/token) and the gradient norm.

    Both are scalars on the device: reading them waits for it. If either is not finite on any rank, nothing is updated
    and state.trouble notes the step.
    """
    cfg, machine = state.cfg, state.machine
    inputs, targets = windows.batch(*state.rows.of(step, machine.rank), machine.device)
    machine.seed(step_seed(cfg.seed, step, machine.rank))
    number, scale = torch.full((), step, device=machine.device), cfg.schedule.lr_scale(step)
    if state.recorded_update:  # a Python number would be recorded with the value it has now
        result = state.recorded_update(inputs, targets, number, torch.full((), scale, device=machine.device))
    else:
        result = update(state, inputs, targets, number, scale)
    if state.average:
        state.average.update(step)
    return result


def update(
    state: State, inputs: torch.Tensor, targets: torch.Tensor, step: torch.Tensor, scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward, backward, clipping and optimizers on this rank's rows (rows, T), without waiting for the device.

    step: int64 scalar. scale: factor on the peak learning rates. Ranks average gradients in the last micro-batch.
    Returns what train_step does.
    """
    machine, scaler, count, size = state.machine, state.scaler, state.rows.count, state.rows.size
    state.forward.train()
    for group in (group for each in state.optimizers for group in each.param_groups):
        group["lr"] = group["peak_lr"] * scale
    total, candidates = torch.zeros((), device=machine.device), None
    if state.sampled_softmax:
        targets, candidates = state.sampled_softmax(targets)
    for micro, (x, y) in enumerate(zip(inputs.split(size), targets.split(size), strict=True)):
        state.sync_next(micro == count - 1)
        with machine.autocast():
            y = state.teachers(x, y, candidates) if state.teachers else y
            # no name holds the logits through the next micro-batch
            loss = state.forward(x, y, candidates=candidates)[1]
        scaler.scale(loss / count).backward()
        total += loss.detach() / count
    optimizer.unscale(state.optimizers, scaler)
    norm = optimizer.clip(state.model, state.cfg.grad_clip)
    bad = state.trouble.note(step, total, norm, scaler.is_enabled())
    optimizer.step_all(state.optimizers, scaler, bad)
    return total, norm


def trial(start: Start, folder: Path, meta: dataset.Meta, machine: Machine, cfg: TrainConfig) -> plan.Trial:
    """A step, and a batch of an evaluation, of a model that is then thrown away, for `minutes` to time."""
    val, split = (open_split(folder, name, meta, cfg.block_size, machine.device) for name in ("val", "train"))
    windows = TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)
    state = build_state(cfg, machine, make_model(cfg, meta.vocab_size, start), split, meta)
    tok = meta.load_tokenizer()
    part = EvalPlan(cfg.block_size, cfg.batch_size, limit=1)
    return functools.partial(train_step, state, windows), lambda step: evaluate(state.model, val, tok, part, machine)


# ---------------------------------------------------------------------------------------------------------------------
# the run


def main(cfg: TrainConfig) -> None:
    """Train, or evaluate a checkpoint, as `cfg` says."""
    cfg = plan.from_base(cfg)
    start = find_start(cfg.init_from, Path(cfg.out_dir), cfg.eval_only)
    cfg = plan.complete(cfg, start)
    try:
        evaluate_checkpoint(cfg, start) if cfg.eval_only else train(cfg, start)
    except RuntimeError as e:
        if is_out_of_memory(e):
            raise ConfigError(plan.less_memory(cfg)) from None
        raise


def train(cfg: TrainConfig, start: Start) -> None:
    """Train from `start` until max_iters, patience or a signal ends the run."""
    # --- machine
    machine = find_machine(cfg.device, cfg.dtype, cfg.backend, cfg.timeout_s)
    clock = Clock(cfg.minutes, machine)
    StepRows(cfg.batch_size, cfg.gradient_accumulation_steps, machine.world_size)  # raises if ranks can't share them

    # --- data
    folder = dataset.find_dataset(cfg.dataset)
    meta = dataset.read_meta(folder)
    start.check_fit(cfg.dataset, cfg.optimizer, meta)
    cfg = plan.fit_minutes(cfg, start, meta, clock, functools.partial(trial, start, folder, meta, machine))
    val, split = (open_split(folder, name, meta, cfg.block_size, machine.device) for name in ("val", "train"))
    windows = TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)
    tok = meta.load_tokenizer()
    cfg = plan.finish(cfg, windows.per_epoch)
    eval_plan = EvalPlan(cfg.block_size, cfg.batch_size, cfg.eval_iters, even=cfg.shard)

    # --- model and optimizers
    model = make_model(cfg, meta.vocab_size, start)
    run = Run(Path(cfg.out_dir), configurator.values_of(cfg), meta, machine)
    state = build_state(cfg, machine, model, split, meta)
    run.check_space(model, state.optimizers, start.resumes, cfg.ema > 0)

    # --- resume, or start a new run
    run.take_from(start, split, tok, state.teachers.sha256 if state.teachers else {})
    progress = start.restore(state.optimizers, state.scaler, state.average, run.teachers)
    machine.barrier()  # every rank has read the checkpoint
    moved = run.make_way(start.path if start.resumes else None, progress)
    plan.keep(cfg, run)
    sinks = open_sinks(run.config, progress.run_id) if machine.is_main else []
    log = Log(run.folder.where, progress, machine, sinks, run.report)
    log.begin(model.num_params(), *moved, *plan.describe_start(cfg, start, progress))
    clock.start(cfg.max_iters, cfg.epochs, windows.per_epoch / cfg.rows_per_step, progress, log)
    start.release()

    # --- loop
    meter = Meter(machine, model, cfg.tokens_per_step, cfg.sampled_softmax)
    bar = tqdm(total=cfg.max_iters, initial=progress.iter_num, unit="step", disable=None if machine.is_main else True)
    # under --shard no rank can generate with its part alone
    previews = cfg.sample_tokens and log.active and not (cfg.shard and machine.world_size > 1)
    preview = Preview(model, folder, meta, tok, machine, cfg.sample_tokens, run.excerpts) if previews else None
    requests, at_eval = Requests(), start.tunes  # so best.pt is no worse than what it starts from
    with Signals(machine, cfg.timeout_s) as signals, machine.expecting_others(cfg.timeout_s), run.saver:
        while True:
            val_loss = math.inf
            if at_eval:
                with state.average.applied() if state.average else contextlib.nullcontext():
                    result = evaluate(model, val, tok, eval_plan, machine)
                    result |= preview() if preview else {}
                progress.note(val_loss := result["loss"])
                log.evaluation(progress, result)
            if at_eval or requests.end or requests.save:
                run.save(model, state.optimizers, state.scaler, progress, val_loss, state.average, log.print)
                meter.restart()
            if progress.iter_num >= cfg.max_iters or progress.has_run_out_of(cfg.patience) or requests.end:
                break
            cfg = state.cfg = plan.replan(cfg, clock, progress, meter, log, run)
            bar.total = cfg.max_iters
            loss, norm = train_step(state, windows, progress.iter_num)
            progress.iter_num += 1
            meter.steps += 1
            bar.update()
            requests = signals.agreed(bool(run.folder.lost))
            at_eval = cfg.schedule.evaluates(progress.iter_num)
            logs = at_eval or any(requests) or meter.compile_s is None or progress.iter_num % cfg.log_interval == 0
            if logs or machine.device.type == "cpu":
                state.trouble.check(windows, state.rows.of, cfg.out_dir)
            if logs:
                lr = cfg.peak_lr * cfg.schedule.lr_scale(progress.iter_num - 1)
                log.train(meter.lap(progress, loss, norm, lr), cfg.max_iters, cfg.schedule.eval_interval)
        split.verified()

    # --- end
    bar.close()
    log.close()
    run.folder.close()
    machine.leave()
    if run.unsaved or (run.folder.lost and not machine.launched):
        raise ConfigError(run.unsaved or run.folder.lost)
    if progress.has_run_out_of(cfg.patience):
        log.print(f"stopped: {progress.bad_evals} evaluations without a better val loss; a larger --patience trains on")
    if requests.end and progress.iter_num < cfg.max_iters:
        log.print(run.folder.lost or f"ended by a signal; --init_from=auto resumes from step {progress.iter_num}")
        raise SystemExit(0 if machine.launched else RESUMABLE)  # torchrun would restart ranks that exit otherwise
    log.print(*progress.summary(run.out / "best.pt"))


def evaluate_checkpoint(cfg: TrainConfig, start: Start) -> None:
    """Print the loss of a checkpoint on `split`."""
    machine = find_machine(cfg.device, cfg.dtype, cfg.backend, cfg.timeout_s)
    folder = dataset.find_dataset(cfg.dataset)
    meta = dataset.read_meta(folder)
    start.check_fit(cfg.dataset, cfg.optimizer, meta)
    split = open_split(folder, cfg.split, meta, cfg.block_size, machine.device)
    model = make_model(cfg, meta.vocab_size, start).to(machine.device)
    eval_plan = EvalPlan(cfg.block_size, cfg.batch_size, cfg.eval_iters)
    result = evaluate(model, split, meta.load_tokenizer(), eval_plan, machine)
    if machine.is_main:
        print(f"{machine}, parameters: {model.num_params():,}")
        part = f"at most {cfg.eval_iters} batches, spread over " if cfg.eval_iters else ""
        print(f"{start.path} on {part}{split.path}: {result_line(result)}")
    machine.leave()


if __name__ == "__main__":
    configurator.launch(main, TrainConfig)
