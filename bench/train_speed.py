"""Time train.py's steps on this machine, and compare with nanoGPT and with the reference card's targets.

python -m bench.train_speed config/robopoet.yaml --device=auto
python -m bench.train_speed config/robopoet.yaml --vram_limit_gb=8
python -m bench.train_speed config/robopoet_adamw.yaml --device=cpu --peer=PATH_TO_NANOGPT
python -m bench.train_speed config/gpt2.yaml --vocab_size=50257 --gradient_accumulation_steps=1
"""

import contextlib
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
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
from bench.common import (
    config_name,
    forget_peak,
    last_line,
    origin,
    progress,
    show,
    side_by_side,
    spread,
    train_command,
    write_result,
)
from bench.peer import PADDED_VOCAB, Peer, check_is_gpt2, load_model_module, peer_vocab
from model import GPT
from robopoet import files
from robopoet.errors import ConfigError, DataError, bounds, warn
from robopoet.machine import Machine, find_machine
from robopoet.ops import linear
from robopoet.text.dataset import FORMAT, Meta, Span, SplitMeta, encode_meta, find_dataset, read_meta
from robopoet.text.tokenizer import CharTokenizer
from robopoet.text.windows import TrainWindows, open_split
from robopoet.training.run import Start
from robopoet.weights import header


@dataclass(frozen=True)
class SpeedConfig(train.TrainConfig):
    """The keys of train.py, and those of the timing."""

    # timing
    repeats: int = 5  # laps; the median counts
    steps: int = 10  # optimizer steps of a lap
    warmup_steps: int = 4  # steps before the first lap; the first compiles, the fourth records a CUDA graph
    vram_limit_gb: float = 0.0  # GPU memory that PyTorch may use, as on a smaller card (0: all)
    start: bool = True  # also time train.py from launch to its first step
    compile_mode: Literal["default", "reduce-overhead"] = "default"  # torch.compile's mode
    vocab_size: int = 0  # time on random ids below this (0: on the dataset)
    peer: str = ""  # a checkout of nanoGPT, timed in turns with ours
    out: str = ""  # name of the result (train_speed_CONFIG_DEVICE unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = super().problems() + bounds(self, "repeats steps warmup_steps", 1) + bounds(self, "vram_limit_gb", 0)
        return found + (bounds(self, "vocab_size", 2, 65_535) if self.vocab_size else [])


TARGETS = {  # what the reference run must reach on its card, an RTX of 8 GB: description -> test
    "over 1,000 tokens/s": lambda result: result["tok_per_sec"]["median"] > 1000,
    "under 6 GB of peak memory": lambda result: result["peak_mem_mb"] < 6 * 1024,
    "under 10M parameters": lambda result: result["parameters"] < 10_000_000,
}


def judge(result: dict[str, Any]) -> dict[str, bool]:
    """Which targets a result meets."""
    return {target: test(result) for target, test in TARGETS.items()}


def card(result: dict[str, Any]) -> str:
    """The device of a result, and whether it is not the reference card."""
    device = result["machine"]["device"]
    is_reference = "RTX" in device and round(result["machine"]["memory_gb"] or 0) == 8
    return device if is_reference else f"{device}, not the reference card"


def verdicts(result: dict[str, Any]) -> list[str]:
    """A line per target: whether it is met, and on which device."""
    return [f"{target}: {'met' if result['targets'][target] else 'not met'} ({card(result)})" for target in TARGETS]


def limit_vram(machine: Machine, limit_gb: float) -> None:
    """Let PyTorch allocate at most `limit_gb` on a CUDA device, on top of what the driver takes."""
    if limit_gb and machine.device.type == "cuda":
        share = limit_gb * 2**30 / torch.cuda.get_device_properties(machine.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), machine.device)
    elif limit_gb:
        warn(f"vram_limit_gb: not applicable to {machine.device}")


def find_one_machine(cfg: train.TrainConfig) -> Machine:
    """The machine as train.py finds it; raises ConfigError under torchrun with several processes."""
    machine = find_machine(cfg.device, cfg.dtype, cfg.backend)
    if machine.world_size > 1:
        raise ConfigError("this times one process; start it without torchrun")
    return machine


def build(
    cfg: train.TrainConfig, machine: Machine, folder: Path, start: Start | None = None
) -> tuple[train.State, TrainWindows]:
    """What train.py would build: a model, new or from `start`, its optimizers, and the rows of `folder`'s corpus."""
    meta = read_meta(folder)
    split = open_split(folder, "train", meta, cfg.block_size, machine.device)
    state = train.build_state(cfg, machine, train.make_model(cfg, meta.vocab_size, start), split)
    if isinstance(cfg, SpeedConfig) and cfg.compile_mode != "default" and state.forward is not state.model:
        state.forward = torch.compile(state.model, mode=cfg.compile_mode)
    return state, TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)


