"""What happens at which step: its learning rate, its rows on each rank, an evaluation after it, and the end of the run.

A run of minutes has a clock, which measures the steps and moves the last one.
"""

import functools
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from robopoet.errors import ConfigError
from robopoet.machine import Machine
from robopoet.training.log import Log, Meter
from robopoet.training.run import Progress

EVALUATIONS, LONGEST_INTERVAL = 10, 1000  # evaluations of a run, if no more than so many steps part them
PLAN = re.compile(r"(\d{1,15}):(\d{1,15}):[1-9]\d{0,14}", re.ASCII)
PLANNED, SAVE_S = 0.95, 0.5  # share of the minutes, without Python's start and end; seconds of a save, until measured
LOOK, MEMORY = 0.01, 0.05  # shares of the minutes: between two measurements, and that one counts for
OFF, OFF_AT_END = 0.1, 0.02  # how early or late the end may be, as shares of what is left, or of the minutes


@dataclass(frozen=True)
class Schedule:
    """The learning rate and the evaluations of a run of `max_iters` steps.

    floor: what peak learning rates are multiplied by after the decay (None: they don't decay). lr_decay_iters: where
    the decay ends (None: at max_iters). plans: what a run of minutes planned earlier, each
    UNTIL_STEP:max_iters:eval_interval.
    """

    max_iters: int
    warmup_iters: int
    lr_decay_iters: int | None
    floor: float | None
    eval_interval: int
    plans: tuple[str, ...] = ()

    def lr_scale(self, step: int) -> float:
        """What learning rates are multiplied by at `step`: linear warmup to 1, then half a cosine down to `floor`."""
        if step < self.warmup_iters:
            return (step + 1) / (self.warmup_iters + 1)
        if self.floor is None:
            return 1.0
        if step >= (self.lr_decay_iters or self.max_iters):
            return self.floor
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * self._decayed(step)))

    def _decayed(self, step: int) -> float:
        """The share of the decay before `step`: what earlier plans came to, and from there straight on to 1."""
        start, done = self.warmup_iters, 0.0
        for until, last, _ in (*self._earlier, (step, self.max_iters, 0)):
            if start < (here := min(step, until)):
                done += (1 - done) * (here - start) / ((self.lr_decay_iters or last) - start)
                start = here
        return done

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation follows the first `step` steps: eval_interval after the last one, or at the end."""
        before = since = 0  # the evaluation before, and the end of the plan before
        for until, _, interval in self._earlier:
            if step <= until:
                return (step - before) % interval == 0
            latest = until - (until - before) % interval
            before, since = latest if latest > since else before, until
        return (step - before) % self.eval_interval == 0 or step == self.max_iters

    @functools.cached_property
    def _earlier(self) -> list[tuple[int, ...]]:
        """The plans as numbers: until which step, and what max_iters and eval_interval were."""
        return [tuple(map(int, text.split(":"))) for text in self.plans]


def bad_plans(plans: tuple[str, ...]) -> list[str]:
    """What is wrong with the texts of a Schedule's plans, one per line."""
    right = [(found := PLAN.fullmatch(text)) and int(found[1]) < int(found[2]) for text in plans]
    wanted = "UNTIL_STEP:max_iters:eval_interval, the first of them the smaller"
    return [f"plans: found {text!r}, must be {wanted}" for text, ok in zip(plans, right, strict=True) if not ok]


def evaluation_interval(steps: int) -> int:
    """Steps between evaluations: a tenth of the run, however small the text, as each saves; in a long run fewer."""
    return min(math.ceil(steps / EVALUATIONS), LONGEST_INTERVAL)


