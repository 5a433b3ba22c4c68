"""The learning rate of each step, how often a run evaluates, and how ranks share a step's rows."""

import functools
import math
import re
from typing import TypeVar

from configurator import ConfigError
from robopoet.machine import Machine

Config = TypeVar("Config")  # a TrainConfig
EVALUATIONS, LONGEST_INTERVAL = 10, 1000  # of a run, at least; in steps
PLAN = re.compile(r"(\d{1,15}):(\d{1,15}):[1-9]\d{0,14}", re.ASCII)


def evaluation_interval(steps: int, steps_per_epoch: float) -> int:
    """Steps between evaluations, so that they come at least every half epoch and ten times a run."""
    return max(min(steps // EVALUATIONS, int(steps_per_epoch / 2), LONGEST_INTERVAL), 1)


def evaluates(step: int, cfg: Config) -> bool:
    """Whether an evaluation follows the first `step` steps: eval_interval after the one before, or at the end."""
    before = since = 0  # the evaluation before, and the end of the plan before
    for until, _, interval in _earlier(cfg.plans):
        if step <= until:
            return (step - before) % interval == 0
        latest = until - (until - before) % interval
        before, since = latest if latest > since else before, until
    return (step - before) % cfg.eval_interval == 0 or step == cfg.max_iters


def lr_scale(step: int, cfg: Config) -> float:
    """What learning rates are multiplied by at `step`: linear warmup to 1, then half a cosine down to min_lr."""
    floor = cfg.min_lr / cfg.peak_lr
    if step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    if not cfg.decay_lr:
        return 1.0
    if step >= (cfg.lr_decay_iters or cfg.max_iters):
        return floor
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _progress(step, cfg)))


def _progress(step: int, cfg: Config) -> float:
    """The share of the decay that lies behind `step`: what earlier plans came to, and from there straight on to 1."""
    start, done = cfg.warmup_iters, 0.0
    for until, last, _ in (*_earlier(cfg.plans), (step, cfg.max_iters, 0)):
        if start < (here := min(step, until)):
            done += (1 - done) * (here - start) / ((cfg.lr_decay_iters or last) - start)
            start = here
    return done


@functools.lru_cache(maxsize=1)
def _earlier(plans: tuple[str, ...]) -> list[tuple[int, ...]]:
    """TrainConfig.plans as numbers: until which step, and what max_iters and eval_interval were."""
    return [tuple(map(int, text.split(":"))) for text in plans]


def bad_plans(plans: tuple[str, ...]) -> list[str]:
    """What is wrong with the texts in TrainConfig.plans, one per line."""
    right = [(found := PLAN.fullmatch(text)) and int(found[1]) < int(found[2]) for text in plans]
    wanted = "UNTIL_STEP:max_iters:eval_interval, the first of them the smaller"
    return [f"plans: found {text!r}, must be {wanted}" for text, ok in zip(plans, right, strict=True) if not ok]


def micro_batches(cfg: Config, machine: Machine) -> tuple[int, int]:
    """How many micro-batches a rank has in a step, and their rows; raises ConfigError if ranks can't share the rows."""
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


def rows_of(step: int, rank: int, cfg: Config, machine: Machine) -> tuple[int, int]:
    """The first row that a rank reads in a step, and how many it reads."""
    count, rows = micro_batches(cfg, machine)
    return step * cfg.rows_per_step + rank * count * rows, count * rows
