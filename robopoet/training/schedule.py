"""How long a run lasts, how it warms up, and how often it evaluates."""

import dataclasses
import math
from typing import TypeVar

from configurator import ConfigError

Config = TypeVar("Config")  # a TrainConfig
EVALUATIONS, LONGEST_INTERVAL = 10, 1000  # of a run, at least; in steps


def fit_schedule(cfg: Config, windows_per_epoch: int) -> Config:
    """`cfg` with the max_iters that `epochs` asks for and, unless given, a fitting warmup and eval_interval.

    The warmup fits into the decay; evaluations come at least every half epoch and ten times. Raises ConfigError if a
    given warmup does not fit.
    """
    per_epoch = windows_per_epoch / cfg.rows_per_step
    steps = math.ceil(cfg.epochs * per_epoch) if cfg.epochs else cfg.max_iters
    last, warmup = cfg.lr_decay_iters or steps, cfg.warmup_iters
    if warmup > last:
        if "warmup_iters" in cfg.given or warmup != type(cfg).warmup_iters:
            raise ConfigError(f"warmup_iters: found {warmup}, must be at most {last}, the last step of the decay")
        warmup = last // 10
    often = min(steps // EVALUATIONS, int(per_epoch / 2), LONGEST_INTERVAL)
    interval = cfg.eval_interval or max(often, 1)
    fitted = dataclasses.replace(cfg, max_iters=steps, warmup_iters=warmup, eval_interval=interval)
    object.__setattr__(fitted, "given", cfg.given)
    return fitted
