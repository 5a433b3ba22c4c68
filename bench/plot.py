"""Draw val loss: of runs of train.py, or of what bench.learn and bench.demo kept, which is the README's picture.

python -m bench.plot out/a out/b --out=runs     # against tokens and against seconds: runs.png, runs.svg
python -m bench.plot                            # bench/results/learn.svg
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

import configurator
from bench import common
from bench.learn import read_curve
from configurator import ConfigError

COLOURS = {"RoboPoet": "#b3423a", "nanoGPT": "#5a6b7b"}


@dataclass(frozen=True)
class PlotConfig:
    """The keys of bench.plot."""

    runs: tuple[str, ...] = ()  # out_dirs of train.py
    out: str = "runs"  # the picture of these runs, without its ending

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return [
            f"runs: {run} holds no metrics.jsonl" for run in self.runs if not (Path(run) / "metrics.jsonl").exists()
        ]


def main(cfg: PlotConfig) -> None:
    """Draw what is asked for; the same figures give the same file."""
    matplotlib.rcParams["svg.hashsalt"] = "robopoet"
    if cfg.runs:
        draw_runs(cfg)
    else:
        draw_results()


def draw_runs(cfg: PlotConfig) -> None:
    """Two panels, loss against tokens and against seconds, with a line for each run."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for run in cfg.runs:
        curve = read_curve(Path(run))
        for panel, key in zip(panels, ("tokens", "seconds"), strict=True):
            panel.plot([p[key] for p in curve], [p["loss"] for p in curve], marker=".", label=Path(run).name)
            panel.set(xlabel=f"{key} of training", ylabel="val loss, nats per token")
            panel.grid(True, alpha=0.2)
            panel.legend()
    finish(figure, [Path(f"{cfg.out}.png"), Path(f"{cfg.out}.svg")])


def draw_results() -> None:
    """A panel for each result that holds curves; raises ConfigError when there is none."""
    paths = sorted([*common.RESULTS.glob("learn_*.json"), *common.RESULTS.glob("demo_*.json")])
    if not paths:
        raise ConfigError("bench/results: holds no learn_*.json, demo_*.json; run `python -m bench.learn` first")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    across = min(len(results), 3)
    down = -(-len(results) // across)
    figure, panels = plt.subplots(down, across, figsize=(5.5 * across, 4 * down), squeeze=False)
    for panel, result in itertools.zip_longest(panels.flat, results):
        if result:
            draw(panel, result)
        else:
            panel.remove()
    finish(figure, [common.RESULTS / "learn.svg"])


def finish(figure: plt.Figure, paths: list[Path]) -> None:
    """Write the picture to `paths`."""
    figure.tight_layout()
    for path in paths:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    print(f"written: {', '.join(map(str, paths))}")


def draw(panel: plt.Axes, result: dict[str, Any]) -> None:
    """A line for each seed of each recipe; a finished run has one."""
    if result["kind"] == "demo":
        title, curves = f"{result['run']}, whole run", {"RoboPoet": [result["curve"]]}
    else:
        title, curves = f"{result['config']} on {result['corpus']}", {"RoboPoet": result["ours"]["curves"]}
        curves |= {"nanoGPT": result["peer"]["curves"]} if result["peer"] else {}
    for name, lines in curves.items():
        for i, curve in enumerate(lines):
            seconds, losses = [p["seconds"] for p in curve], [p["loss"] for p in curve]
            panel.plot(seconds, losses, color=COLOURS[name], marker=".", label=name if i == 0 else None)
    panel.set_xscale("log")
    panel.set(title=title, xlabel=f"seconds of training, {result['machine']['device']}")
    panel.set_ylabel("val loss, nats per token")
    panel.grid(True, which="both", alpha=0.2)
    panel.legend()


if __name__ == "__main__":
    configurator.launch(main, PlotConfig, positional="runs")
