"""Train our recipe and nanoGPT's on the same text, seed by seed in turns, and compare how fast their losses fall.

python -m bench.learn config/demo.yaml --seeds=5
python -m bench.learn config/demo.yaml --peer=PATH_TO_NANOGPT --peer_args='--max_iters=600 --device=cpu ...'
"""

import dataclasses
import itertools
import re
import shlex
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import configurator
import train
from bench.common import (
    config_name,
    evaluate_test,
    last_line,
    origin,
    progress,
    show,
    side_by_side,
    spread,
    train_command,
    write_result,
)
from bench.peer import Launch, iteration_ms
from robopoet.errors import ConfigError, bounds
from robopoet.machine import Machine, find_machine
from robopoet.text.dataset import find_dataset, read_meta
from robopoet.text.windows import EvalPlan, open_split
from robopoet.training.evaluate import evaluate
from robopoet.training.history import Record, read_records
from robopoet.weights import checkpoint

Curve = list[dict[str, float]]  # per evaluation: iter, tokens, seconds of training, val loss (nats/token), bpb


@dataclass(frozen=True)
class LearnConfig(train.TrainConfig):
    """The keys of train.py, and those of the comparison."""

    # comparison
    seeds: int = 1  # runs of each, from `seed` on
    peer: str = ""  # a checkout of nanoGPT
    peer_args: str = ""  # the arguments of its train.py, config file included, as on a command line
    peer_rate: tuple[str, ...] = ()  # learning rates to try at its first seed; the best one is kept
    peer_seeds: int = 0  # runs of nanoGPT, if it is too slow for as many as ours (0: as many)
    peer_evals: int = 10  # evaluations of each of its runs, evenly spaced
    keep: str = ""  # a folder for the folders of our runs, which a bench started again resumes (removed unless given)
    out: str = ""  # name of the result (learn_CONFIG_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "seeds peer_evals", 1) + bounds(self, "peer_seeds", 0, self.seeds)


def run_ours(cfg: LearnConfig, seed: int, out: Path) -> Curve:
    """Train with train.py in a process of its own, or resume what is there, and return the curve."""
    command = train_command(cfg, out_dir=out, seed=seed, init_from="auto")
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise ConfigError(f"train.py failed: {last_line(done.stdout)}")
    return curve_of(read_records(out))


def curve_of(records: list[Record]) -> Curve:
    """The evaluations among a run's records, each where its step's record, which it follows, has them."""
    curve = []
    for step, found in itertools.pairwise(records):
        same = found.iter == step.iter  # or its step's record is lost
        if found.kind == "eval" and same and found.loss is not None and found.bpb is not None:
            place = {"iter": step.iter, "tokens": step.tokens, "seconds": step.seconds}
            curve.append(place | {"loss": found.loss, "bpb": found.bpb})
    return curve


