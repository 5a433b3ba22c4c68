"""The machine: device, dtype, rank among torchrun's ranks, and the signals that a run handles."""

import contextlib
import ctypes
import datetime
import functools
import itertools
import math
import os
import re
import shutil
import signal
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._triton import has_triton

from robopoet import portable
from robopoet.errors import ConfigError, RankError, warn
from robopoet.ops import linear

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def step_seed(*place: int) -> int:
    """A seed for each (seed, step, rank), so that no random state needs saving."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class Machine:
    """Where this process computes: its device, the dtype of its matrix products, its rank among torchrun's ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    launched: bool = False  # by torchrun
    votes: dist.ProcessGroup | None = None  # the group, on the CPU, in which ranks agree on signals (None: the default)

    def __str__(self) -> str:
        is_rounded = (self.device.type, torch.get_float32_matmul_precision()) == ("cuda", "high")
        dtype = "float32 as TF32" if is_rounded and self.dtype is torch.float32 else str(self.dtype)[6:]
        return f"{self.device}, {dtype}, ranks: {self.world_size}"

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """A context in which matrix products run in `dtype`; parameters stay float32."""
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if enabled else contextlib.nullcontext()

    def seed(self, seed: int) -> None:
        """Seed what a step draws from; torch.manual_seed would also format a stack trace for each absent device."""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(seed)

    def synchronize(self) -> None:
        """Wait for the device to finish, so that a clock read next is honest."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    @contextlib.contextmanager
    def expecting_others(self, timeout_s: float) -> Iterator[None]:
        """A context that raises RankError when another rank is gone or does not answer."""
        try:
            yield
        except RuntimeError as e:
            if self.world_size > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
                raise RankError(
                    f"rank {self.rank}: another rank is gone or has not answered for {timeout_s:g} s "
                    f"({str(e).splitlines()[0][:120]}); --init_from=auto resumes from what was saved"
                ) from None
            raise

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks, on the device of `tensor`."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the process group, all ranks together: one that left early could abort the others."""
        if self.world_size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def peak_mem_mb(self) -> float:
        """Peak memory of this process, MB: reserved on a CUDA device, resident elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) / 2**20
        return portable.peak_resident_mb()

    def matmul_flops(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        """The best FLOP/s of `product` on square matrices of `dtype`, of growing size; this counts as 100% MFU."""
        best = 0.0
        for n in (1024, 2048, 4096, 8192):
            a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
            best_s = math.inf
            for _ in range(5):
                self.synchronize()
                start = time.perf_counter()
                product(a, b)
                self.synchronize()
                best_s = min(best_s, time.perf_counter() - start)
            best = max(best, 2 * n**3 / best_s)
            if best_s > 5e-3:
                break
        if self.device.type == "cuda":  # keep these matrices out of training's peak memory
            del a, b
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return best


class Requests(NamedTuple):
    """What signals have asked of a run."""

    end: bool = False
    save: bool = False


class Signals:
    """While entered, SIGTERM and SIGINT ask the run to save and end, SIGUSR1 to save; SIGHUP changes nothing.

    They take effect at the end of a step, and all ranks agree on them. A second SIGINT ends the process at once; so
    does an alarm `timeout_s` after the first SIGTERM or SIGINT, because a step that takes longer is stuck. On CUDA a
    second SIGINT lets a checkpoint that is being written become whole.
    """

    def __init__(self, machine: Machine, timeout_s: float):
        self.machine, self.timeout_s, self.end, self.save = machine, timeout_s, False, False

    def __enter__(self) -> "Signals":
        ours = dict.fromkeys((signal.SIGTERM, signal.SIGINT, portable.SIGUSR1), self._handle)
        handlers = {**ours, portable.SIGHUP: signal.SIG_IGN}
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items() if number}
        return self

    def __exit__(self, *raised: Any) -> None:
        portable.set_alarm(0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.end:
            raise KeyboardInterrupt
        if number == portable.SIGUSR1:
            self.save = True
        else:
            if not self.end:
                portable.set_alarm(self.timeout_s)
            self.end = True

    def agreed(self, must_end: bool = False) -> Requests:
        """What any rank was asked to do, or must; every rank calls this after every step."""
        heard, self.save = Requests(self.end or must_end, self.save), False
        if self.machine.world_size == 1:
            return heard
        votes = torch.tensor(heard, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, self.machine.votes)  # on the CPU, so that the device need not wait
        return Requests(bool(votes[0]), bool(votes[1]))


def find_machine(
    device: str, dtype: str, backend: str = "auto", timeout_s: float = 600.0, trains: bool = True
) -> Machine:
    """Resolve a device and dtype of `auto`, and join torchrun's process group if its environment is set.

    timeout_s: how long a rank waits for the others. trains: false for writing, whose products have few rows. Raises
    ConfigError if the device or dtype is not available.
    """
    launched = any(name in os.environ for name in TORCHRUN)
    try:
        rank, local_rank, world_size = (int(os.environ[name]) for name in TORCHRUN) if launched else (0, 0, 1)
    except (KeyError, ValueError):
        raise ConfigError(
            f"environment: sets some of {', '.join(TORCHRUN)}, but not all to numbers, as torchrun does"
        ) from None
    if device == "auto":
        has_mps = torch.backends.mps.is_available() and world_size == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
        if device == "cuda" and not launched and (reason := why_no_kernels(torch.device("cuda", 0))):
            warn(f"device: {reason}; taking the CPU")
            device = "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
    except RuntimeError:
        raise ConfigError(f"device: found {device!r}, must be auto, cpu, cuda, cuda:N or mps") from None
    if chosen.type == "cuda":
        index = local_rank if chosen.index is None else chosen.index
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"device: found {device}, but this machine has {torch.cuda.device_count()} CUDA devices for its "
                f"process {local_rank}; use --device=cpu, or config/demo.yaml which trains on any machine"
            )
        chosen = torch.device("cuda", index)
        if reason := why_no_kernels(chosen):
            raise ConfigError(f"device: {reason}, or use --device=cpu")
        torch.cuda.set_device(chosen)
        if trains and torch.cuda.get_device_capability(chosen) >= (8, 0):
            torch.set_float32_matmul_precision("high")  # TF32: products of 10 bits, summed in float32
    elif chosen.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device: found mps, but this machine has none; use --device=auto")
        if world_size > 1:
            raise ConfigError(f"device: found mps, but {world_size} processes can't share it; use --device=cpu, or one")
        if dtype == "float64":
            raise ConfigError("dtype: found float64, which mps lacks; use --dtype=float32 or --device=cpu")
    if dtype == "auto":
        dtype = _fastest_dtype(chosen, trains)
    if chosen.type == "cpu":
        _keep_freed_memory()
    votes = None
    if launched and not dist.is_initialized():
        if chosen.type == "cuda" and backend != "gloo":
            backend = "cpu:gloo,cuda:nccl"
        elif backend == "auto":
            backend = "gloo"
        votes = _join(backend, rank, world_size, timeout_s, chosen if chosen.type == "cuda" else None)
        if chosen.type == "cpu":  # ranks may have measured different dtypes
            dist.broadcast_object_list(agreed := [dtype])
            dtype = agreed[0]
    return Machine(chosen, getattr(torch, dtype), rank, world_size, launched, votes)


def _join(
    backend: str, rank: int, world_size: int, timeout_s: float, device_id: torch.device | None
) -> dist.ProcessGroup | None:
    """Join the process group under a fresh prefix of the store; returns Machine.votes.

    When torchrun restarts ranks it keeps its store, which still holds the addresses of dead ones. On a GPU the votes
    have a group of their own with half the timeout: NCCL's watchdog ends the process without a message, so it must not
    be the first to notice that a rank hangs.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    env = os.environ.get
    if env("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start_{env('TORCHELASTIC_RESTART_COUNT')}", store)
    elif rank == 0 and env("TORCHELASTIC_USE_AGENT_STORE") == "True" and env("TORCHELASTIC_MAX_RESTARTS") != "0":
        # no prefix here: agents of several machines may have restarted different numbers of times
        warn("environment: a machine that fails can't rejoin; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    longest = timeout if device_id is None else 2 * timeout
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=longest, device_id=device_id
    )
    if device_id is None:
        return None
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))  # every rank is in it


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: otherwise the kernel maps and zeroes large tensors at every step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library: leave it as it is
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays


