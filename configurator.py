"""Configuration and the machine: dataclass <- YAML files <- --key=value, all checked; then device, dtype, rank.

A script owns one frozen dataclass; the comment behind each key is its help text, so there is one list of keys and
no other. A value is text wherever it comes from (YAML is read with no type guessing, so `6e-4` and `off` mean what
they say) and is converted by the key's type alone.
"""

import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import inspect
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch.utils._triton import has_triton

from untrusted import read_yaml, shorten

VERSION = "0.1.0"
HOME = Path(__file__).parent  # of the scripts, config/ and data/
SHOWN_PROBLEMS = 20  # of one message


class ConfigError(ValueError):
    """What the user asked for can't be done; the message says which key or file, what was found and what to do."""


class RankError(RuntimeError):
    """Another of torchrun's ranks is gone or hangs."""


# ---------------------------------------------------------------------------------------------------------------------
# dataclass <- YAML <- command line


def load(cls: type, argv: list[str], positional: str | None = None) -> Any:
    """Build `cls` from its defaults, then the YAML files in `argv` in order, then its `--key=value` and `--key value`.

    positional: the key that takes a bare argument which is not a YAML file, or several if it is repeatable. Raises
    ConfigError with every problem found, one a line; `--help` prints the keys, `--version` the versions, and exits.
    The keys that were given, here or in YAML, are the result's `given`, if its class has that.
    """
    types = get_type_hints(cls)
    hints = {field.name: types[field.name] for field in dataclasses.fields(cls)}
    if "-h" in argv or "--help" in argv:
        print(usage(cls, positional))
        raise SystemExit(0)
    if "--version" in argv:
        print(f"RoboPoet {VERSION}, torch {torch.__version__}, Python {platform.python_version()}")
        raise SystemExit(0)
    found: dict[str, tuple[Any, str]] = {}  # key -> (text or list of texts, where it stands)
    flags: dict[str, Any] = {}
    problems: list[str] = []
    args = list(argv)
    while args:
        arg = args.pop(0)
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals:  # --key value, or a bare --flag for a bool
                kind = hints.get(key, bool)  # an unknown key is told as such below
                is_flag = kind is bool or "true" in get_args(kind)
                takes_next = args and not args[0].startswith("--") and (not is_flag or args[0].lower() in BOOLS)
                value = args.pop(0) if takes_next else "true" if is_flag else None
            if value is None:
                following = args[0][2:].partition("=")[0] if args and hints.get(key) in (str, tuple[str, ...]) else None
                if following is None or difflib.get_close_matches(following, hints, n=1):
                    problems.append(f"--{key}: has no value; write --{key}=VALUE")
                else:  # no key: the value itself begins with --
                    meant = args.pop(0)
                    problems.append(f"--{key}: has no value; if that is {meant}, write --{key}={meant}")
            elif get_origin(hints.get(key)) is tuple:
                flags.setdefault(key, []).append(value)
            else:
                flags[key] = value
        elif arg.endswith((".yaml", ".yml")):
            found |= {key: (value, f"{arg}: {key}") for key, value in _read_yaml(arg, problems).items()}
        elif get_origin(hints.get(positional)) is tuple and not arg.startswith("-"):
            flags.setdefault(positional, []).append(arg)
        elif positional and positional not in flags and (arg == "-" or not arg.startswith("-")):
            flags[positional] = arg
        else:
            problems.append(f"{arg}: is one argument too many; write --key=value, or name a .yaml file")
    found |= {key: (value, f"--{key}") for key, value in flags.items()}

    values = {}
    for key, (value, where) in found.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1) if len(problems) < SHOWN_PROBLEMS else []
            problems.append(f"{where}: no such key" + (f"; did you mean {near[0]}?" if near else "; --help lists all"))
            continue
        try:
            values[key] = _convert(hints[key], value)
        except ValueError as e:
            problems.append(f"{where}: {e}")
    cfg = cls(**values)
    problems += cfg.problems()
    if problems:
        more = [f"and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise ConfigError("\n  ".join([*map(shorten, problems[:SHOWN_PROBLEMS]), *more]))
    if hasattr(cls, "given"):
        object.__setattr__(cfg, "given", frozenset(values))
    return cfg


def beside_scripts(path: str | Path) -> Path:
    """`path`, or the same path beside the scripts where the working folder has none."""
    return HOME / path if not os.path.exists(path) and os.path.exists(HOME / path) else Path(path)


BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def _convert(kind: Any, value: Any) -> Any:
    """Turn text into `kind` (bool, int, float, str, Literal, tuple[str, ...]); raises ValueError with what it wants."""
    if get_origin(kind) is tuple:
        values = tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(item, str) for item in values):
            raise ValueError(f"found {value!r}, wants a list of texts")
        return values
    if not isinstance(value, str):
        raise ValueError(f"found a {'list' if isinstance(value, list) else 'mapping'}, wants one value")
    if get_origin(kind) is Literal:
        if value.lower() not in get_args(kind):
            raise ValueError(f"found {value!r}, must be one of {', '.join(get_args(kind))}")
        return value.lower()
    if kind is bool:
        if value.lower() not in BOOLS:
            raise ValueError(f"found {value!r}, must be true or false")
        return BOOLS[value.lower()]
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            if kind is int and re.fullmatch(r"[+-]?\d+", value):
                return int(value)
            number = float(value)
            if math.isfinite(number) and (kind is float or number.is_integer()):
                return kind(number)
        raise ValueError(f"found {value!r}, must be {'a whole number' if kind is int else 'a number'}")
    return value


