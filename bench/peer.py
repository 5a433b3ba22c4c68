"""nanoGPT for comparison: its own train.py on the same bins, timed by the lines that it prints."""

import importlib.util
import os
import pickle
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from model import GPTConfig
from robopoet.errors import ConfigError
from robopoet.machine import Machine
from train import TrainConfig

SCRIPTS = ("train.py", "model.py", "configurator.py")
SHARED_KEYS = (
    "batch_size block_size gradient_accumulation_steps n_layer n_head n_embd dropout bias "
    "learning_rate weight_decay beta1 beta2 grad_clip warmup_iters min_lr"
).split()
# nanoGPT has no autocast on CPU; tuning it by hand adds it.
CPU_WITHOUT_AUTOCAST = "ctx = nullcontext() if device_type == 'cpu' else "


@dataclass(frozen=True)
class Peer:
    """A checkout of nanoGPT, run as it is or tuned by hand (autocast on CPU, torch.compile)."""

    name: str
    folder: Path
    tuned: bool

    def run(
        self, cfg: TrainConfig, machine: Machine, data: Path, vocab_size: int, steps: int
    ) -> tuple[list[float], float]:
        """Train `steps` steps in a process of its own; returns each step's milliseconds and the peak memory in MB."""
        keys = {key: getattr(cfg, key) for key in SHARED_KEYS}
        keys |= {"max_iters": steps, "lr_decay_iters": max(steps, 100)}
        keys |= {"eval_interval": 10**9, "eval_iters": 1, "log_interval": 1, "always_save_checkpoint": False}
        keys |= {"device": machine.device.type, "dtype": str(machine.dtype)[6:]}
        keys |= {"compile": self.tuned or machine.device.type != "cpu"}
        args = [f"--{key}={float(value) if isinstance(value, float) else value}" for key, value in keys.items()]
        autocast = self.tuned and machine.dtype is not torch.float32
        with tempfile.TemporaryDirectory() as home:
            launch = Launch(self.folder, args, data, vocab_size, autocast=autocast)
            printed, peak_mem_mb = launch.run(Path(home))
        times = iteration_ms(printed)
        if len(times) < steps:
            raise ConfigError(f"peer: {self.folder}/train.py printed {len(times)} of {steps} steps:\n{printed[-1500:]}")
        return times[:steps], peak_mem_mb


# Runs train.py with three changes: its seed is shifted, each checkpoint gets a name of its own, and on a GPU the peak
# memory is printed at the end.
DRIVER = """
import runpy, sys, torch
shift, seed, save = int(sys.argv.pop(1)), torch.manual_seed, torch.save
torch.manual_seed = lambda given: seed(given + shift)
torch.save = lambda content, path: save(content, f"{path}.{content['iter_num']}")
runpy.run_path("train.py", run_name="__main__")
if torch.cuda.is_initialized():
    print(f"peak_mem_mb {torch.cuda.max_memory_reserved() / 2**20}")
"""
GPT2_VOCAB, PADDED_VOCAB = 50_257, 50_304  # the second is nanoGPT's default: GPT-2's, rounded up for speed


def peer_vocab(vocab_size: int) -> int:
    """The vocabulary size that nanoGPT gets: ours, but its own default in place of GPT-2's."""
    return PADDED_VOCAB if vocab_size == GPT2_VOCAB else vocab_size


@dataclass(frozen=True)
class Launch:
    """A run of nanoGPT's train.py with `args` on the bins in `data`.

    seed: added to its own seed. autocast: add what it lacks on CPU.
    """

    folder: Path
    args: list[str]
    data: Path
    vocab_size: int
    seed: int = 0
    autocast: bool = False

    def run(self, home: Path) -> tuple[str, float]:
        """Run it in `home`, an empty folder, where it leaves out/ckpt.pt.ITERATION.

        Returns what it printed and its peak memory in MB: reserved on a GPU, resident elsewhere, as
        Machine.peak_mem_mb counts it. Raises ConfigError when it fails.
        """
        for script in SCRIPTS:
            text = (self.folder / script).read_text(encoding="utf-8")
            text = text.replace(CPU_WITHOUT_AUTOCAST, "ctx = ") if self.autocast else text
            (home / script).write_text(text, encoding="utf-8")
        (home / "config").symlink_to((self.folder / "config").resolve())
        bins = home / "data" / "bench"
        bins.mkdir(parents=True)
        for name in ("train.bin", "val.bin"):
            (bins / name).symlink_to((self.data / name).resolve())
        (bins / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": self.vocab_size}))
        command = [sys.executable, "-c", DRIVER, str(self.seed), *self.args, "--dataset=bench", "--out_dir=out"]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        process = subprocess.Popen(
            command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        printed, peak_mem_mb = "", 0.0
        for line in process.stdout or ():
            printed += line
            peak_mem_mb = max(peak_mem_mb, resident_mb(process.pid, "VmHWM"))
        if process.wait():
            raise ConfigError(f"peer: {self.folder}/train.py failed:\n{printed[-1500:]}")
        on_gpu = re.search(r"^peak_mem_mb ([\d.]+)$", printed, re.M)
        return printed, float(on_gpu[1]) if on_gpu else peak_mem_mb


def iteration_ms(printed: str) -> list[float]:
    """The milliseconds of each iteration, from the lines that train.py printed."""
    return [float(ms) for ms in re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", printed, re.M)]


def resident_mb(pid: int | str, line: str) -> float:
    """A running process's resident memory in MB: VmRSS is the current one, VmHWM the peak. 0 where /proc lacks it.

    getrusage would also count what the process inherited.
    """
    status = Path(f"/proc/{pid}/status")
    found = re.search(rf"^{line}:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    return int(found[1]) / 1024 if found else 0.0


def check_is_gpt2(config: GPTConfig) -> None:
    """Raise ConfigError unless nanoGPT has such a model."""
    kind = {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "kv_heads": config.n_head}
    if other := [f"{key} {getattr(config, key)}" for key, plain in kind.items() if getattr(config, key) != plain]:
        raise ConfigError(f"peer: nanoGPT has no model with {', '.join(other)}; leave the key out")


def load_model_module(folder: Path) -> ModuleType:
    """Import nanoGPT's model.py under a name that differs from ours."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "train.py").is_file():
        raise ConfigError(f"peer: {folder} is not a checkout of nanoGPT: it has no model.py and train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
