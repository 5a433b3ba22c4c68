"""Time training at four times the batch, and on four times the text read from disk, in turns with the config as it is.

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
from bench.common import config_name, markdown, origin, show, spread, write_result
from bench.train_speed import build, find_one_machine, lap
from configurator import bounds
from robopoet.errors import DataError
from robopoet.machine import Machine
from robopoet.text import batches
from robopoet.text.batches import TrainWindows, bin_sha256, encode_meta, find_dataset, open_split, read_meta

TIMES = 4
CAN_DROP = hasattr(os, "posix_fadvise")  # pages from memory; macOS has no such call


@dataclass(frozen=True)
class ScalingConfig(train.TrainConfig):
    """The keys of train.py, and how its steps are timed."""

    # timing
    repeats: int = 5  # laps, of which the median counts
    steps: int = 3  # optimizer steps of a lap at four times the batch; four times as many at the others
    warmup_steps: int = 4  # steps before the first lap; the first compiles, the fourth records CUDA's graph
    out: str = ""  # name of the result (scaling_CONFIG_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "repeats steps warmup_steps", 1)


def tile(folder: Path, out: Path) -> None:
    """Write the train split of the corpus in `folder`, TIMES over, to `out`, and the meta.json that describes it."""
    meta = read_meta(folder)
    entry = meta.splits["train"]
    shifts = [i * entry.tokens for i in range(TIMES)]
    with open(out / "train.bin", "wb") as tiled:
        for _ in shifts:
            with open(folder / "train.bin", "rb") as source:
                shutil.copyfileobj(source, tiled)
        tiled.flush()
        os.fsync(tiled.fileno())  # pages that are not on disk yet can't be dropped
    documents = tuple(
        dataclasses.replace(doc, start=doc.start + shift, stop=doc.stop + shift)
        for shift in shifts
        for doc in entry.documents
    )
    sha256, tokens = bin_sha256(out / "train.bin"), TIMES * entry.tokens
    entry = dataclasses.replace(entry, tokens=tokens, sha256=sha256, documents=documents)
    meta = dataclasses.replace(meta, splits=meta.splits | {"train": entry})
    (out / "meta.json").write_bytes(encode_meta(meta))


def read_from_disk(windows: TrainWindows, folder: Path, machine: Machine) -> None:
    """Have `windows` read a mapped file, however small it is, none of which is in memory."""
    with patch.object(batches, "ON_DEVICE_BYTES", 0):  # mapped anew: pages that a mapping has touched can't be dropped
        windows.split = open_split(folder, "train", read_meta(folder), windows.block_size, machine.device)
    if CAN_DROP:
        with open(folder / "train.bin", "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Variant:
    """A way to train, what it works on, and the speed of its laps. steps: of a lap; all laps have as many tokens."""

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
        self.windows.rows(first * rows, 1)  # draws the epoch's order, which comes once an epoch, not once a lap
        ms, _ = lap(self.state, self.windows, self.cfg, machine, range(first, first + self.steps))
        self.tok_per_sec.append(1000 * rows * self.cfg.block_size / ms)


def main(cfg: ScalingConfig) -> None:
    """Time each variant on as many tokens, in turns, print the figures and keep them."""
    machine = find_one_machine(cfg)
    larger = dataclasses.replace(cfg, batch_size=TIMES * cfg.batch_size)
    folder, steps = find_dataset(cfg.dataset), TIMES * cfg.steps
    own_shapes = torch._dynamo.config.patch(automatic_dynamic_shapes=False)  # compiled as in a run of their own
    with tempfile.TemporaryDirectory() as scratch, own_shapes:
        tile(folder, tiled := Path(scratch))
        larger_corpus = f"{TIMES}x the corpus, mapped" + (", cold" if CAN_DROP else "")
        from_disk = Variant(larger_corpus, cfg, steps, *build(cfg, machine, tiled))
        variants = [
            Variant("as configured", cfg, steps, *build(cfg, machine, folder)),
            Variant(f"{TIMES}x batch_size", larger, cfg.steps, *build(larger, machine, folder)),
            from_disk,
        ]
        read_from_disk(from_disk.windows, tiled, machine)
        for v in variants:
            lap(v.state, v.windows, v.cfg, machine, range(cfg.warmup_steps))
        for repeat in range(cfg.repeats):  # in turns, so that a machine that slows down slows all
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
    """The Markdown table that shows these results; a variant's speed also as a multiple of the config's own."""
    header = ["Device", "Config", "dtype", "", "Rows", "Corpus, tokens", "Tokens/s", "As a multiple"]
    rows = []
    for r in results:
        what = [r["machine"]["device"], f"{r['config']}, {r['optimizer']}", r["machine"]["dtype"]]
        for i, v in enumerate(r["variants"]):
            sizes = [f"{v['batch_size']:,}", f"{v['corpus_tokens']:,}"]
            rows.append([*what, v["name"], *sizes, show(v["tok_per_sec"]), show(v["ratio"], ".2f") if i else ""])
            what = ["", "", ""]
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, ScalingConfig, DataError)
