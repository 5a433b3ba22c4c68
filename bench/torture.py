"""Kill, stop and damage a training run over and over, resume it each time, and compare it with an unbroken run.

python -m bench.torture --minutes=10

Also measures what the protections cost at the reference size: their share of a step, and how long a save takes.
"""

import random
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import configurator
import train
from bench.common import markdown, origin, progress, train_command, write_result
from robopoet.errors import ConfigError, bounds
from robopoet.machine import Machine, Signals, find_machine
from robopoet.text.dataset import find_dataset, read_meta
from robopoet.text.windows import TrainWindows, open_split
from robopoet.training.folder import earlier_runs
from robopoet.training.history import read_records
from robopoet.training.run import Progress, Run, find_start
from robopoet.weights import checkpoint

FAULTS = ("kill", "terminate", "flip a bit", "cut", "begin anew")


@dataclass(frozen=True)
class TortureConfig:
    """The keys of bench.torture."""

    minutes: float = 10.0  # how long training is broken off; then a run without faults follows
    dataset: str = "robopoet"  # what the small model is trained on
    seed: int = 1  # chooses the faults and their moments
    out: str = ""  # name of the result (torture_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "minutes", 0.01)


def shape(cfg: TortureConfig, out: Path) -> train.TrainConfig:
    """An endless run that saves every 5 steps of some 20 ms each, with dropout and two micro-batches."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 64, "batch_size": 4}
    rhythm = {"gradient_accumulation_steps": 2, "eval_interval": 5, "eval_iters": 1, "log_interval": 1}
    forever = {"max_iters": 10**6, "decay_lr": False, "learning_rate": 2e-3, "dropout": 0.1, "init_from": "auto"}
    keys = sizes | rhythm | forever | {"dataset": cfg.dataset, "out_dir": str(out), "device": "cpu"}
    return train.TrainConfig(**keys)


def losses(out: Path) -> dict[int, float]:
    """The loss of each step in metrics.jsonl."""
    return {r.iter: r.loss for r in read_records(out) if r.kind == "train" and r.loss is not None}


def run_until(command: list[str], after_s: float, number: signal.Signals) -> tuple[int, int]:
    """Start a run and signal it some seconds after its first line; returns the last step that it reported saved, and
    its exit code."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    timer, saved = threading.Timer(after_s, process.send_signal, [number]), 0
    for line in process.stdout or ():
        if timer.ident is None:
            timer.start()
        if line.startswith("saved ") and line.endswith("\n"):
            saved = int(line.split()[-1])
    return saved, process.wait()


def begin_anew(command: list[str], out: Path, after_s: float) -> int:
    """Start a new run where there is one, and kill it some seconds after it begins to put that aside; returns how many
    checkpoints are lost."""
    before, runs = {checkpoint.weights_sha256(path) for path in out.rglob("*.pt")}, len(earlier_runs(out))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out / "previous.part").exists() and len(earlier_runs(out)) == runs:
        time.sleep(1e-4)
    time.sleep(after_s)
    process.kill()
    process.wait()
    return len(before - {checkpoint.weights_sha256(path) for path in out.rglob("*.pt")})


