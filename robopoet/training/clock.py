"""The clock of a run of minutes: what it has spent, what a step takes, and which step should be its last."""

import math
import time
from collections.abc import Callable
from typing import Any

from configurator import ConfigError
from robopoet.machine import Machine
from robopoet.training.log import Log, Meter
from robopoet.training.run import Progress
from robopoet.training.schedule import evaluates, evaluation_interval

PLANNED, SAVE_S = 0.95, 0.5  # share of the minutes, without Python's start and end; seconds of a save, until measured
LOOK, MEMORY = 0.01, 0.05  # shares of the minutes: between two measurements, and that one counts for
OFF, OFF_AT_END = 0.1, 0.02  # how early or late the end may be, as shares of what is left, or of the minutes


class Clock:
    """The wall clock of one process of a run; without minutes it only counts the seconds.

    Raises ConfigError if there are minutes and several ranks, whose clocks would differ.
    """

    def __init__(self, minutes: float, machine: Machine):
        if minutes and machine.world_size > 1:
            raise ConfigError("minutes: is for one process; under torchrun give max_iters and what else it chooses")
        self.minutes_s, self.machine, self.began = 60 * minutes, machine, time.perf_counter()
        self.step_s, self.pause = 0.0, 0.0  # seconds of a step (0: unknown); an evaluation and its save, in steps

    @property
    def spent_s(self) -> float:
        """Seconds that the run has taken, in all its processes."""
        return time.perf_counter() - self.began

    @property
    def left_s(self) -> float:
        """Seconds that are left for steps, evaluations and saves."""
        return PLANNED * self.minutes_s - self.spent_s

    def start(self, cfg: Any, progress: Progress, log: Log, per_epoch: float) -> None:
        """Take up a run before its first step here; per_epoch: steps.

        What it planned after its checkpoint before it was killed it will plan again, at the same steps, and what it
        spent counts.
        """
        self.per_epoch = per_epoch
        self.moves = self.minutes_s > 0 and cfg.epochs > 0  # not if max_iters was given
        self.most = max(math.ceil(cfg.epochs * per_epoch), cfg.max_iters)
        self.first, self.at = progress.iter_num, -1  # at: the step of the last measurement
        plans = [record for record in log.later if record.kind == "plan"]
        self.plans = {record.iter: record.max_iters for record in plans if record.max_iters > record.iter}
        self.known = max((record.iter for record in log.later), default=-1)  # the last step that it came to
        trained_s = max([progress.seconds, *(record.seconds for record in log.later if record.kind == "train")])
        self.began -= trained_s + max([progress.other_s, *(record.other_s for record in plans)])
        if self.moves and log.later:  # so that it holds if this process is killed before it comes so far
            last = self.plans[max(self.plans)] if self.plans else cfg.max_iters
            other_s = self.spent_s - progress.seconds
            log.write({"kind": "plan", "iter": self.known, "max_iters": last, "other_s": other_s})

    def last_step(self, cfg: Any, progress: Progress, meter: Meter) -> int:
        """The run's last step, before its next one: cfg.max_iters, unless it would end too early or too late."""
        if not self.moves:
            return cfg.max_iters
        step, progress.other_s = progress.iter_num, self.spent_s - progress.seconds - meter.running_s
        self._measure(step, cfg, progress, meter)
        return self._fitting(step, cfg) if step > self.known else self.plans.get(step, cfg.max_iters)

    def _measure(self, step: int, cfg: Any, progress: Progress, meter: Meter) -> None:
        """Update step_s and pause_s, now and then: the first step is left out, as it may compile."""
        paused = evaluates(step, cfg)
        trained_s = progress.seconds + meter.running_s
        if step == self.first or (self.at >= 0 and not paused and trained_s - self.trained_s < LOOK * self.minutes_s):
            return
        self.machine.synchronize()
        trained_s = progress.seconds + meter.running_s
        if self.at >= 0:
            elapsed_s = trained_s - self.trained_s
            found_s = elapsed_s / (step - self.at)
            weight = 1 - math.exp(-elapsed_s / (MEMORY * self.minutes_s))
            self.step_s = (self.step_s or found_s) ** (1 - weight) * found_s**weight
            self.pause = (progress.other_s - self.other_s) / self.step_s if paused else self.pause
        self.at, self.trained_s, self.other_s = step, trained_s, progress.other_s

    def _fitting(self, step: int, cfg: Any) -> int:
        """The last step with which the run ends in time: cfg's, if its end is but a little off."""
        to_come = cfg.max_iters - step
        forecast_s = self.step_s * (to_come + math.ceil(to_come / cfg.eval_interval) * self.pause)
        allowed_s = max(OFF * self.left_s, OFF_AT_END * self.minutes_s)
        if not self.step_s or abs(forecast_s - self.left_s) <= allowed_s:
            return cfg.max_iters
        steps = steps_within(self.left_s / self.step_s, self.pause, lambda more: self.interval(step + more, cfg))
        return min(step + steps, self.most)

    def interval(self, last: int, cfg: Any) -> int:
        """The eval_interval of a plan up to a last step: cfg's if that was given."""
        was_given = cfg.eval_interval != evaluation_interval(cfg.max_iters, self.per_epoch)
        return cfg.eval_interval if was_given else evaluation_interval(last, self.per_epoch)


def steps_within(most: float, pause: float, interval: Callable[[int], int]) -> int:
    """How many steps, 1 or more, take as long as `most`, as after each interval(steps) there is a pause, in steps."""
    steps = max(round(most), 1)
    for _ in range(5):  # fewer steps have a shorter interval, so more pauses
        steps = max(round(most / (1 + pause / min(interval(steps), steps))), 1)
    return steps
