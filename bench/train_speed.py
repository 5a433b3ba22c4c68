"""Time the steps that train.py takes, on this machine, beside what the reference card must reach.

python -m bench.train_speed config/robopoet.yaml --device=auto
python -m bench.train_speed config/robopoet.yaml --vram_limit_gb=8
python -m bench.train_speed config/robopoet_adamw.yaml --device=cpu --peer=PATH_TO_NANOGPT
python -m bench.train_speed config/gpt2.yaml --vocab_size=50257 --gradient_accumulation_steps=1
"""

import statistics
import subprocess
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import configurator
import train
from bench.common import config_name, forget_peak, markdown, origin, show, spread, train_command, write_result
from bench.peer import PADDED_VOCAB, Peer, load_model_module, peer_vocab
from configurator import ConfigError, bounds
from model import GPT
from robopoet.errors import DataError
from robopoet.machine import Machine, find_machine
from robopoet.ops import linear
from robopoet.text.batches import (
    FORMAT,
    Meta,
    Span,
    SplitMeta,
    TrainWindows,
    bin_sha256,
    encode_meta,
    find_dataset,
    open_split,
    read_meta,
)
from robopoet.text.tokenizer import CharTokenizer
from robopoet.weights import checkpoint


@dataclass(frozen=True)
class SpeedConfig(train.TrainConfig):
    """The keys of train.py, and how its steps are timed."""

    # timing
    repeats: int = 5  # laps, of which the median counts
    steps: int = 10  # optimizer steps of a lap
    warmup_steps: int = 4  # steps before the first lap; the first compiles, the fourth records CUDA's graph
    vram_limit_gb: float = 0.0  # allow PyTorch this much GPU memory, as a smaller card would (0: all there is)
    start: bool = True  # time, too, how long train.py takes to its first step
    compile_mode: Literal["default", "reduce-overhead"] = "default"  # torch.compile's; the other has graphs of its own
    vocab_size: int = 0  # time on random ids of so many kinds (0: on the dataset)
    peer: str = ""  # a checkout of nanoGPT, timed in turns with ours
    out: str = ""  # name of the result (train_speed_CONFIG_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = super().problems() + bounds(self, "repeats steps warmup_steps", 1) + bounds(self, "vram_limit_gb", 0)
        return found + (bounds(self, "vocab_size", 2, 65_535) if self.vocab_size else [])


TARGETS = {  # what the reference run must reach on its card, an RTX of 8 GB: in words, and as a test
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


def find_one_machine(cfg: train.TrainConfig) -> Machine:
    """As train.py finds it; raises ConfigError when there is more than one process, for this times one."""
    machine = find_machine(cfg.device, cfg.dtype, cfg.backend)
    if machine.world_size > 1:
        raise ConfigError("this times one process; start it without torchrun")
    return machine


def build(cfg: train.TrainConfig, machine: Machine, folder: Path) -> tuple[train.State, TrainWindows]:
    """What train.py would work on: a fresh model with its optimizers, and the rows of the corpus in `folder`."""
    meta = read_meta(folder)
    split = open_split(folder, "train", meta, cfg.block_size, machine.device)
    state = train.build_state(cfg, machine, train.new_model(cfg, meta.vocab_size))
    if isinstance(cfg, SpeedConfig) and cfg.compile_mode != "default" and state.forward is not state.model:
        state.forward = torch.compile(state.model, mode=cfg.compile_mode)
    return state, TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)


def write_random_corpus(folder: Path, cfg: SpeedConfig) -> None:
    """Fill `folder` as prepare.py does, with random ids below vocab_size; a character stands for each."""
    rng = np.random.default_rng(cfg.seed)
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * (cfg.block_size + 1)
    splits = {}
    for name, size in {"train": max(40 * tokens_per_step, 10**6), "val": 2 * (cfg.block_size + 1), "test": 0}.items():
        path, largest = folder / f"{name}.bin", cfg.vocab_size - 1
        rng.integers(cfg.vocab_size, size=size).astype("<u2").tofile(path)
        splits[name] = SplitMeta(size, largest, size, 4 * size, bin_sha256(path), (Span(name, "random", 0, size),))
    chars = "".join(chr(0x10000 + id) for id in range(cfg.vocab_size))  # beyond the surrogates, which are not text
    meta = Meta(FORMAT, "", "0" * 64, cfg.vocab_size, {}, (), splits, CharTokenizer(chars, []).saved())
    (folder / "meta.json").write_bytes(encode_meta(meta))