class StepRows:
    """How the ranks share the rows of a step: equally, in equal micro-batches of at most `batch_size` rows.

    count: micro-batches of a rank in a step. size: rows of each. Raises ConfigError if the ranks can't share the rows.
    """

    def __init__(self, batch_size: int, gradient_accumulation_steps: int, world_size: int):
        self.per_step = gradient_accumulation_steps * batch_size
        if self.per_step % world_size:
            raise ConfigError(
                f"batch_size: {gradient_accumulation_steps} x {batch_size} = {self.per_step} rows a step can't be "
                f"shared equally by {world_size} ranks; choose a multiple"
            )
        per_rank = self.per_step // world_size
        self.count = math.ceil(per_rank / batch_size)
        while per_rank % self.count:
            self.count += 1
        self.size = per_rank // self.count

    def of(self, step: int, rank: int) -> tuple[int, int]:
        """The first row that a rank reads in a step, and how many it reads."""
        return step * self.per_step + rank * self.count * self.size, self.count * self.size


# ---------------------------------------------------------------------------------------------------------------------
# a run of minutes


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

    def start(self, max_iters: int, epochs: float, per_epoch: float, progress: Progress, log: Log) -> None:
        """Take up a run before its first step here.

        epochs: the most that it may read (0: the last step stays). per_epoch: steps. What it planned after its
        checkpoint before it was killed it will plan again, at the same steps, and what it spent counts.
        """
        self.moves = self.minutes_s > 0 and epochs > 0
        self.most = max(math.ceil(epochs * per_epoch), max_iters)
        self.first, self.at = progress.iter_num, -1  # at: the step of the last measurement
        plans = [record for record in log.later if record.kind == "plan"]
        self.plans = {record.iter: record.max_iters for record in plans if record.max_iters > record.iter}
        self.known = max((record.iter for record in log.later), default=-1)  # the last step that it came to
        trained_s = max([progress.seconds, *(record.seconds for record in log.later if record.kind == "train")])
        self.began -= trained_s + max([progress.other_s, *(record.other_s for record in plans)])
        if self.moves and log.later:  # so that it holds if this process is killed before it comes so far
            last = self.plans[max(self.plans)] if self.plans else max_iters
            other_s = self.spent_s - progress.seconds
            log.write({"kind": "plan", "iter": self.known, "max_iters": last, "other_s": other_s})

    def last_step(self, schedule: Schedule, progress: Progress, meter: Meter) -> int:
        """The run's last step, before its next one: as scheduled, unless the run would end too early or too late."""
        if not self.moves:
            return schedule.max_iters
        step, progress.other_s = progress.iter_num, self.spent_s - progress.seconds - meter.running_s
        self._measure(step, schedule.evaluates(step), progress, meter)
        return self._fitting(step, schedule) if step > self.known else self.plans.get(step, schedule.max_iters)

    def _measure(self, step: int, paused: bool, progress: Progress, meter: Meter) -> None:
        """Update step_s and pause, now and then: the first step is left out, as it may compile.

        paused: whether the run has just evaluated.
        """
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

    def _fitting(self, step: int, schedule: Schedule) -> int:
        """The last step with which the run ends in time: the schedule's, if its end is but a little off."""
        to_come = schedule.max_iters - step
        forecast_s = self.step_s * (to_come + math.ceil(to_come / schedule.eval_interval) * self.pause)
        allowed_s = max(OFF * self.left_s, OFF_AT_END * self.minutes_s)
        if not self.step_s or abs(forecast_s - self.left_s) <= allowed_s:
            return schedule.max_iters
        steps = steps_within(self.left_s / self.step_s, self.pause, lambda more: self.interval(step + more, schedule))
        return min(step + steps, self.most)

    def interval(self, last: int, schedule: Schedule) -> int:
        """The eval_interval of a plan up to a last step: the schedule's if that was given."""
        was_given = schedule.eval_interval != evaluation_interval(schedule.max_iters)
        return schedule.eval_interval if was_given else evaluation_interval(last)


def steps_within(most: float, pause: float, interval: Callable[[int], int]) -> int:
    """How many steps, 1 or more, take as long as `most`, as after each interval(steps) there is a pause, in steps."""
    steps = max(round(most), 1)
    for _ in range(5):  # fewer steps have a shorter interval, so more pauses
        steps = max(round(most / (1 + pause / min(interval(steps), steps))), 1)
    return steps