def _fastest_dtype(device: torch.device, trains: bool) -> str:
    """The fastest dtype that trains well: bfloat16 where the hardware multiplies it, float16 on older CUDA.

    Below compute capability 7.0 only the P100 (6.0) is faster in float16; the other GPUs do one such product in 64.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return "bfloat16"
        return "float16" if capability >= (7, 0) or capability == (6, 0) else "float32"
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        if any(found.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16")):
            return _faster_on_cpu() if trains else "bfloat16"  # few rows wait for the weights: half the bytes is faster
    return "float32"


def _faster_on_cpu() -> str:
    """Measured, as some CPUs with bfloat16 multiply it at half of float32's speed: Intel's with AVX-512 but no AMX.

    On one thread, whose own time counts: so other programs don't change the outcome, and a run can be repeated.
    """
    x, threads = torch.ones(512, 512), torch.get_num_threads()
    laps: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    torch.set_num_threads(1)
    for _, dtype in itertools.product(range(10), laps):
        a = x.to(getattr(torch, dtype))
        start = time.thread_time()
        linear(a, a)
        laps[dtype].append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return min(laps, key=lambda dtype: min(laps[dtype]))


def why_no_kernels(device: torch.device) -> str | None:
    """What to install if this PyTorch has no kernels for a CUDA device, as cards outlive their wheels; or None.

    A binary, sm_XY, runs on cards of its major version and at least its minor one (sm_XYa on X.Y alone); compute_XY is
    compiled on any later card.
    """
    with warnings.catch_warnings(action="ignore"):  # torch's own, many lines of them
        card = torch.cuda.get_device_properties(device)
    capability, builds = (card.major, card.minor), torch.cuda.get_arch_list()
    for kind, major, minor, suffix in re.findall(r"(sm|compute)_(\d+)(\d)(a?)", " ".join(builds)):
        build = int(major), int(minor)
        suits = build == capability if suffix else build <= capability
        if suits and (kind == "compute" or build[0] == capability[0]):
            return None
    if not any(build.startswith("sm_") for build in builds):  # AMD's
        return None
    wheel = "cu126" if capability < (7, 5) else "cu130"
    return (
        f"{card.name} has compute capability {card.major}.{card.minor}, for which this PyTorch has no kernels "
        f"({' '.join(builds)}); install one from the index {wheel} (see pytorch.org/get-started/locally)"
    )


def compiled(model: torch.nn.Module, how: str, device: torch.device) -> torch.nn.Module:
    """`model` compiled, if `how` is "true", or "auto" on CUDA; as it is, with a warning, where that can't be."""
    if how == "false" or (how == "auto" and device.type != "cuda"):
        return model
    if reason := why_no_compile(device):
        warn(f"compile: {reason} on this machine; training uncompiled")
        return model
    return cast(torch.nn.Module, torch.compile(model))


