"""Time the steps that train.py takes, on this machine, beside what the reference card must reach.

python -m bench.train_speed config/robopoet.yaml --device=auto
python -m bench.train_speed config/robopoet.yaml --vram_limit_gb=8
python -m bench.train_speed config/robopoet.yaml --device=cpu --peer=PATH_TO_NANOGPT
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import checkpoint
import configurator
import train
from bench.common import markdown, origin, show, spread, write_result
from bench.peer import Peer, load_model_module
from configurator import ConfigError, Machine, bounds
from data import DataError
from data.batches import TrainWindows, open_split, read_meta
from model import GPT, linear


@dataclass(frozen=True)
class SpeedConfig(train.TrainConfig):
    """The keys of train.py, and how its steps are timed."""

    # timing
    repeats: int = 5  # laps, of which the median counts
    steps: int = 10  # optimizer steps of a lap
    warmup_steps: int = 3  # steps before the first lap; the first of them compiles
    vram_limit_gb: float = 0.0  # allow PyTorch this much GPU memory, as a smaller card would (0: all there is)
    peer: str = ""  # a checkout of nanoGPT, timed in turns with ours
    out: str = ""  # name of the result (train_speed_CONFIG_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return super().problems() + bounds(self, "repeats steps warmup_steps", 1) + bounds(self, "vram_limit_gb", 0)


TARGETS = {  # what the reference card, an RTX of 8 GB, must reach: in words, and as a test
    "over 1,000 tokens/s": lambda result: result["tok_per_sec"]["median"] > 1000,
    "under 6 GB of peak memory": lambda result: result["peak_mem_mb"] < 6 * 1024,
    "under 10M parameters": lambda result: result["parameters"] < 10_000_000,
}


def judge(result: dict[str, Any]) -> dict[str, bool]:
    """Which targets the figures of a result meet."""
    return {target: test(result) for target, test in TARGETS.items()}


def verdicts(result: dict[str, Any]) -> list[str]:
    """A line for each target: met or not, on which device, and whether that is the card it was set for."""
    device = result["machine"]["device"]
    is_reference = "RTX" in device and round(result["machine"]["memory_gb"] or 0) == 8
    where = device if is_reference else f"{device}, not the reference card"
    return [f"{target}: {'met' if result['targets'][target] else 'not met'} ({where})" for target in TARGETS]


def limit_vram(machine: Machine, limit_gb: float) -> None:
    """Let PyTorch allocate at most `limit_gb` on a CUDA device; what the driver itself takes is not counted."""
    if limit_gb and machine.device.type == "cuda":
        share = limit_gb * 2**30 / torch.cuda.get_device_properties(machine.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), machine.device)
    elif limit_gb:
        configurator.warn(f"vram_limit_gb: not applicable to {machine.device}")


def lap(
    state: train.State, windows: TrainWindows, cfg: SpeedConfig, machine: Machine, steps: range
) -> tuple[float, float]:
    """Milliseconds a step takes, as the mean over `steps`, and the loss of the last in nats per token."""
    machine.synchronize()
    start = time.perf_counter()
    for step in steps:
        loss, _ = train.train_step(state, windows, cfg, machine, step)
    machine.synchronize()
    return 1000 * (time.perf_counter() - start) / len(steps), loss.item()


def check_same_loss(cfg: SpeedConfig, machine: Machine, model: GPT, windows: TrainWindows) -> None:
    """Raises ConfigError unless nanoGPT's model with our weights has our loss on a batch, to 1e-4 in float32."""
    theirs = load_model_module(Path(cfg.peer))
    args = {key: getattr(model.config, key) for key in checkpoint.NANOGPT_ARGS} | {"dropout": 0.0}
    peer = theirs.GPT(theirs.GPTConfig(**args)).to(machine.device)
    peer.load_state_dict(model.state_dict(), strict=False)  # its mask, where it has one, is no weight
    inputs, targets = windows.batch(0, cfg.batch_size, machine.device)
    with torch.no_grad():
        losses = [float(m.eval()(inputs, targets.contiguous())[1]) for m in (model, peer)]
    if abs(losses[0] - losses[1]) > 1e-4:
        raise ConfigError(f"peer: its loss with our weights is {losses[1]:.6f}, ours is {losses[0]:.6f}")


OPERATIONS = {  # where a step's time goes: a share's name -> the operations counted in it
    "matmul": ("aten::mm", "aten::addmm", "aten::linear"),
    "attention and loss": ("aten::bmm", "softmax", "attention", "nll_loss", "aten::gather", "aten::scatter"),
    "optimizer": ("adamw", "foreach", "linalg_vector_norm"),
    "dropout": ("bernoulli", "dropout", "random_"),
    "copies": ("aten::copy_",),
}


