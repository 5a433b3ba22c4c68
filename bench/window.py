"""What a model predicts beyond its first block, and how long each token takes there.

python -m bench.window out/demo/best.pt

Stretches of the val split are read in two ways. As generated: token by token, as sample.py does. In half blocks: the
window moves on by half a block and is read again from its start, which is how learned positions are generated too.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

import configurator
from bench.common import markdown, origin, progress, spread, write_result
from model import GPT
from robopoet.errors import ConfigError, bounds
from robopoet.machine import find_machine
from robopoet.text.dataset import find_dataset, read_meta
from robopoet.text.windows import Split, open_split
from robopoet.weights import checkpoint
from robopoet.writing.decode import generate, prepack_matrices


@dataclass(frozen=True)
class WindowConfig:
    """The keys of bench.window."""

    checkpoint: str = "out/demo/best.pt"  # the model
    blocks: int = 8  # length of a stretch, in blocks of the model's context
    rows: int = 64  # stretches at most, read at the same time
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # dtype of the weights; auto: the fastest here
    out: str = ""  # name of the result (window_RUN_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "rows", 1) + bounds(self, "blocks", 2)


def stretches(split: Split, length: int, limit: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stretches of `length` tokens within documents, spread evenly: ids (rows, length) and tags (rows,), int64 each."""
    firsts, stops, span = split.documents
    starts = [(s, span[i]) for i in range(len(firsts)) for s in range(firsts[i], stops[i] - length + 1, length)]
    if not starts:
        raise ConfigError(f"blocks: no document of {split.path} has {length} tokens; lower it")
    chosen = [starts[i] for i in np.unique(np.linspace(0, len(starts) - 1, min(limit, len(starts))).astype(int))]
    ids = split.gather(np.array([start for start, _ in chosen]), length, torch.device("cpu"))
    return ids, torch.from_numpy(split.tags[[place for _, place in chosen]])


def read_as_generated(model: GPT, ids: torch.Tensor, tags: torch.Tensor | None) -> tuple[torch.Tensor, list[float]]:
    """The loss of each token but the first of `ids`, (rows, n - 1) nats, and the seconds that each step took."""
    losses, times = [], [time.perf_counter()]

    def force(logits: torch.Tensor) -> torch.Tensor:
        target = ids[:, len(losses) + 1]
        losses.append(F.cross_entropy(logits.float(), target, reduction="none"))
        return target

    for _ in progress(generate(model, ids[:, :1], ids.shape[1] - 1, force, tags), "tokens"):
        times.append(time.perf_counter())
    return torch.stack(losses, dim=1), list(np.diff(times))


@torch.inference_mode()
def read_in_half_blocks(model: GPT, ids: torch.Tensor, tags: torch.Tensor | None) -> torch.Tensor:
    """The same losses, when the window moves on by half a block at a time and is read again from its start."""
    T, n = model.config.block_size, ids.shape[1]
    parts = []
    for start in range(0, n - 1, T // 2):
        window, targets = ids[:, start : start + T].clone(), ids[:, start + 1 : start + T + 1]
        if tags is not None:
            window[:, 0] = tags
        losses = model(window[:, : targets.shape[1]], targets, reduction="none")[1]
        parts.append(losses if start == 0 else losses[:, T // 2 :])
    return torch.cat(parts, dim=1)[:, : n - 1]


def main(cfg: WindowConfig) -> None:
    """Read both ways, print a table and write the result."""
    machine, path = find_machine(cfg.device, cfg.dtype), Path(cfg.checkpoint)
    model, _, saved = checkpoint.load_model(path, machine.device, machine.dtype)
    T = model.config.block_size
    if T % 2:
        raise ConfigError(f"checkpoint: {path} has a context of {T} tokens, must be even")
    folder = find_dataset(saved.get("config", {}).get("dataset", ""))
    split = open_split(folder, "val", read_meta(folder), T, torch.device("cpu"))
    ids, tags = stretches(split, cfg.blocks * T + 1, cfg.rows)
    ids, tags = ids.to(machine.device), tags.to(machine.device) if (tags >= 0).all() else None
    again = read_in_half_blocks(model, ids, tags)
    prepack_matrices(model)
    generated, seconds = read_as_generated(model, ids, tags)
    ms = [1000 * statistics.mean(seconds[i * T : (i + 1) * T]) for i in range(cfg.blocks)]
    result = origin("window", machine) | {
        "run": path.parent.name,
        "positions": model.config.positions,
        "block_size": T,
        "rows": len(ids),
        "generated": [part.double().mean().item() for part in generated.split(T, dim=1)],
        "half_blocks": [part.double().mean().item() for part in again.split(T, dim=1)],
        "ms_per_step": ms,
    }
    print(table([result]))
    write_result(result, cfg.out or f"window_{result['run']}_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results, a column each: the first block, and the mean of all later ones."""
    ways = {"generated": "as generated", "half_blocks": "in half blocks"}
    rows = [["positions", *(r["positions"] for r in results)]]
    rows += [["stretches x tokens", *(f"{r['rows']} x {len(r['generated']) * r['block_size']:,}" for r in results)]]
    for key, way in ways.items():
        rows.append([f"first block, {way}", *(f"{r[key][0]:.3f}" for r in results)])
        rows.append([f"later blocks, {way}", *(f"{statistics.mean(r[key][1:]):.3f}" for r in results)])
    rows.append(["ms a step, first block", *(f"{r['ms_per_step'][0]:.2f}" for r in results)])
    later = [spread(r["ms_per_step"][1:]) for r in results]
    rows.append(["ms a step, later blocks", *(f"{found['median']:.2f}" for found in later)])
    return markdown(["", *(r["run"] for r in results)], rows)


if __name__ == "__main__":
    configurator.launch(main, WindowConfig, positional="checkpoint")