def time_to_first_step(cfg: SpeedConfig, folder: Path) -> float:
    """Seconds from launching train.py until its first status line, imports and compilation included."""
    with tempfile.TemporaryDirectory() as out:
        command = train_command(cfg, dataset=folder, out_dir=out)
        printed, start = "", time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout or ():
                printed += line
                if line.startswith("step "):
                    elapsed_s = time.perf_counter() - start
                    process.kill()
                    return elapsed_s
    raise ConfigError(f"train.py came to no first step: {(printed.splitlines() or ['it printed nothing'])[-1]}")


def lap(
    state: train.State, windows: TrainWindows, cfg: train.TrainConfig, machine: Machine, steps: range
) -> tuple[float, float]:
    """Milliseconds a step takes, as the mean over `steps`, and the loss of the last in nats per token."""
    machine.synchronize()
    start = time.perf_counter()
    for step in steps:
        loss, _ = train.train_step(state, windows, step)
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


OPERATIONS = {  # where a step's time goes: a share's name -> parts of the names of operations, and of CUDA kernels
    # before matmul: flash attention's kernels name cutlass too
    "attention and loss": "bmm attention softmax nll_loss aten::gather aten::scatter flash fmha".split(),
    "matmul": "aten::mm aten::addmm linear gemm cutlass nvjet".split(),
    "optimizer": "adam foreach linalg_vector_norm multi_tensor".split(),
    "dropout": "bernoulli dropout random_".split(),
    "copies": "aten::copy_ aten::_to_copy aten::clone memcpy copy_kernel".split(),
}


def kind_of(operation: str) -> str:
    """The share in which an operation or a CUDA kernel of this name is counted."""
    return next((k for k, names in OPERATIONS.items() if any(name in operation.lower() for name in names)), "rest")


class OperationClock(TorchDispatchMode):
    """Sums the seconds spent in each operation, by its name."""

    def __init__(self):
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[func.name()] += time.perf_counter() - start
        return result


def kernel_seconds(profiled: profile, kind: DeviceType) -> Counter[str]:
    """The seconds that a kind of device spent in each kernel, by its name."""
    seconds: Counter[str] = Counter()
    for event in profiled.key_averages():
        if event.device_type == kind and not event.is_user_annotation:  # `is` would compare two wrappers of one value
            seconds[event.key] += event.self_device_time_total / 1e6
    return seconds


def time_shares(
    state: train.State, windows: TrainWindows, cfg: train.TrainConfig, machine: Machine
) -> dict[str, float]:
    """The share of three steps' time in each kind of operation, what lies between operations left out.

    On CUDA kernels are counted, since a CUDA graph has no operations; on CPU a compiled model runs here as uncompiled.
    """
    seconds: Counter[str] = Counter()
    if machine.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            lap(state, windows, cfg, machine, range(3))
        seconds = kernel_seconds(profiled, DeviceType.CUDA)
    else:  # the profiler's own allocations cost page faults: large results look up to five times as slow
        with OperationClock() as clock:
            lap(state, windows, cfg, machine, range(3))
        seconds = clock.seconds
    spent: Counter[str] = Counter()
    for operation, s in seconds.items():
        spent[kind_of(operation)] += s
    return {kind: s / spent.total() for kind, s in spent.items()}


