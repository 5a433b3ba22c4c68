"""The learning rate of each step, how often a run evaluates, and how ranks share a step's rows."""

import math
from typing import TypeVar

from configurator import ConfigError
from robopoet.machine import Machine

Config = TypeVar("Config")  # a TrainConfig
EVALUATIONS, LONGEST_INTERVAL = 10, 1000  # of a run, at least; in steps


def evaluation_interval(steps: int, steps_per_epoch: float) -> int:
    """Steps between evaluations, so that they come at least every half epoch and ten times a run."""
    return max(min(steps // EVALUATIONS, int(steps_per_epoch / 2), LONGEST_INTERVAL), 1)


def lr_scale(step: int, cfg: Config) -> float:
    """What learning rates are multiplied by at `step`: linear warmup to 1, then half a cosine down to min_lr."""
    floor = cfg.min_lr / cfg.peak_lr
    last = cfg.lr_decay_iters or cfg.max_iters
    if step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    if not cfg.decay_lr:
        return 1.0
    if step >= last:
        return floor
    progress = (step - cfg.warmup_iters) / (last - cfg.warmup_iters)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


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