def damage(path: Path, fault: str, rng: random.Random) -> None:
    """Flip a bit of a file, or cut off its end."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if fault == "cut":
        del content[place:]
    else:
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cost(cfg: TortureConfig, machine: Machine, out: Path) -> dict[str, float]:
    """Milliseconds of a step at the reference size, of the checks around it, and of a save."""
    keys = configurator.parse(train.TrainConfig, ["config/robopoet.yaml", "--device=cpu", f"--dataset={cfg.dataset}"])
    folder = find_dataset(cfg.dataset)
    meta = read_meta(folder)
    split = open_split(folder, "train", meta, keys.block_size, machine.device)
    windows = TrainWindows(split, keys.block_size, keys.seed, keys.tag_prob)
    state = train.build_state(keys, machine, train.make_model(keys, meta.vocab_size), split)
    signals, one = Signals(machine, keys.timeout_s), torch.ones(())

    def watch() -> None:
        state.trouble.note(torch.zeros((), dtype=torch.int64), one, one, False)
        signals.agreed()
        assert state.trouble.first[0] < 0

    def median_ms(work: Callable[[int], Any], times: int) -> float:
        found = []
        for i in range(times + 1):  # the first warms up
            start = time.perf_counter()
            work(i)
            found.append(1000 * (time.perf_counter() - start))
        return statistics.median(found[1:])

    run, saved = Run(out, configurator.values_of(keys), meta, machine), (state.model, state.optimizers, state.scaler)
    progress = Progress(iter_num=1)
    return {
        "step_ms": median_ms(lambda i: train.train_step(state, windows, i), 5),
        "watch_ms": median_ms(lambda i: watch(), 1000),
        "save_ms": median_ms(lambda i: run.save(*saved, progress), 5),
        "save_best_ms": median_ms(lambda i: run.save(*saved, progress, val_loss=-float(i)), 5),
    }


def main(cfg: TortureConfig) -> None:
    """Torture a run, make the same steps unbroken, print a table and write the result."""
    machine, rng = find_machine("cpu", "auto"), random.Random(cfg.seed)
    counts = dict.fromkeys([*FAULTS, "resumes", "checkpoints verified", "losses compared"], 0)
    wrong = {"lost steps": 0, "losses that differ": 0, "codes that are wrong": 0, "lost checkpoints": 0}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tortured"
        keys = shape(cfg, out)
        command, seen, announced = train_command(keys, init_from="auto"), {}, 0
        anew = train_command(keys, init_from="scratch")
        end = time.monotonic() + 60 * cfg.minutes
        for _ in progress(iter(lambda: time.monotonic() < end, False), "resumes"):
            fault = rng.choice(FAULTS)
            if fault == "begin anew" and (out / "ckpt.pt").exists():
                wrong["lost checkpoints"] += begin_anew(anew, out, rng.uniform(0, 0.005))
                start = find_start("auto", out, eval_only=False).content
                announced = start["iter_num"] if start else 0
            number = signal.SIGTERM if fault == "terminate" else signal.SIGKILL
            saved, code = run_until(command, rng.uniform(0, 6), number)
            counts[fault] += 1
            wrong["codes that are wrong"] += code not in (-number, train.RESUMABLE)
            announced = max(announced, saved)
            start = find_start("auto", out, eval_only=False).content
            step = start["iter_num"] if start else 0
            counts["checkpoints verified"] += start is not None
            wrong["lost steps"] += max(announced - step, 0)
            both = (out / "ckpt.pt").exists() and (out / "ckpt.prev.pt").exists()  # not if killed between renames
            if fault in ("flip a bit", "cut") and both:
                damage(out / "ckpt.pt", fault, rng)
                start = find_start("auto", out, eval_only=False)
                announced = start.content["iter_num"] if start.content else 0
                wrong["lost steps"] += start.path.name != "ckpt.prev.pt" or announced < step - keys.eval_interval
            found = losses(out) if (out / "metrics.jsonl").exists() else {}
            for at, loss in found.items():
                counts["losses compared"] += at in seen
                wrong["losses that differ"] += seen.setdefault(at, loss) != loss
            counts["resumes"] += 1
        if not seen:
            raise ConfigError("minutes: too short, no step was made")
        unbroken = Path(folder) / "unbroken"
        steps = {"out_dir": unbroken, "init_from": "scratch", "eval_interval": 10**6}
        steps["max_iters"] = max(*seen, keys.warmup_iters)  # a shorter run is refused
        subprocess.run(train_command(keys, **steps), stdout=subprocess.DEVNULL, check=True)
        for at, loss in losses(unbroken).items():
            counts["losses compared"] += at in seen
            wrong["losses that differ"] += seen.get(at, loss) != loss
        out = Path(folder) / "cost"
        out.mkdir()
        costs = cost(cfg, machine, out)
    result = origin("torture", machine) | {"minutes": cfg.minutes, "steps": max(seen), **counts, **wrong, **costs}
    print(table([result]))
    write_result(result, cfg.out or "torture_DEVICE")
    if any(wrong.values()):
        raise ConfigError(f"the run did not survive: {wrong}")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results."""
    counts = {"steps": "steps", "kill": "SIGKILLs", "terminate": "SIGTERMs", "flip a bit": "bits flipped"}
    counts |= {"cut": "files cut short", "resumes": "resumes", "checkpoints verified": "checkpoints verified"}
    counts |= {"losses compared": "losses compared", "losses that differ": "losses that differ"}
    counts |= {"lost steps": "lost steps"}
    rows = [[name, *(f"{r[key]:,}" for r in results)] for key, name in counts.items()]
    rows += [
        ["the checks, of a step", *(f"{r['watch_ms'] / r['step_ms']:.3%}" for r in results)],
        ["a save, ms", *(f"{r['save_ms']:.0f}" for r in results)],
        ["a save with best.pt, ms", *(f"{r['save_best_ms']:.0f}" for r in results)],
    ]
    return markdown(["", *(f"{r['minutes']:g} minutes" for r in results)], rows)


if __name__ == "__main__":
    configurator.launch(main, TortureConfig)
