"""A run's steps, and what `--minutes` chooses: start, shape, dropout and decay, for this text on this machine.

The steps are planned again when the machine's pace changes. The rule for the rest was fitted on texts of 60 KB to
1.5 MB: "One dial" in bench/LOG.md.
"""

import functools
import gc
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

from configurator import ConfigError, is_out_of_memory, revise, warn
from robopoet.errors import CheckpointError
from robopoet.machine import Machine
from robopoet.text.dataset import Meta
from robopoet.training.clock import SAVE_S, Clock, steps_within
from robopoet.training.log import Log, Meter
from robopoet.training.memory import less_memory
from robopoet.training.run import Progress, Run
from robopoet.training.schedule import evaluation_interval
from robopoet.training.start import SHAPE, Start, check_fit
from robopoet.weights import checkpoint

Config = TypeVar("Config")  # a TrainConfig
Trial = tuple[Callable[[int], Any], Callable[[int], Any]]  # a step of training, a batch of an evaluation
SIZES = ("n_layer", "n_head", "n_embd")
LADDER = ((2, 3, 192), (3, 3, 192), (4, 4, 256), (6, 6, 384), (8, 8, 512), (12, 12, 768))
SMALLER = ((1, 2, 128), (1, 1, 64))  # where the first gets fewer than ENOUGH_STEPS, as on a busy machine
CONTEXT = 256  # tokens of a row
TOKENS_A_WEIGHT, REREAD_A_WEIGHT = 1.5, 0.5  # for each of the blocks: read in the time; of a text, in all its passes
EPOCHS, EPOCHS_FROM_WEIGHTS = 24, 3  # passes after which a text teaches nothing more
STEPS_AN_EPOCH = 40  # at least, from scratch: fewer rows a step if need be
DROPOUT = ((2, 0.0), (4, 0.1), (16, 0.2), (math.inf, 0.3))  # up to so many passes
FORGETS = 0.7  # passes within which the embeddings' weight decay forgets
EVALUATING = 0.05  # share of training's seconds, at most; beside busy programs the last takes 15 times as long
SAMPLED = 2048  # ids of a sampled softmax on a CPU, if the vocabulary has at least twice as many
LEAST_STEPS, ENOUGH_STEPS = 10, 40  # a run has at least the first; below the second a smaller model learns more
TRIAL_S, LONG_S = 2.0, 6.0  # seconds of a measurement, and of a step that is measured once
CHOSEN = ("init_from", *SHAPE, "dropout", "batch_size", "sampled_softmax", "learning_rate", "muon_learning_rate")
CHOSEN += ("weight_decay", "muon_weight_decay", "max_iters", "warmup_iters", "eval_interval", "eval_iters", "patience")


def from_base(cfg: Config, meta: Meta) -> Config:
    """`cfg`, started from the base model's weights if they read this dataset and were not trained on it."""
    if content := checkpoint.load_base():
        try:
            check_fit(Start(content, checkpoint.BASE, False), cfg.dataset, cfg.optimizer, meta)
        except CheckpointError:
            return cfg
        if content.get("text_sha256") != meta.text_sha256:
            return revise(cfg, init_from=str(checkpoint.BASE))
    return cfg


