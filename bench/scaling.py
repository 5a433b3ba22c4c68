"""Time training at four times the batch, and on four times the text read from disk, in turns with the config itself.

python -m bench.scaling config/robopoet_adamw.yaml --device=cpu
"""

import dataclasses
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import configurator
import train
from bench.common import config_name, origin, progress, show, side_by_side, spread, write_result
from bench.train_speed import build, find_one_machine, lap
from robopoet import files
from robopoet.errors import DataError, bounds
from robopoet.machine import Machine
from robopoet.text.dataset import encode_meta, find_dataset, read_meta
from robopoet.text.windows import TrainWindows, open_split

TIMES = 4
CAN_DROP = hasattr(os, "posix_fadvise")  # drops a file's pages from memory; macOS lacks it


@dataclass(frozen=True)
class ScalingConfig(train.TrainConfig):
    """The keys of train.py, and those of the timing."""

    # timing
    repeats: int = 5  # laps; the median counts
    steps: int = 3  # optimizer steps of a lap at four times the batch; the other laps have four times as many
    warmup_steps: int = 4  # steps before the first lap; the first compiles, the fourth records a CUDA graph
    out: str = ""  # name of the result (scaling_CONFIG_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "repeats steps warmup_steps", 1)


def tile(folder: Path, out: Path) -> None:
    """Write the train split in `folder`, repeated TIMES times, to `out`, with a meta.json that describes it."""
    meta = read_meta(folder)
    entry = meta.splits["train"]
    shifts = [i * entry.tokens for i in range(TIMES)]
    with open(out / "train.bin", "wb") as tiled:
        for _ in shifts:
            with open(folder / "train.bin", "rb") as source:
                shutil.copyfileobj(source, tiled)
        tiled.flush()
        os.fsync(tiled.fileno())  # dirty pages can't be dropped
    documents = tuple(
        dataclasses.replace(doc, start=doc.start + shift, stop=doc.stop + shift)
        for shift in shifts
        for doc in entry.documents
    )
    sha256, tokens = files.sha256(DataError, out / "train.bin"), TIMES * entry.tokens
    entry = dataclasses.replace(entry, tokens=tokens, sha256=sha256, documents=documents)
    meta = dataclasses.replace(meta, splits=meta.splits | {"train": entry})
    (out / "meta.json").write_bytes(encode_meta(meta))


def read_from_disk(windows: TrainWindows, folder: Path, machine: Machine) -> None:
    """Make `windows` read a file on the disk, however small, with no page of it in memory."""
    with patch("robopoet.text.windows.ON_DEVICE_BYTES", 0):
        windows.split = open_split(folder, "train", read_meta(folder), windows.block_size, machine.device)
    windows.split.verified()  # this reads all of its pages
    if CAN_DROP:
        with open(folder / "train.bin", "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Variant:
    """A way to train, its model and data, and the speed of its laps. steps: of a lap; all laps have equal tokens."""

    name: str
    cfg: ScalingConfig
    steps: int
    state: train.State
    windows: TrainWindows
    tok_per_sec: list[float] = field(default_factory=list)

    def lap(self, machine: Machine, repeat: int) -> None:
        """Time the `repeat`-th lap."""
        rows = self.cfg.gradient_accumulation_steps * self.cfg.batch_size
        first = self.cfg.warmup_steps + repeat * self.steps
        self.windows.rows(first * rows, 1)  # draws the epoch's order outside the lap: it comes once an epoch
        ms, _ = lap(self.state, self.windows, self.cfg, machine, range(first, first + self.steps))
        self.tok_per_sec.append(1000 * rows * self.cfg.block_size / ms)


def main(cfg: ScalingConfig) -> None:
    """Time all variants on equal numbers of tokens, in turns, print a table and write the result."""
    machine = find_one_machine(cfg)
    larger = dataclasses.replace(cfg, batch_size=TIMES * cfg.batch_size)
    folder, steps = find_dataset(cfg.dataset), TIMES * cfg.steps
    own_shapes = torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # as in separate runs
    with tempfile.TemporaryDirectory() as scratch, own_shapes:
        tile(folder, tiled := Path(scratch))
        larger_corpus = f"{TIMES}x the corpus, on the disk" + (", cold" if CAN_DROP else "")
        from_disk = Variant(larger_corpus, cfg, steps, *build(cfg, machine, tiled))
        variants = [
            Variant("as configured", cfg, steps, *build(cfg, machine, folder)),
            Variant(f"{TIMES}x batch_size", larger, cfg.steps, *build(larger, machine, folder)),
            from_disk,
        ]
        read_from_disk(from_disk.windows, tiled, machine)
        for v in variants:
            lap(v.state, v.windows, v.cfg, machine, range(cfg.warmup_steps))
        for repeat in progress(range(cfg.repeats), "laps"):  # in turns: when the machine slows down, all variants do
            read_from_disk(from_disk.windows, tiled, machine)
            for v in variants:
                v.lap(machine, repeat)
    base = variants[0]
    result = origin("scaling", machine) | {
        "config": config_name(),
        "optimizer": cfg.optimizer,
        "parameters": base.state.model.num_params(),
        "compiled": base.state.forward is not base.state.model,
        "tokens_per_lap": steps * cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size,
        "variants": [
            {
                "name": v.name,
                "batch_size": v.cfg.batch_size,
                "corpus_tokens": len(v.windows.split.tokens),
                "tok_per_sec": spread(v.tok_per_sec),
                "ratio": spread([mine / its for mine, its in zip(v.tok_per_sec, base.tok_per_sec, strict=True)]),
                "repeats_tok_per_sec": v.tok_per_sec,
            }
            for v in variants
        ],
    }
    print(table([result]))
    write_result(result, cfg.out or f"scaling_{result['config']}_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results."""
    columns = list(dict.fromkeys(v["name"] for r in results for v in r["variants"]))
    headers = [name.partition(", ") for name in columns]  # such as 4x the corpus, on the disk, cold
    blocks = []
    for r in results:
        found = {v["name"]: v for v in r["variants"]}
        variants = [found.get(name) for name in columns]
        rows = [
            ["rows a step", *(f"{v['batch_size']:,}" if v else "" for v in variants)],
            ["corpus is", *(how for _, _, how in headers)],
            ["corpus, tokens", *(f"{v['corpus_tokens']:,}" if v else "" for v in variants)],
            ["tokens/s", *(f"{v['tok_per_sec']['median']:,.0f}" if v else "" for v in variants)],
            ["as a multiple", *(show(v["ratio"], ".2f") if v else "" for v in variants)],
        ]
        blocks.append((f"{r['config']}\n{r['optimizer']}, {r['machine']['dtype']}", rows))
    return side_by_side([name for name, _, _ in headers], blocks)


if __name__ == "__main__":
    configurator.launch(main, ScalingConfig)