def time_shares(state: train.State, windows: TrainWindows, cfg: SpeedConfig, machine: Machine) -> dict[str, float]:
    """The share of a step's time in each kind of operation, by PyTorch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu := machine.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        lap(state, windows, cfg, machine, range(1))
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        kind = next((k for k, names in OPERATIONS.items() if any(name in event.key for name in names)), "rest")
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        spent[kind] = spent.get(kind, 0.0) + time_us
    return {kind: time_us / sum(spent.values()) for kind, time_us in spent.items()}


def main(cfg: SpeedConfig) -> None:
    """Build what train.py would build, time its steps, print the figures and keep them."""
    # --- as train.main does
    machine = configurator.find_machine(cfg.device, cfg.dtype, cfg.backend)
    if machine.world_size > 1:
        raise ConfigError("this times one process; start it without torchrun")
    limit_vram(machine, cfg.vram_limit_gb)
    folder = train.find_dataset(cfg.dataset)
    meta = read_meta(folder)
    windows = TrainWindows(
        open_split(folder, "train", meta, cfg.block_size, machine.device), cfg.block_size, cfg.seed, cfg.tag_prob
    )
    model = train.new_model(cfg, meta["vocab_size"])
    state = train.build_state(cfg, machine, model)

    # --- the peer
    peers: list[Peer] = []
    if cfg.peer:
        peers = [Peer("nanoGPT", Path(cfg.peer), tuned=False)]
        if machine.device.type == "cpu":
            how = "compiled" if machine.dtype is torch.float32 else "autocast and compiled"
            peers.append(Peer(f"nanoGPT, {how}", Path(cfg.peer), tuned=True))
        check_same_loss(cfg, machine, model, windows)

    # --- the clock
    first_ms, _ = lap(state, windows, cfg, machine, range(1))
    if cfg.warmup_steps > 1:
        lap(state, windows, cfg, machine, range(1, cfg.warmup_steps))
    starts = range(cfg.warmup_steps, cfg.warmup_steps + cfg.repeats * cfg.steps, cfg.steps)
    laps, peaks, peak_mem_mb, peer_runs = [], [], 0.0, [[] for _ in peers]
    for start in starts:  # in turns, so that a machine that slows down slows all
        laps.append(lap(state, windows, cfg, machine, range(start, start + cfg.steps)))
        peak_mem_mb = max(peak_mem_mb, machine.peak_mem_mb())  # before matmul_flops, which is no part of training
        peaks.append(machine.matmul_flops(linear))
        for peer, runs in zip(peers, peer_runs, strict=True):
            times, mem_mb = peer.run(cfg, machine, folder, meta["vocab_size"], cfg.warmup_steps + cfg.steps)
            runs.append((statistics.median(times[cfg.warmup_steps :]), mem_mb))

    # --- the figures
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    dt_ms = [ms for ms, _ in laps]
    flops = 1000 * tokens * model.flops_per_token()
    config = ([Path(arg).stem for arg in sys.argv[1:] if arg.endswith((".yaml", ".yml"))] or ["defaults"])[-1]
    result = origin("train_speed", machine) | {
        "config": config,
        "parameters": model.num_params(),
        "tokens_per_step": tokens,
        "compiled": state.forward is not model,
        "optimizer": cfg.optimizer,
        "vram_limit_gb": cfg.vram_limit_gb if machine.device.type == "cuda" else 0.0,
        "first_step_ms": first_ms,
        "dt_ms": spread(dt_ms),
        "tok_per_sec": spread([1000 * tokens / ms for ms in dt_ms]),
        "mfu": spread([flops / ms / peak for ms, peak in zip(dt_ms, peaks, strict=True)]),
        "matmul_tflops": spread([peak / 1e12 for peak in peaks]),
        "peak_mem_mb": peak_mem_mb,
        "loss": laps[-1][1],
        "repeats_dt_ms": dt_ms,
        "time_share": time_shares(state, windows, cfg, machine),
        "peers": {},
    }
    for peer, runs in zip(peers, peer_runs, strict=True):
        result["peers"][peer.name] = {
            "dt_ms": spread([ms for ms, _ in runs]),
            "tok_per_sec": spread([1000 * tokens / ms for ms, _ in runs]),
            "ratio": spread([ms / ours for (ms, _), ours in zip(runs, dt_ms, strict=True)]),
            "peak_mem_mb": max(mem_mb for _, mem_mb in runs),
        }
    result["targets"] = judge(result)
    print(table([result]))
    print(*verdicts(result), sep="\n")
    write_result(result, cfg.out or f"train_speed_{config}_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table that shows these results; a peer's row has our speed as a multiple of its own."""
    header = ["Device", "Config", "dtype", "", "Tokens/s", "ms/step", "MFU", "Peak memory", "Ours is faster"]
    rows = []
    for r in results:
        what = [r["machine"]["device"], f"{r['config']}, {r['optimizer']}", r["machine"]["dtype"]]
        ours = "RoboPoet" + (", compiled" if r["compiled"] else "")
        memory = f"{r['peak_mem_mb']:,.0f} MB"
        speed = [show(r["tok_per_sec"]), show(r["dt_ms"], ",.1f"), f"{r['mfu']['median']:.1%}"]
        rows.append([*what, ours, *speed, memory, ""])
        for name, p in r["peers"].items():
            mfu = r["mfu"]["median"] * r["dt_ms"]["median"] / p["dt_ms"]["median"]
            speed = [show(p["tok_per_sec"]), show(p["dt_ms"], ",.1f"), f"{mfu:.1%}"]
            rows.append(["", "", "", name, *speed, f"{p['peak_mem_mb']:,.0f} MB", show(p["ratio"], ".2f")])
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, SpeedConfig, DataError, torch.OutOfMemoryError)
