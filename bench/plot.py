"""Draw val loss against seconds of training, as bench.learn and bench.demo kept it: bench/results/learn.svg.

python -m bench.plot
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
from configurator import ConfigError

COLOURS = {"RoboPoet": "#b3423a", "nanoGPT": "#5a6b7b"}


@dataclass(frozen=True)
class PlotConfig:
    """The keys of bench.plot."""

    out: str = ""  # the picture (bench/results/learn.svg unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return []


def main(cfg: PlotConfig) -> None:
    """Draw a panel for each result that holds curves; raises ConfigError when there is none."""
    paths = sorted([*common.RESULTS.glob("learn_*.json"), *common.RESULTS.glob("demo_*.json")])
    if not paths:
        raise ConfigError("bench/results: holds no learn_*.json, demo_*.json; run `python -m bench.learn` first")
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    matplotlib.rcParams["svg.hashsalt"] = "robopoet"  # the same results give the same file
    across = min(len(results), 3)
    down = -(-len(results) // across)
    figure, panels = plt.subplots(down, across, figsize=(5.5 * across, 4 * down), squeeze=False)
    for panel, result in itertools.zip_longest(panels.flat, results):
        if result:
            draw(panel, result)
        else:
            panel.remove()
    figure.tight_layout()
    out = Path(cfg.out) if cfg.out else common.RESULTS / "learn.svg"
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)
    print(f"written: {out.name}")


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
    configurator.launch(main, PlotConfig)
