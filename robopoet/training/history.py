"""The history of a run: what the records of its metrics.jsonl say, and the chart of its loss."""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from robopoet.errors import ConfigError, warn
from robopoet.files import Count, decode_json, read_bytes
from robopoet.training.chart import Axis, Point, axis_of, chart, dots, line, picture
from robopoet.weights.header import Amount, Seconds

MOST_POINTS = 1000  # a longer series is drawn through the means of neighbours
MOST_SAMPLES, MOST_CHARS = 50, 4000  # samples that are kept, and what of each
MOST_STYLES = 40  # in the table
FALL = 0.1  # share of a run in which training's loss may fall from above the chart
MOST_DRAWN = 1e9  # no chart shows a larger loss beside others


@dataclass(frozen=True)
class Record:
    """A line of metrics.jsonl: of a step, an evaluation, or a plan; what only another kind has is None or 0."""

    kind: str = ""
    iter: Count = 0
    loss: float | None = None  # nats per token
    bpb: Amount | None = None  # bits per byte
    tokens: Count = 0
    loss_by_style: dict[str, float | None] = field(default_factory=dict)
    seconds: Seconds = 0.0  # a step's: in training so far
    lr: Amount | None = None
    tok_per_sec: Amount = 0.0
    peak_mem_mb: Amount = 0.0
    text: str = ""
    copied_words: Count | None = None
    max_iters: Count = 0  # a plan's
    other_s: Seconds = 0.0
    run: str = ""  # the run's id; the oldest have none


class Series:
    """Rows of numbers, fewer than MOST_POINTS: as more come, each becomes the mean of two, four, eight, ... of them."""

    def __init__(self) -> None:
        self.means: list[tuple[float, ...]] = []
        self.last: list[tuple[float, ...]] = []  # too few for another mean
        self.size = 1  # rows in each mean

    def add(self, *row: float) -> None:
        """Add a row."""
        self.last.append(row)
        if len(self.last) == self.size:
            self.means.append(_mean(self.last))
            self.last = []
        if len(self.means) == MOST_POINTS:
            self.means = [_mean(pair) for pair in zip(self.means[::2], self.means[1::2], strict=True)]
            self.size *= 2

    def rows(self) -> list[tuple[float, ...]]:
        """The means, oldest first; the last one may be of fewer rows."""
        return [*self.means, _mean(self.last)] if self.last else self.means

    def over(self, column: int, size: float, value: int) -> list[Point]:
        """The rows as points: a column, in units of `size`, and the value above it."""
        return [(row[column] / size, row[value]) for row in self.rows()]


def _mean(rows: Iterable[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(map(statistics.fmean, zip(*rows, strict=True)))


class Sample(NamedTuple):
    """What a model wrote at an evaluation; copied_words: its longest copy, None if that was not looked for."""

    step: int
    text: str
    copied_words: int | None


class History:
    """What the records say; `add` takes them in their order."""

    def __init__(self) -> None:
        self.step, self.latest, self.best = 0, Record(), Record()  # latest: of a step; best: of an evaluation
        self.best_seconds, self.since_best = 0.0, 0  # when that was; evaluations since then
        self.trained = Series()  # step, seconds of training, loss, learning rate
        self.evaluated = Series()  # step, seconds, loss, bits per byte
        self.copied = Series()  # step, seconds, words
        self.styles: dict[str, Series] = {}  # step, loss
        self.samples: deque[Sample] = deque(maxlen=MOST_SAMPLES)

    def add(self, record: Record) -> None:
        """Take a record; a plan, which has no loss, and one with a number that can't be drawn are left out."""
        step, loss, bpb, lr = record.iter, record.loss, record.bpb or 0.0, record.lr or 0.0
        if loss is None or max(abs(loss), bpb, lr) > MOST_DRAWN:
            return
        self.step = step
        if record.kind == "train":
            self.latest = record
            self.trained.add(step, record.seconds, loss, lr)
        elif record.kind == "eval":
            seconds = self.latest.seconds
            self.evaluated.add(step, seconds, loss, bpb)
            self.since_best += 1
            if self.best.loss is None or loss < self.best.loss:
                self.best, self.best_seconds, self.since_best = record, seconds, 0
            for style, its_loss in record.loss_by_style.items():
                known = style in self.styles or len(self.styles) < MOST_STYLES
                if known and its_loss is not None and abs(its_loss) <= MOST_DRAWN:
                    self.styles.setdefault(style, Series()).add(step, its_loss)
            if record.text:
                cut = "…" if len(record.text) > MOST_CHARS else ""
                self.samples.append(Sample(step, record.text[:MOST_CHARS].strip("\n") + cut, record.copied_words))
            if record.copied_words is not None:
                self.copied.add(step, seconds, record.copied_words)

    @property
    def has_begun(self) -> bool:
        """Whether there is a loss to draw."""
        return bool(self.trained.rows() or self.evaluated.rows())

    def axis(self, column: int, size: float) -> Axis:
        """The axis of the steps (column 0), or of seconds (1) in units of `size`."""
        return axis_of([0, 5, *(row[column] / size for row in (*self.trained.rows(), *self.evaluated.rows()))])

    def loss_chart(self, column: int, size: float, unit: str) -> tuple[list[str], str]:
        """The loss along axis(): the titles of the left axis, and the right one if there is any, and the chart."""
        x, trained = self.axis(column, size), self.trained.over(column, size, 2)
        evaluated = self.evaluated.over(column, size, 2)
        y = axis_of([loss for place, loss in trained if place >= FALL * x.high] + [b for _, b in evaluated], 0.05)
        labels = [
            f"step {step:,.0f}: {loss:.4f}, {bpb:.3f} bits per byte" for step, _, loss, bpb in self.evaluated.rows()
        ]
        marks, right, best = [line("train", trained, x, y), dots("val", evaluated, labels, x, y)], None, self.best
        if best.loss:
            place = (best.iter, self.best_seconds)[column] / size
            marks.append(dots("best", [(place, best.loss)], [""], x, y, 7))
            ratio = (best.bpb or 0) / best.loss
            right = Axis(ratio * y.low, ratio * y.high) if 1e-6 < ratio < 1e6 else None
        named = ("training", trained), ("val", evaluated)
        last = "; ".join(f"{name} {points[-1][1]:.3f}" for name, points in named if points)
        titles = ["nats per token", *(["bits per byte"] if right else [])]
        return titles, chart(f"loss: {last}", x, y, marks, unit, right, most=7)


def read_records(run: Path) -> list[Record]:
    """The lines of a run's metrics.jsonl; a last line without its line end is still being written and left out.

    So is a damaged one, with a warning that names it. Raises ConfigError if the file can't be read.
    """
    path, records = run / "metrics.jsonl", list[Record]()
    for number, text in enumerate(read_bytes(path, ConfigError).splitlines(keepends=True), 1):
        if text.endswith(b"\n"):
            try:
                records.append(decode_json(text, Record, f"{path}: line {number}", ConfigError, "left out"))
            except ConfigError as e:
                warn(str(e))
    return records


def loss_picture(checkpoint: Path) -> str:
    """The chart of the loss of the run that wrote a checkpoint, as an SVG file's text.

    It is "" if no metrics.jsonl with a loss lies beside it. Raises ConfigError if that can't be read.
    """
    history = History()
    if checkpoint.is_file() and (checkpoint.parent / "metrics.jsonl").exists():
        for record in read_records(checkpoint.parent):
            history.add(record)
    return picture(*history.loss_chart(0, 1, "steps")) if history.has_begun else ""