def write_random_corpus(folder: Path, cfg: SpeedConfig) -> None:
    """Fill `folder` as prepare.py does, with random ids below vocab_size, a character for each."""
    rng = np.random.default_rng(cfg.seed)
    tokens_per_step = cfg.gradient_accumulation_steps * cfg.batch_size * (cfg.block_size + 1)
    splits = {}
    for name, size in {"train": max(40 * tokens_per_step, 10**6), "val": 2 * (cfg.block_size + 1), "test": 0}.items():
        path, largest = folder / f"{name}.bin", cfg.vocab_size - 1
        rng.integers(cfg.vocab_size, size=size).astype("<u2").tofile(path)
        splits[name] = SplitMeta(
            size, largest, size, 4 * size, files.sha256(DataError, path), (Span(name, "random", 0, size),)
        )
    chars = "".join(chr(0x10000 + id) for id in range(cfg.vocab_size))  # above the surrogates, which are not text
    meta = Meta(FORMAT, "", "0" * 64, cfg.vocab_size, {}, (), splits, CharTokenizer(chars, []).saved)
    (folder / "meta.json").write_bytes(encode_meta(meta))


@contextlib.contextmanager
def at_step(command: list[str], step: int) -> Iterator[subprocess.Popen]:
    """Run train.py until it prints a status line of `step` or a later one; yields its process, and then kills it.

    Raises ConfigError if it ends before.
    """
    printed = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            printed += line
            if line.startswith("step ") and int(line.split()[1]) >= step:
                try:
                    yield process
                finally:
                    process.kill()
                return
    raise ConfigError(f"train.py came to no {'first step' if step == 1 else f'step {step}'}: {last_line(printed)}")


def time_to_first_step(cfg: SpeedConfig, folder: Path) -> float:
    """Seconds from the launch of train.py to its first status line, imports and compilation included."""
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        with at_step(train_command(cfg, dataset=folder, out_dir=out), 1):
            return time.perf_counter() - start


def lap(
    state: train.State, windows: TrainWindows, cfg: train.TrainConfig, machine: Machine, steps: range
) -> tuple[float, float]:
    """The mean milliseconds of `steps`, and the last one's loss in nats per token."""
    machine.synchronize()
    start = time.perf_counter()
    for step in steps:
        loss, _ = train.train_step(state, windows, step)
    machine.synchronize()
    return 1000 * (time.perf_counter() - start) / len(steps), loss.item()


def check_same_loss(cfg: SpeedConfig, machine: Machine, model: GPT, windows: TrainWindows) -> None:
    """Check that nanoGPT's model with our weights has our loss on a batch, within 1e-4 in float32.

    Raises ConfigError if it has not.
    """
    check_is_gpt2(model.config)
    theirs = load_model_module(Path(cfg.peer))
    args = {key: getattr(model.config, key) for key in header.NANOGPT_ARGS} | {"dropout": 0.0}
    peer = theirs.GPT(theirs.GPTConfig(**args)).to(machine.device)
    peer.load_state_dict(model.state_dict(), strict=False)  # its attention mask is a buffer, not a weight
    inputs, targets = windows.batch(0, cfg.batch_size, machine.device)
    with torch.no_grad():
        losses = [float(m.eval()(inputs, targets.contiguous())[1]) for m in (model, peer)]
    if abs(losses[0] - losses[1]) > 1e-4:
        raise ConfigError(f"peer: its loss with our weights is {losses[1]:.6f}, ours is {losses[0]:.6f}")


OPERATIONS = {  # kinds of operation -> parts of the names of their operations and CUDA kernels
    # before matmul, since flash attention's kernels also name cutlass
    "attention and loss": "bmm attention softmax nll_loss aten::gather aten::scatter flash fmha".split(),
    "matmul": "aten::mm aten::addmm linear gemm cutlass nvjet".split(),
    "optimizer": "adam foreach linalg_vector_norm multi_tensor".split(),
    "dropout": "bernoulli dropout random_".split(),
    "copies": "aten::copy_ aten::_to_copy aten::clone memcpy copy_kernel".split(),
}


def kind_of(operation: str) -> str:
    """The kind that an operation or a CUDA kernel counts as."""
    return next((k for k, names in OPERATIONS.items() if any(name in operation.lower() for name in names)), "rest")


class OperationClock(TorchDispatchMode):
    """Sums the seconds spent in each operation, by name."""

    def __init__(self):
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds[func.name()] += time.perf_counter() - start
        return result