def run_peer(cfg: LearnConfig, machine: Machine, folder: Path, seed: int, rate: float | None) -> Curve:
    """Train with nanoGPT's train.py and return its curve: times that it printed, its checkpoints evaluated as ours."""
    meta = read_meta(folder)
    split = open_split(folder, "val", meta, 1, machine.device)
    split = dataclasses.replace(split, tags=np.full_like(split.tags, -1))  # its model knows no tags
    tok = meta.load_tokenizer()
    args = shlex.split(cfg.peer_args)
    given = dict(arg.removeprefix("--").split("=", 1) for arg in args if "=" in arg)
    try:
        steps = int(given["max_iters"])
    except (KeyError, ValueError):
        raise ConfigError("peer_args: must hold --max_iters=NUMBER, to space its evaluations") from None
    every = max(steps // cfg.peer_evals, 1)
    args += [f"--eval_interval={every}", "--eval_iters=1", "--log_interval=1", "--always_save_checkpoint=True"]
    if rate is not None:
        args += [f"--learning_rate={rate}", f"--min_lr={rate / 10}"]
    with tempfile.TemporaryDirectory() as scratch:
        printed, _ = Launch(Path(cfg.peer), args, folder, meta.vocab_size, seed).run(Path(scratch))
        times = iteration_ms(printed)
        usual = statistics.median(times)
        ms = np.cumsum([usual if i % every == 0 else time for i, time in enumerate(times)])  # without evaluations
        curve = []
        for iteration in range(every, steps + 1, every):
            saved = checkpoint.load(Path(scratch) / "out" / f"ckpt.pt.{iteration}")
            model = checkpoint.build_model(saved, Path(scratch)).to(machine.device)
            plan = EvalPlan(model.config.block_size, cfg.batch_size)
            found = evaluate(model, split, tok, plan, machine)
            tokens = iteration * saved["config"]["batch_size"] * model.config.block_size
            tokens *= saved["config"]["gradient_accumulation_steps"]
            place = {"iter": iteration, "tokens": tokens, "seconds": float(ms[iteration - 1]) / 1000}
            curve.append(place | {key: found[key] for key in ("loss", "bpb")})
    return curve


def seconds_to(loss: float, curve: Curve) -> float | None:
    """When a curve first reaches `loss`, interpolated between two evaluations; None if it never does."""
    for before, after in zip([None, *curve], curve, strict=False):
        if after["loss"] <= loss:
            if before is None:
                return after["seconds"]
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before["seconds"] + share * (after["seconds"] - before["seconds"])
    return None


def best(curve: Curve) -> dict[str, float]:
    """The evaluation of lowest loss."""
    return min(curve, key=lambda point: point["loss"])


def main(cfg: LearnConfig) -> None:
    """Train both, seed by seed in turns, print a table and write the result."""
    machine = find_machine(cfg.device, cfg.dtype)
    folder = find_dataset(cfg.dataset)
    has_test = read_meta(folder).splits["test"].tokens > cfg.block_size  # nanoGPT's corpus has none
    ours: list[Curve] = []
    theirs: list[Curve] = []
    tests: list[float] = []
    tried: dict[str, float] = {}
    rate = None
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(cfg.keep or scratch)
        for seed in progress(range(cfg.seeds), "seeds"):
            if cfg.peer and seed == 0 and cfg.peer_rate:
                runs = {r: run_peer(cfg, machine, folder, 0, r) for r in map(float, cfg.peer_rate)}
                tried = {f"{r:g}": best(curve)["loss"] for r, curve in runs.items()}
                rate = min(runs, key=lambda r: best(runs[r])["loss"])
                theirs.append(runs[rate])
            elif cfg.peer and seed < (cfg.peer_seeds or cfg.seeds):
                theirs.append(run_peer(cfg, machine, folder, seed, rate))
            out = kept / f"seed{cfg.seed + seed}"
            ours.append(run_ours(cfg, cfg.seed + seed, out))
            if has_test:
                tests.append(evaluate_test(out / "best.pt", machine)["bpb"])
            print(
                f"seed {seed}: ours {best(ours[-1])}, test {tests[-1:]}, nanoGPT {[best(curve) for curve in theirs]}",
                flush=True,
            )
    result = origin("learn", machine) | {"config": config_name(), "corpus": folder.name}
    result |= {"ours": summary(ours) | ({"test_bpb": spread(tests)} if tests else {}), "peer": None}
    if theirs:
        result["peer"] = summary(theirs) | {"args": cfg.peer_args, "rates": tried, "rate": rate}
        goals = [best(theirs[i % len(theirs)]) for i in range(len(ours))]
        result["goal"] = {
            "loss": [goal["loss"] for goal in goals],
            "peer_seconds": [goal["seconds"] for goal in goals],
            "seconds": [seconds_to(goal["loss"], curve) for goal, curve in zip(goals, ours, strict=True)],
        }
    print(table([result]))
    write_result(result, cfg.out or f"learn_{result['config']}_DEVICE")


def summary(curves: list[Curve]) -> dict[str, Any]:
    """The lowest loss of each of a recipe's runs, and their curves."""
    ends = [best(curve) for curve in curves]
    found = {key: spread([end[key] for end in ends]) for key in ("loss", "bpb", "seconds")}
    return found | {"curves": curves}


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results: each recipe's lowest val loss, and when ours reaches nanoGPT's."""
    blocks = []
    for r in results:
        sides = [side for side in (r["ours"], r["peer"]) if side]
        rows = [
            ["steps", *(f"{side['curves'][0][-1]['iter']:,}" for side in sides)],
            ["seeds", *(f"{len(side['curves'])}" for side in sides)],
            ["lowest val loss", *(show(side["loss"], ".3f") for side in sides)],
            ["in bits/byte", *(f"{side['bpb']['median']:.3f}" for side in sides)],
            *([["bits/byte, test split", f"{test['median']:.3f}"]] if (test := r["ours"].get("test_bpb")) else []),
            ["seconds of training", *(f"{side['seconds']['median']:,.0f}" for side in sides)],
            *reached(r),
        ]
        blocks.append((title(r), rows))
    return side_by_side(["RoboPoet", "nanoGPT"], blocks)


def title(result: dict[str, Any]) -> str:
    """A result's config and corpus, and what else its --out says of it, such as float32."""
    config, corpus = result["config"], result["corpus"]
    found = re.search(r"--out=learn_(\w+)_", result["command"])
    words = found[1].split("_") if found else []
    more = [word for word in words if word not in f"{config}_{corpus}".split("_") and not word.isdigit()]
    return "\n".join([config, f"on {corpus}", *more])


def reached(result: dict[str, Any]) -> list[list[str]]:
    """The last rows of a result: the seconds to nanoGPT's lowest loss, and how many times sooner ours is there."""
    if not (goal := result.get("goal")):
        return []
    name, theirs = "seconds to nanoGPT's", f"{statistics.median(goal['peer_seconds']):,.0f}"
    if None in goal["seconds"]:
        return [[name, f"{goal['seconds'].count(None)} of {len(goal['seconds'])} never", theirs]]
    return [
        [name, f"{statistics.median(goal['seconds']):,.0f}", theirs],
        ["times sooner", show(times_sooner(result), ".1f")],
    ]


def times_sooner(result: dict[str, Any]) -> dict[str, float]:
    """How many times sooner our runs reach nanoGPT's lowest loss than it does; all of them must reach it."""
    goal = result["goal"]
    return spread([theirs / ours for ours, theirs in zip(goal["seconds"], goal["peer_seconds"], strict=True)])


if __name__ == "__main__":
    configurator.launch(main, LearnConfig)
