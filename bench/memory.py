"""Memory of train.py's steps at GPT-2's sizes, with and without --recompute.

python -m bench.memory config/gpt2.yaml --device=cpu --gradient_accumulation_steps=1
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import configurator
import train
from bench.common import markdown, origin, progress, train_command, write_result
from bench.peer import resident_mb
from bench.train_speed import SpeedConfig, at_step, write_random_corpus
from robopoet.errors import bounds
from robopoet.machine import find_machine
from robopoet.training.history import read_records

SHAPES = {"124M": (12, 12, 768), "350M": (24, 16, 1024)}  # GPT-2's small and medium: layers, heads, width
VOCAB = 50_257


@dataclass(frozen=True)
class MemoryConfig(train.TrainConfig):
    """The keys of train.py, and those of the measurement."""

    # measurement
    rows: tuple[str, ...] = ("1", "4")  # batch sizes to measure
    steps: int = 3  # optimizer steps of each; the fastest but the first counts
    out: str = ""  # name of the result (memory_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = [f"rows: found {rows!r}, must be a whole number" for rows in self.rows if not rows.isdecimal()]
        return super().problems() + bounds(self, "steps", 2) + found


def main(cfg: MemoryConfig) -> None:
    """Measure every shape with each batch size, print a table and write the result."""
    machine, runs = find_machine(cfg.device, cfg.dtype), []
    with tempfile.TemporaryDirectory() as folder:
        write_random_corpus(Path(folder), SpeedConfig(vocab_size=VOCAB, block_size=cfg.block_size))
        for name, (n_layer, n_head, n_embd) in progress(SHAPES.items(), "shapes"):
            for rows in map(int, cfg.rows):
                shaped = replace(cfg, n_layer=n_layer, n_head=n_head, n_embd=n_embd, batch_size=rows, dataset=folder)
                for recompute in (False, True):
                    found = {"shape": name, "rows": rows, "recompute": recompute} | measure(shaped, recompute)
                    print(found, flush=True)
                    runs.append(found)
    result = origin("memory", machine) | {"block_size": cfg.block_size, "optimizer": cfg.optimizer, "runs": runs}
    print(table([result]))
    write_result(result, cfg.out or "memory_DEVICE")


def measure(cfg: MemoryConfig, recompute: bool) -> dict[str, float]:
    """The peak memory (MB) of a run of train.py in a process of its own, and its fastest step's milliseconds."""
    with tempfile.TemporaryDirectory() as out:
        keys = {"max_iters": cfg.steps + 1, "warmup_iters": 1, "log_interval": 1}
        command = train_command(cfg, out_dir=out, recompute=recompute, **keys)
        with at_step(command, cfg.steps) as process:  # before it evaluates and saves
            resident = resident_mb(process.pid, "VmHWM")
            steps = [record for record in read_records(Path(out)) if record.kind == "train"]
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    fastest = max(record.tok_per_sec for record in steps[1:])
    on_cpu = find_machine(cfg.device, cfg.dtype).device.type == "cpu"  # there the record counts what was inherited
    return {"peak_mem_mb": resident if on_cpu else steps[-1].peak_mem_mb, "dt_ms": 1000 * tokens / fastest}


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results: a row for each shape and batch size."""
    rows = []
    for r in results:
        for plain, again in zip(r["runs"][::2], r["runs"][1::2], strict=True):
            memory = [f"{run['peak_mem_mb']:,.0f}" for run in (plain, again)]
            rows.append([plain["shape"], r["machine"]["dtype"], f"{plain['rows']} x {r['block_size']:,}", *memory])
    return markdown(["parameters", "dtype", "tokens", "MB", "MB, recomputing"], rows)


if __name__ == "__main__":
    configurator.launch(main, MemoryConfig)