def why_no_compile(device: torch.device) -> str | None:
    """What torch.compile lacks for `device` on this machine (a compiler, Python's headers), or None if it can work."""
    if not any(shutil.which(cxx) for cxx in (os.environ.get("CXX", "g++"), "clang++")):
        return "no C++ compiler"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "no Python headers"
    if device.type == "cuda" and not has_triton():
        return "no Triton, or a GPU that it does not know (it needs compute capability 7.0)"
    return None


@functools.cache
def capture_stream() -> torch.cuda.Stream:
    """The one stream on which CUDA graphs are recorded: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream()


class Graphed:
    """A function on a CUDA device whose fourth call is recorded as a CUDA graph, and replayed from then on.

    The host launches a small model's kernels more slowly than the GPU runs them, but a graph in one go.

    The first three calls create what lasts: optimizer states, compiled kernels. Arguments are copied to the same place
    each time, also before recording: a compiled function recompiles where strides differ, which no recording survives.
    A result is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.calls = function, 0
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, *arguments: torch.Tensor) -> Any:
        """The function's results for these arguments, whose shapes never change."""
        self.calls += 1
        if self.calls == 1:
            self.arguments = [torch.empty_like(a, memory_format=torch.contiguous_format) for a in arguments]
        for place, argument in zip(self.arguments, arguments, strict=True):
            place.copy_(argument)
        if self.calls <= 3:  # on the stream that recording will use
            capture_stream().wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(capture_stream()):
                results = self.function(*self.arguments)
            torch.cuda.current_stream().wait_stream(capture_stream())
            return results
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=capture_stream()):
                self.results = self.function(*self.arguments)
        self.graph.replay()
        return self.results
