"""Time train.py on one rank and on several, in turns, with one thread per rank.

python -m bench.ranks config/robopoet.yaml --device=cpu
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configurator
import train
from bench.common import (
    config_name,
    last_line,
    origin,
    progress,
    show,
    side_by_side,
    spread,
    train_command,
    write_result,
)
from robopoet.errors import ConfigError, bounds
from robopoet.machine import find_machine
from robopoet.text.dataset import find_dataset, read_meta
from robopoet.training.history import read_records

# Times an all_reduce of as many numbers as there are gradients, in ms: a step on several ranks costs at least that.
REDUCE = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
x, times = torch.ones(int(sys.argv[1])), []
for _ in range(12):
    dist.barrier()
    start = time.perf_counter()
    dist.all_reduce(x)
    times.append(1000 * (time.perf_counter() - start))
if dist.get_rank() == 0:
    print(sorted(times)[len(times) // 2])
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class RanksConfig(train.TrainConfig):
    """The keys of train.py, and those of the timing."""

    # timing
    ranks: int = 2  # ranks to compare with one; each has a core
    repeats: int = 3  # runs of each, in turns; the median counts
    steps: int = 12  # optimizer steps of a run; the first third is not timed
    out: str = ""  # name of the result (ranks_CONFIG_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "repeats", 1) + bounds(self, "ranks", 2) + bounds(self, "steps", 3)


def launch(ranks: int, command: list[str]) -> str:
    """Run a Python command on `ranks` ranks with a thread each, and return what it printed."""
    if ranks > 1:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [command[0], *run, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{ranks} ranks failed: {last_line(done.stderr)}")
    return done.stdout


def tok_per_sec(cfg: RanksConfig, ranks: int) -> float:
    """Tokens per second over all ranks, without the first third of the steps."""
    with tempfile.TemporaryDirectory() as out:
        first = cfg.steps // 3
        changes = {"max_iters": cfg.steps, "log_interval": first, "eval_interval": cfg.steps, "eval_iters": 1}
        command = train_command(cfg, out_dir=out, warmup_iters=0, **changes)
        launch(ranks, [command[0], *command[2:]])  # without -u, which torchrun does not accept
        steps = [r for r in read_records(Path(out)) if r.kind == "train" and r.iter >= first]
    return (steps[-1].tokens - steps[0].tokens) / (steps[-1].seconds - steps[0].seconds)


def main(cfg: RanksConfig) -> None:
    """Time one rank and several in turns, print a table and write the result."""
    machine = find_machine(cfg.device, cfg.dtype)
    meta = read_meta(find_dataset(cfg.dataset))
    parameters = train.make_model(cfg, meta.vocab_size).num_params()
    speed: dict[int, list[float]] = {1: [], cfg.ranks: []}
    for _ in progress(range(cfg.repeats), "rounds"):
        for ranks, found in speed.items():
            found.append(tok_per_sec(cfg, ranks))
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(REDUCE)
        script.flush()
        reduce_ms = float(launch(cfg.ranks, [sys.executable, script.name, str(parameters)]))
    result = origin("ranks", machine) | {
        "config": config_name(),
        "ranks": cfg.ranks,
        "parameters": parameters,
        "tokens_per_step": cfg.tokens_per_step,
        "tok_per_sec": {str(ranks): spread(found) for ranks, found in speed.items()},
        "speedup": spread([many / one for one, many in zip(*speed.values(), strict=True)]),
        "all_reduce_ms": reduce_ms,
    }
    print(table([result]))
    write_result(result, cfg.out or f"ranks_{result['config']}_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results; all-reduce: of a step's gradients, as a share of the step."""
    counts = sorted({int(ranks) for r in results for ranks in r["tok_per_sec"]})
    blocks = []
    for r in results:
        speed = {int(ranks): found["median"] for ranks, found in r["tok_per_sec"].items()}
        before = [""] * counts.index(r["ranks"])
        share = r["all_reduce_ms"] * speed[r["ranks"]] / r["tokens_per_step"] / 1000
        rows = [
            ["tokens/s", *(f"{speed[ranks]:,.0f}" if ranks in speed else "" for ranks in counts)],
            ["times one rank's", *before, show(r["speedup"], ".2f")],
            ["efficiency", *before, f"{r['speedup']['median'] / r['ranks']:.0%}"],
            ["all-reduce alone, of a step", *before, f"{share:.1%}"],
        ]
        blocks.append((f"{r['config']}\n{r['machine']['dtype']}", rows))
    return side_by_side([f"{ranks} rank{'s' * (ranks > 1)}" for ranks in counts], blocks)


if __name__ == "__main__":
    configurator.launch(main, RanksConfig)