def kernel_seconds(profiled: profile, kind: DeviceType) -> Counter[str]:
    """The seconds that a kind of device spent in each kernel, by name."""
    seconds: Counter[str] = Counter()
    for event in profiled.key_averages():
        if event.device_type == kind and not event.is_user_annotation:  # `is` fails: equal values, two wrappers
            seconds[event.key] += event.self_device_time_total / 1e6
    return seconds


def time_shares(
    state: train.State, windows: TrainWindows, cfg: train.TrainConfig, machine: Machine
) -> dict[str, float]:
    """Each kind of operation's share of the time spent in operations, over three steps.

    On CUDA kernels are timed, since a CUDA graph has no operations; on CPU a compiled model runs uncompiled here.
    """
    seconds: Counter[str] = Counter()
    if machine.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            lap(state, windows, cfg, machine, range(3))
        seconds = kernel_seconds(profiled, DeviceType.CUDA)
    else:  # the profiler's own allocations cause page faults, which make large results look 5x slower
        with OperationClock() as clock:
            lap(state, windows, cfg, machine, range(3))
        seconds = clock.seconds
    spent: Counter[str] = Counter()
    for operation, s in seconds.items():
        spent[kind_of(operation)] += s
    return {kind: s / spent.total() for kind, s in spent.items()}


def measure(cfg: SpeedConfig, machine: Machine, folder: Path) -> dict[str, Any]:
    """Build what train.py would build from the corpus in `folder`, and time its steps."""
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
    for start in progress(starts, "laps"):  # in turns: when the machine slows down, all do
        laps.append(lap(state, windows, cfg, machine, range(start, start + cfg.steps)))
        peak_mem_mb = max(peak_mem_mb, machine.peak_mem_mb())  # before matmul_flops, which is not part of training
        scales.append(state.scaler.get_scale())
        peaks.append(machine.matmul_flops(linear))
        for peer, runs in zip(peers, peer_runs, strict=True):
            times, mem_mb = peer.run(cfg, machine, folder, peer_vocab_size, cfg.warmup_steps + cfg.steps)
            runs.append((statistics.median(times[cfg.warmup_steps :]), mem_mb))

    # --- the figures
    tokens = cfg.gradient_accumulation_steps * cfg.batch_size * cfg.block_size
    dt_ms = [ms for ms, _ in laps]
    flop_rates = [1000 * tokens * model.flops_per_token(cfg.sampled_softmax) / ms for ms in dt_ms]
    peak = max(*peaks, *flop_rates)  # the best seen: on a busy machine a product may run slower than a step
    result = origin("train_speed", machine) | {
        "config": config_name(),
        "parameters": model.num_params(),
        "tokens_per_step": tokens,
        "compiled": state.forward is not model,
        "compile_mode": cfg.compile_mode,
        "recorded": state.recorded_update is not None,
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
    """Time the steps that train.py would take, print a table and write the result."""
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
    """The Markdown table of these results; nanoGPT is tuned by torch.compile, and by autocast in bfloat16."""
    blocks = []
    for r in results:
        ours = ["compiled"] * r["compiled"] + ["recorded"] * bool(r.get("recorded"))
        ours += ["reduce-overhead"] * (r.get("compile_mode") == "reduce-overhead")
        peers = sorted(r["peers"].items(), key=lambda item: item[0] != "nanoGPT")  # tuned last
        sides = [r, *(p for _, p in peers)]
        mfu = [r["mfu"]["median"] * r["dt_ms"]["median"] / side["dt_ms"]["median"] for side in sides]
        rows = [
            ["run as", ", ".join(ours) or "eager", *(described(name, p) for name, p in peers)],
            ["tokens/s", *(f"{side['tok_per_sec']['median']:,.0f}" for side in sides)],
            ["ms a step", *(f"{side['dt_ms']['median']:,.1f}" for side in sides)],
            ["MFU", *(f"{share:.1%}" for share in mfu)],
            ["peak memory, MB", *(f"{side['peak_mem_mb']:,.0f}" for side in sides)],
            ["ours is faster", "", *(show(p["ratio"], ".2f") for _, p in peers)],
            ["s to first step", f"{r['start_s']:.1f}" if r.get("start_s") else ""],
        ]
        blocks.append((f"{r['config']}\n{r['optimizer']}, {r['machine']['dtype']}", rows))
    return side_by_side(["RoboPoet", "nanoGPT", "nanoGPT, tuned"], blocks)


def described(name: str, peer: dict[str, Any]) -> str:
    """How a peer is run: its vocabulary is named where it differs from ours."""
    how = name.partition(", ")[2] or "as it is"
    return how + (f", {PADDED_VOCAB:,} ids" if peer.get("vocab_size") == PADDED_VOCAB else "")


if __name__ == "__main__":
    configurator.launch(main, SpeedConfig)