def change(cfg: Any, key: str, text: str) -> Any:
    """A copy of `cfg` in which `key` has the value that `text` stands for; raises ConfigError when it can't have it."""
    try:
        changed = dataclasses.replace(cfg, **{key: _convert(get_type_hints(type(cfg))[key], text)})
    except ValueError as e:
        raise ConfigError(f"{key}: {e}") from None
    if problems := changed.problems():
        raise ConfigError("\n".join(problems))
    return changed


def _read_yaml(path: str, problems: list[str]) -> dict[str, Any]:
    """Read a YAML mapping with every scalar left as text; appends to `problems`."""
    try:
        content = read_yaml(beside_scripts(path), ConfigError)
        if content and not isinstance(content, dict):
            raise ConfigError(f"{path}: must hold `key: value` lines")
    except ConfigError as e:
        problems.append(str(e))
        return {}
    return content or {}


def bounds(cfg: Any, keys: str, low: float, high: float = math.inf) -> list[str]:
    """Name each of the space-separated `keys` whose value does not lie within [low, high]."""
    wanted = f"at least {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    values = {key: getattr(cfg, key) for key in keys.split()}
    return [f"{key}: found {value}, must be {wanted}" for key, value in values.items() if not low <= value <= high]


def usage(cls: type, positional: str | None = None) -> str:
    """One line for each key of `cls`: name, default, and the comment that stands behind it in the source."""
    folder, script = os.path.split(inspect.getsourcefile(cls))
    if os.path.basename(folder) == "bench":
        script = f"-m bench.{script.removesuffix('.py')}"
    lines = [f"python {script} [CONFIG.yaml ...]{f' [{positional.upper()}]' if positional else ''} [--key=value ...]"]
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for owner in reversed(cls.__mro__[:-1]):  # a config may extend another: its own keys come last
        for line in inspect.getsource(owner).splitlines():
            if heading := re.fullmatch(r"    # (.*)", line):
                lines.append(f"\n{heading[1]}")
            elif key := re.match(r"    (\w+): .*?  # (.*)$", line):
                default = defaults[key[1]]
                shown = " ".join(default) if isinstance(default, tuple) else str(default)
                choices = f" [{' '.join(get_args(hints[key[1]]))}]" if get_origin(hints[key[1]]) is Literal else ""
                lines.append(f"  --{key[1]:<28} {shown:<14} {key[2]}{choices}")
    return "\n".join(lines)


def launch(main: Callable[[Any], None], cls: type, *mistakes: type[Exception], positional: str | None = None) -> None:
    """Run `main(cfg)` on the command line's config; ConfigError, OSError and `mistakes` end in one line and exit 2."""
    script = os.path.basename(sys.argv[0])
    try:
        main(load(cls, sys.argv[1:], positional))
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        pass
    except (ConfigError, OSError, *mistakes) as e:
        print(f"{script}: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except torch.OutOfMemoryError:
        print(
            f"{script}: the GPU has too little memory; halve batch_size and double gradient_accumulation_steps (the "
            "numbers stay the same), or write fewer passages at a time",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # no one reads it any more: Python's own flush, at the end, would fail too
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# the machine


@dataclass(frozen=True)
class Machine:
    """Where this process computes: device, the dtype of its matrix products, its rank among torchrun's ranks."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    launched: bool = False  # by torchrun
    votes: dist.ProcessGroup | None = None  # where ranks agree on the CPU (None: the group that they all are)

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints, logs and writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        """A context in which matrix products run in `dtype`; parameters stay float32."""
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if enabled else contextlib.nullcontext()

    def seed(self, seed: int) -> None:
        """Seed what a step draws from; torch.manual_seed also formats stack traces for devices that are not there."""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(seed)

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it, so that a clock read next is honest."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    @contextlib.contextmanager
    def expecting_others(self, timeout_s: float) -> Iterator[None]:
        """A context in which ranks work together; raises RankError when another is gone or has not answered."""
        try:
            yield
        except RuntimeError as e:
            if self.world_size > 1 and (isinstance(e, dist.DistError) or "gloo" in str(e)):
                raise RankError(
                    f"rank {self.rank}: another rank is gone or has not answered for {timeout_s:g} s "
                    f"({str(e).splitlines()[0][:120]}); --init_from=auto goes on from what was saved"
                ) from None
            raise

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over all ranks, where `tensor` is."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def peak_mem_mb(self) -> float:
        """Most memory this process has held, in MB: reserved on a CUDA device, resident elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) / 2**20
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on macOS
        return peak / (2**20 if sys.platform == "darwin" else 2**10)

    def matmul_flops(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        """The best FLOP/s seen of `product` on square matrices of `dtype`, ever larger ones: what MFU is a share of."""
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
        if self.device.type == "cuda":  # these matrices are no part of training's memory
            del a, b
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        return best


class Signals:
    """While entered, SIGTERM and SIGINT ask the run to save and end, SIGUSR1 to save; SIGHUP changes nothing.

    They are heard at the end of a step, and all ranks agree which. A second SIGINT ends the process at once; so does an
    alarm, `timeout_s` after it was told to end: a step that has not ended by then is stuck.
    """

    def __init__(self, machine: Machine, timeout_s: float):
        self.machine, self.timeout_s, self.end, self.save = machine, timeout_s, False, False

    def __enter__(self) -> "Signals":
        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), self._hear)
        handlers[signal.SIGHUP] = signal.SIG_IGN
        self.before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *raised: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.end:
            raise KeyboardInterrupt
        if number == signal.SIGUSR1:
            self.save = True
        else:
            self.end = True
            signal.setitimer(signal.ITIMER_REAL, self.timeout_s)

    def agreed(self) -> tuple[bool, bool]:
        """Whether any rank was asked to end, and whether to save; every rank calls this after every step."""
        heard, self.save = (self.end, self.save), False
        if self.machine.world_size == 1:
            return heard
        votes = torch.tensor(heard, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, self.machine.votes)  # on the CPU: the device need not stop for it
        return bool(votes[0]), bool(votes[1])


