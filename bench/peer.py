"""nanoGPT beside us: its own train.py on the same bins, timed by the lines it prints."""

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

from configurator import ConfigError, Machine
from train import TrainConfig

SCRIPTS = ("train.py", "model.py", "configurator.py")
SHARED_KEYS = (
    "batch_size block_size gradient_accumulation_steps n_layer n_head n_embd dropout bias "
    "learning_rate weight_decay beta1 beta2 grad_clip warmup_iters min_lr"
).split()
# nanoGPT leaves autocast out on CPU; whoever tunes it by hand puts it in.
CPU_WITHOUT_AUTOCAST = "ctx = nullcontext() if device_type == 'cpu' else "


@dataclass(frozen=True)
class Peer:
    """A checkout of nanoGPT and the way it is run: as it is, or tuned by hand (autocast on CPU, torch.compile)."""

    name: str
    folder: Path
    tuned: bool

    def run(
        self, cfg: TrainConfig, machine: Machine, data: Path, vocab_size: int, steps: int
    ) -> tuple[list[float], float]:
        """Train `steps` steps in a process of its own; returns each step's milliseconds and the peak memory in MB."""
        with tempfile.TemporaryDirectory() as scratch:
            home = Path(scratch)
            for script in SCRIPTS:
                text = (self.folder / script).read_text(encoding="utf-8")
                if self.tuned and machine.dtype is not torch.float32:
                    text = text.replace(CPU_WITHOUT_AUTOCAST, "ctx = ")
                (home / script).write_text(text, encoding="utf-8")
            bins = home / "data" / "bench"
            bins.mkdir(parents=True)
            for name in ("train.bin", "val.bin"):
                (bins / name).symlink_to((data / name).resolve())
            (bins / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
            keys = {key: getattr(cfg, key) for key in SHARED_KEYS}
            keys |= {"dataset": "bench", "out_dir": "out", "max_iters": steps, "lr_decay_iters": max(steps, 100)}
            keys |= {"eval_interval": 10**9, "eval_iters": 1, "log_interval": 1, "always_save_checkpoint": False}
            keys |= {"device": machine.device.type, "dtype": str(machine.dtype)[6:]}
            keys |= {"compile": self.tuned or machine.device.type != "cpu"}
            keys = {key: float(value) if isinstance(value, float) else value for key, value in keys.items()}
            command = [sys.executable, "train.py", *(f"--{key}={value}" for key, value in keys.items())]
            environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
            process = subprocess.Popen(
                command, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            printed, peak_mem_mb = "", 0.0
            for line in process.stdout or ():
                printed += line
                peak_mem_mb = max(peak_mem_mb, resident_peak_mb(process.pid))
            status = process.wait()
        times = [float(ms) for ms in re.findall(r"^iter \d+: loss [\d.]+, time ([\d.]+)ms", printed, re.M)]
        if status or len(times) < steps:
            raise ConfigError(f"peer: {self.folder}/train.py failed:\n{printed[-1500:]}")
        return times[:steps], peak_mem_mb


def resident_peak_mb(pid: int) -> float:
    """The most memory a running process has had resident, in MB; getrusage would count what it inherited too."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M) if status.exists() else None
    return int(found[1]) / 1024 if found else 0.0


def load_model_module(folder: Path) -> ModuleType:
    """nanoGPT's model.py as a module of another name than ours."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "train.py").is_file():
        raise ConfigError(f"peer: {folder} is no checkout of nanoGPT: it has no model.py and train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
