"""Plot bits per byte: of runs of train.py, or of the results of bench.learn (the README's picture).

python -m bench.plot out/a                                # out/a/loss.png and loss.svg, against tokens and seconds
python -m bench.plot out/a out/b --out=runs               # runs.png and runs.svg
python -m bench.plot --out=bench/results/learn.svg        # the README's
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

from robopoet.errors import ConfigError

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

import configurator
from bench import common
from bench.learn import Curve, curve_of
from robopoet import files
from robopoet.training.history import Record, read_records

COLOURS = {"RoboPoet": "#b3423a", "nanoGPT": "#5a6b7b"}


@dataclass(frozen=True)
class PlotConfig:
    """The keys of bench.plot."""

    runs: tuple[str, ...] = ()  # out_dirs of train.py
    out: str = ""  # the picture: NAME.svg, NAME.png, or NAME for both (loss, beside the first run, unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = [
            f"runs: {run} holds no metrics.jsonl" for run in self.runs if not (Path(run) / "metrics.jsonl").exists()
        ]
        if not self.runs and not self.out:
            found.append("out: must name the picture of bench/results, as --out=bench/results/learn.svg; or name runs")
        return found

    @property
    def paths(self) -> list[Path]:
        """The files to write."""
        out = self.out or str(Path(self.runs[0]) / "loss")
        return [Path(out)] if out.endswith((".svg", ".png")) else [Path(f"{out}.png"), Path(f"{out}.svg")]


def main(cfg: PlotConfig) -> None:
    """Plot what is asked for; the same figures give the same file."""
    matplotlib.rcParams["svg.hashsalt"] = "robopoet"
    figure = draw_runs(cfg.runs) if cfg.runs else draw_results()
    figure.tight_layout()
    for path in cfg.paths:
        with files.replacing(path) as f:
            figure.savefig(f, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    print(f"written: {', '.join(map(str, cfg.paths))}")


def draw_runs(runs: tuple[str, ...]) -> plt.Figure:
    """Two panels, bits per byte against tokens and against seconds: each run's val loss, and its training loss in pale.

    Bits per byte, since nats per token can't be compared across vocabularies. Raises ConfigError for a run without an
    evaluation.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for run, colour in zip(runs, itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"]), strict=False):
        records = read_records(Path(run))
        curve = curve_of(records)
        if not curve:
            raise ConfigError(f"{run}/metrics.jsonl: holds no evaluation yet; lower eval_interval, or wait for one")
        steps = train_curve(records, bytes_per_token(curve))
        for panel, key in zip(panels, ("tokens", "seconds"), strict=True):
            panel.plot([p[key] for p in steps], [p["bpb"] for p in steps], color=colour, alpha=0.3, linewidth=1)
            panel.plot(
                [p[key] for p in curve], [p["bpb"] for p in curve], color=colour, marker=".", label=Path(run).name
            )
            panel.set(xlabel=f"{key} of training", ylabel="bits per byte: val, and pale training")
            panel.grid(True, alpha=0.2)
            panel.legend()
    return figure


def bytes_per_token(curve: Curve) -> float:
    """The bytes per token of the val split, from its loss in both units."""
    return curve[-1]["loss"] / math.log(2) / curve[-1]["bpb"]


def train_curve(records: list[Record], token_bytes: float) -> Curve:
    """A run's training loss in bits per byte, if a token has `token_bytes` bytes."""
    steps = [r for r in records if r.kind == "train" and r.loss is not None]
    return [
        {"tokens": r.tokens, "seconds": r.seconds, "bpb": r.loss / math.log(2) / token_bytes} for r in steps if r.loss
    ]


def draw_results() -> plt.Figure:
    """A panel for each corpus and device, with the longest runs there, next to nanoGPT's where there are any.

    Raises ConfigError without a result of bench.learn.
    """
    results = [common.read_result(path) for path in sorted(common.RESULTS.glob("learn_*.json"))]
    if not results:
        raise ConfigError("bench/results: holds no learn_*.json; run `python -m bench.learn` first")
    shown = {}
    for r in sorted((r for r in results if r["peer"]), key=lambda r: r["ours"]["curves"][0][-1]["iter"]):
        shown[r["corpus"], r["machine"]["device"]] = r
    figure, panels = plt.subplots(1, len(shown or results), figsize=(4.5 * len(shown or results), 3.5), squeeze=False)
    for panel, result in zip(panels.flat, shown.values() or results, strict=True):
        draw(panel, result)
    return figure


def draw(panel: plt.Axes, result: dict[str, Any]) -> None:
    """A line for each seed of each recipe."""
    sides = {"RoboPoet": result["ours"]} | ({"nanoGPT": result["peer"]} if result["peer"] else {})
    for name, side in sides.items():
        for i, curve in enumerate(side["curves"]):
            seconds, bpb = [p["seconds"] for p in curve], [p["bpb"] for p in curve]
            panel.plot(seconds, bpb, color=COLOURS[name], marker=".", label=name if i == 0 else None)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set(title=result["corpus"], xlabel=f"seconds of training, {result['machine']['device']}")
    panel.set_ylabel("val, bits per byte")
    panel.grid(True, which="both", alpha=0.2)
    panel.legend()


if __name__ == "__main__":
    configurator.launch(main, PlotConfig, positional="runs")