def find_machine(device: str, dtype: str, backend: str = "auto", timeout_s: float = 600.0) -> Machine:
    """Choose device and dtype where they are `auto`, and join torchrun's process group when its environment is set.

    timeout_s: how long a rank waits for the others. Raises ConfigError when the device or dtype is not to be had here.
    """
    launched = any(name in os.environ for name in TORCHRUN)
    try:
        rank, local_rank, world_size = (int(os.environ[name]) for name in TORCHRUN) if launched else (0, 0, 1)
    except (KeyError, ValueError):
        raise ConfigError(
            f"environment: sets some of {', '.join(TORCHRUN)}, but not all to numbers, as torchrun does"
        ) from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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
        torch.cuda.set_device(chosen)
    elif chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: found mps, but this machine has none; use --device=auto")
    if dtype == "auto":
        dtype = _fastest_dtype(chosen)
    if chosen.type == "cpu":
        _keep_freed_memory()
    votes = None
    if launched and not dist.is_initialized():
        if chosen.type == "cuda" and backend != "gloo":
            backend = "cpu:gloo,cuda:nccl"
        elif backend == "auto":
            backend = "gloo"
        votes = _join(backend, rank, world_size, timeout_s, chosen if chosen.type == "cuda" else None)
    return Machine(chosen, getattr(torch, dtype), rank, world_size, launched, votes)


TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


def _join(
    backend: str, rank: int, world_size: int, timeout_s: float, device_id: torch.device | None
) -> dist.ProcessGroup | None:
    """Join the process group, at a place of the store that no earlier start has written to; returns Machine.votes.

    torchrun keeps its store when it restarts the ranks, and in it the addresses of those that are dead. On a GPU the
    votes have a group of their own, with half the timeout: NCCL's watchdog ends the process without a word, and so must
    not be the first to notice that a rank hangs.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    told = os.environ.get
    if told("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"start_{told('TORCHELASTIC_RESTART_COUNT')}", store)
    elif rank == 0 and told("TORCHELASTIC_USE_AGENT_STORE") == "True" and told("TORCHELASTIC_MAX_RESTARTS") != "0":
        # several agents need not have restarted equally often
        warn("environment: a machine that falls out can't come back; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    longest = timeout if device_id is None else 2 * timeout
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=longest, device_id=device_id
    )
    return None if device_id is None else dist.new_group(backend="gloo", timeout=timeout)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor: the kernel would zero it anew at every step."""
    with contextlib.suppress(OSError, AttributeError):  # another C library: as it comes
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays


def _fastest_dtype(device: torch.device) -> str:
    """The fastest dtype that trains well: bfloat16 where the hardware multiplies it, float16 on older CUDA."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return "bfloat16" if any(found.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"
    return "float32"


def warn(message: str) -> None:
    """Say on stderr what went otherwise than asked, if anyone still reads it."""
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


def why_no_compile(device: torch.device) -> str | None:
    """What torch.compile lacks for `device` on this machine (a compiler, Python's headers), or None if it can work."""
    if not any(shutil.which(cxx) for cxx in (os.environ.get("CXX", "g++"), "clang++")):
        return "no C++ compiler"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return "no Python headers"
    if device.type == "cuda" and not has_triton():
        return "no Triton, or a GPU that it does not know (it needs compute capability 7.0)"
    return None