def measure(cfg: SpeedConfig, machine: Machine, folder: Path) -> dict[str, Any]:
    """Build what train.py would build from the corpus in `folder` and time its steps; returns the result."""
    start_s = time_to_first_step(cfg, folder) if cfg.start else None
    state, windows = build(cfg, machine, folder)
    model = state.model

    # --- the peer
    peers: list[Peer] = []
    if cfg.peer:
        peers = [Peer("nanoGPT", Path(cfg.peer), tuned=False)]
        if machine.device.type == "cpu":
            how = "compiled" if machine.dtype is torch.float32 else "autocast and compiled"
            peers.append(Peer(f"nanoGPT, {how}", Path(cfg.peer), tuned=True))
        check_same_loss(cfg, machine, model, windows)
        forget_peak(machine)

    # --- the clock
    first_ms, _ = lap(state, windows, cfg, machine, range(1))
    if cfg.warmup_steps > 1:
        lap(state, windows, cfg, machine, range(1, cfg.warmup_steps))
    starts = range(cfg.warmup_steps, cfg.warmup_steps + cfg.repeats * cfg.steps, cfg.steps)
    laps, peaks, scales, peak_mem_mb, peer_runs = [], [], [], 0.0, [[] for _ in peers]
    peer_vocab_size = peer_vocab(model.config.vocab_size)
    for start in starts:  # in turns, so that a machine that slows down slows all
        laps.append(lap(state, windows, cfg, machine, range(start, start + cfg.steps)))
        peak_mem_mb = max(peak_mem_mb, machine.peak_mem_mb())  # before matmul_flops, which is no part of training
        scales.append(state.scaler.get_scale())
        peaks.append(machine.matmul_flops(linear))
        for peer, runs in zip(peers, peer_runs, strict=True):
            times, mem_mb = peer.run(cfg, machine, folder, peer_vocab_size, cfg.warmup_steps + cfg.steps)
            runs.append((statistics.median(times[cfg.warmup_steps :]), mem_mb))

    # --- the figures
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    dt_ms = [ms for ms, _ in laps]
    flop_rates = [1000 * tokens * model.flops_per_token() / ms for ms in dt_ms]
    peak = max(*peaks, *flop_rates)  # the best seen: beside another load a product may be slower than a whole step
    result = origin("train_speed", machine) | {
        "config": config_name(),
        "parameters": model.num_params(),
        "tokens_per_step": tokens,
        "compiled": state.forward is not model,
        "compile_mode": cfg.compile_mode,
        "recorded": state.graphed_update is not None,
        "optimizer": cfg.optimizer,
        "vram_limit_gb": cfg.vram_limit_gb if machine.device.type == "cuda" else 0.0,
        "start_s": start_s,
        "first_step_ms": first_ms,
        "dt_ms": spread(dt_ms),
        "tok_per_sec": spread([1000 * tokens / ms for ms in dt_ms]),
        "mfu": spread([rate / peak for rate in flop_rates]),
        "matmul_tflops": spread([peak / 1e12 for peak in peaks]),
        "peak_mem_mb": peak_mem_mb,
        "loss": laps[-1][1],
        "repeats_dt_ms": dt_ms,
        "repeats_loss": [loss for _, loss in laps],
        "loss_scales": scales,  # 1 unless in float16
        "time_share": time_shares(state, windows, cfg, machine),
        "peers": {},
    }
    for peer, runs in zip(peers, peer_runs, strict=True):
        result["peers"][peer.name] = {
            "vocab_size": peer_vocab_size,
            "dt_ms": spread([ms for ms, _ in runs]),
            "tok_per_sec": spread([1000 * tokens / ms for ms, _ in runs]),
            "ratio": spread([ms / ours for (ms, _), ours in zip(runs, dt_ms, strict=True)]),
            "peak_mem_mb": max(mem_mb for _, mem_mb in runs),
        }
    return result | {"targets": judge(result)}


def main(cfg: SpeedConfig) -> None:
    """Time the steps that train.py would take, print the figures and keep them."""
    machine = find_one_machine(cfg)
    limit_vram(machine, cfg.vram_limit_gb)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if cfg.vocab_size else find_dataset(cfg.dataset)
        if cfg.vocab_size:
            write_random_corpus(folder, cfg)
        result = measure(cfg, machine, folder)
    print(table([result]))
    print(*verdicts(result), sep="\n")
    write_result(result, cfg.out or f"train_speed_{result['config']}_DEVICE")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table that shows these results; a peer's row has our speed as a multiple of its own."""
    header = ["Device", "Config", "dtype", "", "Tokens/s", "ms/step", "MFU", "Peak memory", "Start to first step"]
    header.append("Ours is faster")
    rows = []
    for r in results:
        what = [r["machine"]["device"], f"{r['config']}, {r['optimizer']}", r["machine"]["dtype"]]
        ours = "RoboPoet" + (", compiled" if r["compiled"] else "") + (", recorded" if r.get("recorded") else "")
        ours += ", reduce-overhead" if r.get("compile_mode") == "reduce-overhead" else ""
        memory = f"{r['peak_mem_mb']:,.0f} MB"
        speed = [show(r["tok_per_sec"]), show(r["dt_ms"], ",.1f"), f"{r['mfu']['median']:.1%}"]
        start = f"{r['start_s']:.1f} s" if r.get("start_s") else ""
        rows.append([*what, ours, *speed, memory, start, ""])
        for name, p in r["peers"].items():
            mfu = r["mfu"]["median"] * r["dt_ms"]["median"] / p["dt_ms"]["median"]
            speed = [show(p["tok_per_sec"]), show(p["dt_ms"], ",.1f"), f"{mfu:.1%}"]
            name += f", {PADDED_VOCAB:,} ids" if p.get("vocab_size") == PADDED_VOCAB else ""
            rows.append(["", "", "", name, *speed, f"{p['peak_mem_mb']:,.0f} MB", "", show(p["ratio"], ".2f")])
    return markdown(header, rows)


if __name__ == "__main__":
    configurator.launch(main, SpeedConfig, DataError)