def fit_minutes(cfg: Config, start: Start, meta: Meta, clock: Clock, trial: Callable[[Config], Trial]) -> Config:
    """`cfg` with what was not given chosen for the time that is left, or for less if the text teaches nothing more.

    trial: makes what is timed on this machine. epochs is the most that the run may read when it plans again, or 0 if
    max_iters was given. Raises ConfigError if time or memory is too small for LEAST_STEPS steps of the smallest choice.
    """
    machine, tokens = clock.machine, meta.splits["train"].tokens
    on_cpu = machine.device.type == "cpu"
    if start.content is None:
        cfg, epochs = _choose(cfg, positions="rotary", block_size=CONTEXT), EPOCHS
    else:
        cfg, epochs = _choose(cfg, **_rates(start)), EPOCHS_FROM_WEIGHTS
    cfg = _choose(cfg, block_size=max(2, min(cfg.block_size, meta.splits["val"].tokens - 1)))
    if start.content is None:
        rows = max(min(4 if on_cpu else 32, tokens // (STEPS_AN_EPOCH * cfg.block_size)), 1)
    else:
        rows = 8 if on_cpu else 32
    cfg = _choose(cfg, batch_size=rows, patience=6)
    cfg = _choose(cfg, sampled_softmax=SAMPLED if on_cpu and meta.vocab_size >= 2 * SAMPLED else 0)
    epochs = cfg.epochs or epochs
    most = epochs * tokens
    seconds = functools.cache(functools.partial(_seconds, trial, machine))
    ways: list[dict[str, int]] = []
    if start.content is None and not cfg.given.intersection(SIZES):
        cfg = _climb(cfg, most, clock, seconds)
        ways = [dict(zip(SIZES, shape, strict=True)) for shape in SMALLER]
    ways += [{"batch_size": rows >> halvings} for halvings in range(1, rows.bit_length())]
    while ways and clock.left_s / seconds(cfg)[0] < min(_last(cfg, most), ENOUGH_STEPS):
        cfg = _choose(cfg, **ways.pop(0))
    step_s, batch_s = seconds(cfg)
    cfg = _fill(cfg, meta, step_s, batch_s, most, clock)
    if start.content is None and cfg.optimizer == "muon":
        cfg = _choose(cfg, muon_weight_decay=cfg.weight_decay, weight_decay=_decay(cfg, tokens))
    passes = cfg.max_iters * cfg.tokens_per_step / tokens
    cfg = _choose(cfg, dropout=next(share for limit, share in DROPOUT if passes <= limit))
    return revise(cfg, epochs=0.0 if "max_iters" in cfg.given else epochs)


def replan(cfg: Config, clock: Clock, progress: Progress, meter: Meter, log: Log, run: Run) -> Config:
    """`cfg` for the next step: if the clock moves the last one, with a fitting eval_interval unless that was given.

    A new plan is on the disk before it takes effect.
    """
    step = progress.iter_num
    if (last := clock.last_step(cfg, progress, meter)) == cfg.max_iters:
        return cfg
    if step > clock.known:  # else it is there already
        log.write({"kind": "plan", "iter": step, "max_iters": last, "step_s": clock.step_s, "left_s": clock.left_s})
    log.print(f"step {step:>6}  planned anew: {last} steps in all, not {cfg.max_iters}")
    plans = (*cfg.plans, f"{step}:{cfg.max_iters}:{cfg.eval_interval}")
    cfg = revise(cfg, plans=plans, max_iters=last, eval_interval=clock.interval(last, cfg))
    run.keep_config(cfg)
    return cfg


def fit_schedule(cfg: Config, windows_per_epoch: int) -> Config:
    """`cfg` with the max_iters that `epochs` asks for, a warmup that fits into the decay and, unless given, a fitting
    eval_interval.
    """
    per_epoch = windows_per_epoch / cfg.rows_per_step
    steps = math.ceil(cfg.epochs * per_epoch) if cfg.epochs and not cfg.minutes else cfg.max_iters
    last, warmup = cfg.lr_decay_iters or steps, cfg.warmup_iters
    if warmup > last:
        warmup = last // 10
        if "warmup_iters" in cfg.given:
            warn(f"warmup_iters: {cfg.warmup_iters} steps don't fit into {last}; the warmup takes {warmup}")
    interval = cfg.eval_interval or evaluation_interval(steps, per_epoch)
    return revise(cfg, max_iters=steps, warmup_iters=warmup, eval_interval=interval)


def describe_choice(cfg: Config, start: Start) -> list[str]:
    """The keys that were chosen for a new run of so many minutes, as YAML; nothing without minutes."""
    if start.resumes or not cfg.minutes:
        return []
    cfg = revise(cfg, learning_rate=cfg.peak_lr)  # 0 and -1 stand for what other keys say
    cfg = revise(cfg, muon_weight_decay=cfg.weight_decay) if cfg.muon_weight_decay < 0 else cfg
    chosen = {key: getattr(cfg, key) for key in CHOSEN if key not in cfg.given}
    return [f"# chosen for {cfg.minutes:g} minutes", *(f"{key}: {value}" for key, value in chosen.items())]


def _choose(cfg: Config, **values: Any) -> Config:
    """`cfg` with `values` for the keys that were not given."""
    return revise(cfg, **{key: value for key, value in values.items() if key not in cfg.given})


def _rates(start: Start) -> dict[str, Any]:
    """Gentle rates for a checkpoint's weights: ours are of Muon, others' of AdamW."""
    if "model_extra" in start.content:
        return {"learning_rate": 3e-3, "muon_learning_rate": 0.01}
    return {"optimizer": "adamw", "learning_rate": 3e-4}


def _decay(cfg: Config, tokens: int) -> float:
    """The weight decay with which what one pass taught is gone after about FORGETS more, or cfg's if that is more.

    A weight decays by learning rate times weight decay in a step: Wang and Aitchison 2024, arXiv:2405.13698.
    """
    steps = FORGETS * tokens / cfg.tokens_per_step
    return max(float(f"{1 / (cfg.peak_lr * steps):.2g}"), cfg.weight_decay)


def _seconds(trial: Callable[[Config], Trial], machine: Machine, cfg: Config) -> list[float]:
    """Seconds of a step, and of a batch of an evaluation; infinite if they don't fit into the memory.

    The least of up to five, as other programs only add to it. Nothing is compiled: the run does that, once.
    """
    gc.collect()  # an earlier trial's model may hold itself
    least = []
    try:
        for work in trial(revise(cfg, compile="false")):
            found: list[float] = []
            for spent in (LONG_S, LONG_S, TRIAL_S, TRIAL_S, TRIAL_S):
                if sum(found) < spent:
                    begin = time.perf_counter()
                    work(len(found))
                    machine.synchronize()
                    found.append(time.perf_counter() - begin)
            least.append(min(found))
    except RuntimeError as e:
        if is_out_of_memory(e):
            return [math.inf, math.inf]
        raise
    return least


def _climb(cfg: Config, most: float, clock: Clock, seconds: Callable[[Config], list[float]]) -> Config:
    """`cfg` with the largest shape of the LADDER that the text, the time left and the memory can train."""
    chosen, step_s = cfg, 0.0

    def reads_enough(weights: int) -> bool:
        read = clock.left_s / step_s * cfg.tokens_per_step
        return read >= min(TOKENS_A_WEIGHT * weights, most / 2)

    for shape in LADDER:
        tried = revise(cfg, **dict(zip(SIZES, shape, strict=True)))
        weights = 12 * tried.n_layer * tried.n_embd**2
        if chosen is not cfg and (most < REREAD_A_WEIGHT * weights or not reads_enough(weights)):
            break  # the larger shape is slower still
        step_s, _ = seconds(tried)
        if chosen is not cfg and not reads_enough(weights):
            break
        chosen = tried
    return chosen


def _last(cfg: Config, most: float) -> int:
    """The last step that was given, or that reads the last of at `most` so many tokens."""
    return cfg.max_iters if "max_iters" in cfg.given else math.ceil(most / cfg.tokens_per_step)


def _fill(cfg: Config, meta: Meta, step_s: float, batch_s: float, most: float, clock: Clock) -> Config:
    """`cfg` with the steps, and the batches of an evaluation, that fit into the time left."""
    last, per_epoch = _last(cfg, most), meta.splits["train"].tokens / cfg.tokens_per_step
    steps = last if "max_iters" in cfg.given else min(last, int(clock.left_s / step_s))
    if math.isinf(step_s):
        raise ConfigError(less_memory(cfg))
    if steps < min(last, LEAST_STEPS):
        raise ConfigError(f"minutes: {cfg.minutes:g} are too few, a step takes {step_s:.1f} s here; give more")

    def interval(steps: int) -> int:
        return cfg.eval_interval or evaluation_interval(steps, per_epoch)

    batches = math.ceil(meta.splits["val"].tokens / (cfg.batch_size * cfg.block_size))
    fits = max(int(EVALUATING * min(interval(steps), steps) * step_s / batch_s), 1)
    clock.pause = (min(batches, fits) * batch_s + SAVE_S) / step_s
    within = steps_within(clock.left_s / step_s, clock.pause, interval)
    steps = last if "max_iters" in cfg.given else min(last, within)
    warmup = max(min(cfg.warmup_iters, steps // 5), 1)
    return _choose(cfg, max_iters=steps, warmup_iters=warmup, eval_iters=fits if fits < batches else 0)
