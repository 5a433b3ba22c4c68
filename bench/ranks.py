"""Time train.py on one rank and on several, in turns, each rank with a thread of its own: what torchrun brings.

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
from bench.common import config_name, markdown, origin, read_records, show, spread, train_command, write_result
from configurator import ConfigError, bounds
from robopoet.errors import DataError
from robopoet.machine import find_machine
from robopoet.text.batches import find_dataset, read_meta

# Milliseconds of an all_reduce of as many numbers as there are gradients, by itself: the least that ranks cost a step.
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
    """The keys of train.py, and how its runs are timed."""

    # timing
    ranks: int = 2  # beside one; each has a core
    repeats: int = 3  # runs of each, in turns, of which the median counts
    steps: int = 12  # optimizer steps of a run; the first third is not timed
    out: str = ""  # name of the result (ranks_CONFIG_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "repeats", 1) + bounds(self, "ranks", 2) + bounds(self, "steps", 3)


def launch(ranks: int, command: list[str]) -> str:
    """Run a Python command on `ranks` ranks with a thread each; what it printed."""
    if ranks > 1:
        run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [command[0], *run, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{ranks} ranks failed: {(done.stderr.strip().splitlines() or ['nothing printed'])[-1]}")
    return done.stdout


def tok_per_sec(cfg: RanksConfig, ranks: int) -> float:
    """Tokens per second, over all ranks, of a run's later steps."""
    with tempfile.TemporaryDirectory() as out:
        first = cfg.steps // 3
        changes = {"max_iters": cfg.steps, "log_interval": first, "eval_interval": cfg.steps, "eval_iters": 1}
        command = train_command(cfg, out_dir=out, warmup_iters=0, **changes)
        launch(ranks, [command[0], *command[2:]])  # without -u, which torchrun doesn't know
        steps = [r for r in read_records(Path(out)) if r.kind == "train" and r.iter >= first]
    return (steps[-1].tokens - steps[0].tokens) / (steps[-1].seconds - steps[0].seconds)


def main(cfg: RanksConfig) -> None:
    """Time each, in turns, print the figures and keep them."""
    machine = find_machine(cfg.device, cfg.dtype)
    meta = read_meta(find_dataset(cfg.dataset))
    parameters = train.new_model(cfg, meta.vocab_size).num_params()
    speed: dict[int, list[float]] = {1: [], cfg.ranks: []}
    for _ in range(cfg.repeats):
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
        "tokens_per_step": cfg.rows_per_step * cfg.block_size,
        "tok_per_sec": {str(ranks): spread(found) for ranks, found in speed.items()},
        "speedup": spread([many / one for one, many in zip(*speed.values(), strict=True)]),
        "all_reduce_ms": reduce_ms,
    }
    print(table([result]))
    write_result(result, cfg.out or f"ranks_{result['config']}_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table that shows these results; the all_reduce of a step's gradients as a share of the step."""
    header = ["Device", "Config", "Ranks", "Tokens/s", "Times one rank's", "Efficiency", "All-reduce alone, of a step"]
    rows = []
    for r in results:
        what = [r["machine"]["device"], r["config"]]
        for ranks, found in r["tok_per_sec"].items():
            row = [*what, ranks, show(found)]
            if int(ranks) == r["ranks"]:
                share = r["all_reduce_ms"] * found["median"] / r["tokens_per_step"] / 1000
                row += [show(r["speedup"], ".2f"), f"{r['speedup']['median'] / r['ranks']:.0%}", f"{share:.1%}"]
            rows.append(row + [""] * (len(header) - len(row)))
            what = ["", ""]
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, RanksConfig, DataError)
