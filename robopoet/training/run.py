"""A run's folder: its lock, its checkpoints, and the earlier run that it replaces."""

import contextlib
import dataclasses
import math
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import BaseFileLock, FileLock, Timeout
from torch.utils._pytree import tree_map_only

from configurator import ConfigError, warn
from model import GPT
from robopoet.files import replacing
from robopoet.machine import Machine
from robopoet.text.dataset import Meta
from robopoet.training.average import Average
from robopoet.training.sharding import full_tensor
from robopoet.weights import checkpoint

CHECKPOINTS = ("ckpt.pt", "ckpt.prev.pt", "ckpt.damaged.pt", "best.pt")


@dataclass
class Progress:
    """How far a run has come; every checkpoint holds it.

    best_iter: the step of the best evaluation. bad_evals: evaluations since then. seconds: in training alone. run_id:
    the run's own, in its metrics too.
    """

    iter_num: int = 0
    first_val_loss: float = math.inf
    best_val_loss: float = math.inf
    best_iter: int = 0
    bad_evals: int = 0
    seconds: float = 0.0
    run_id: str = ""

    def note(self, val_loss: float) -> bool:
        """Count an evaluation; returns whether its loss is the best so far."""
        if self.first_val_loss == math.inf:
            self.first_val_loss = val_loss
        is_best = val_loss < self.best_val_loss
        self.bad_evals += 1
        if is_best:
            self.best_val_loss, self.best_iter, self.bad_evals = val_loss, self.iter_num, 0
        return is_best

    def has_run_out_of(self, patience: int) -> bool:
        """Whether so many evaluations have brought no better loss; a patience of 0 never runs out."""
        return 0 < patience <= self.bad_evals

    def summary(self, best: Path) -> list[str]:
        """What a finished run prints last; best: its best.pt."""
        steps = f"at step {self.best_iter}, the first was {self.first_val_loss:.4f}"
        return [
            f"best val loss {self.best_val_loss:.4f} {steps}; {self.seconds:.0f} s of training",
            f"the model: {best}",
            f"to write with it: python sample.py {shlex.quote(str(best))}",
        ]


class Run:
    """The folder `out`: locked for this run until close(), or until its process ends, however it ends.

    config, meta: stored in every checkpoint. Raises ConfigError if the folder can't be written or
    another run is writing to it.
    """

    def __init__(self, out: Path, config: dict[str, Any], meta: Meta, machine: Machine):
        self.out, self.machine = out, machine
        self.about = {"config": config, "tokenizer": meta.tokenizer.to_json()}
        self.about |= {"text_sha256": meta.text_sha256, "licences": list(meta.licences)}
        self.lock = lock_folder(out) if machine.is_main else None

    def close(self) -> None:
        """Unlock the folder."""
        if self.lock:
            self.lock.release()

    def save(
        self,
        model: GPT,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        progress: Progress,
        is_best: bool,
        average: Average | None = None,
    ) -> str:
        """Write ckpt.pt, keeping the last one as ckpt.prev.pt, and best.pt if this is the best model so far.

        average: of the weights, which best.pt then holds. All ranks call it, to gather what is sharded; the main one
        writes. Returns "" if it was written; else an error message, and the previous checkpoint is kept.
        """
        latest = {**checkpoint.model_entries(model), **dataclasses.asdict(progress), **self.about}
        states = [optimizer.state_dict() for optimizer in optimizers]
        latest |= {"average": average.weights if average else {}, "optimizer_states": states}
        latest = tree_map_only(torch.Tensor, self._gather, latest)
        if not self.machine.is_main:
            return ""
        best = {key: value for key, value in latest.items() if key not in ("average", "optimizer_states")}
        best["model"] = best["model"] | latest["average"]
        for content in (best, latest):  # tied, and written once
            content["model"]["lm_head.weight"] = content["model"]["transformer.wte.weight"]
        # nanoGPT reads "optimizer", AdamW's
        latest |= {"optimizer": latest["optimizer_states"][0], "scaler": scaler.state_dict()}
        try:
            if is_best:
                checkpoint.save(self.out / "best.pt", best)
            checkpoint.save(self.out / "ckpt.pt", latest, keep=self.out / "ckpt.prev.pt")
        except OSError as e:
            reason, step = e.strerror or e, progress.iter_num
            return f"step {step} could not be saved to {self.out}: {reason}; the previous checkpoint is kept"
        return ""

    def keep_config(self, cfg: Any) -> None:
        """Write the keys of `cfg` that differ from their defaults to config.yaml, with which train.py runs the same."""
        if not self.machine.is_main:
            return
        values = {field.name: (getattr(cfg, field.name), field.default) for field in dataclasses.fields(cfg)}
        text = yaml.safe_dump({key: value for key, (value, default) in values.items() if value != default})
        try:
            with replacing(self.out / "config.yaml") as f:
                f.write(f"# python train.py {self.out}/config.yaml\n{text}".encode())
        except OSError as e:
            warn(f"{self.out}/config.yaml could not be written: {e.strerror}")

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The full tensor, on the main rank's CPU if it is sharded: one at a time, no device holds the full model."""
        if (gathered := full_tensor(tensor)) is tensor:
            return tensor
        return gathered.cpu() if self.machine.is_main else None

    def check_space(self, model: GPT, resumes: bool, averages: bool) -> None:
        """Raise ConfigError unless the disk holds best.pt, ckpt.pt, ckpt.prev.pt and the one being written.

        averages: whether the run keeps an average of its weights.
        """
        if not self.machine.is_main:
            return
        weights = 4 * model.num_params()
        needed = weights + 3 * (3 + averages) * weights  # two moments beside the weights
        replaced = self.out if resumes else self.out / "previous"
        there = sum(path.stat().st_size for name in CHECKPOINTS if (path := replaced / name).exists())
        free = shutil.disk_usage(self.out).free
        if free + there < needed:
            more_mb = (needed - there) / 2**20
            raise ConfigError(
                f"out_dir: {self.out} has {free / 2**20:,.0f} MB free, the checkpoints take {more_mb:,.0f} MB more; "
                "choose another disk, or free some space"
            )

    def make_way(self, resumed: Path | None) -> list[str]:
        """Put aside what the first save must not replace; returns lines that say what was moved.

        resumed: the checkpoint that the run resumes from; None for a new run.
        """
        if not self.machine.is_main:
            return []
        if resumed == self.out / "ckpt.prev.pt":  # or the save would keep the damaged ckpt.pt in its place
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.out / "ckpt.pt", self.out / "ckpt.damaged.pt")
        if resumed is None and set_aside(self.out):
            previous = self.out / "previous"
            return [
                f"{self.out} held an earlier run: moved to {previous}, in place of what was there",
                f"to resume that one instead: --init_from=auto --out_dir={previous}",
            ]
        return []


def lock_folder(out: Path) -> BaseFileLock:
    """Make the folder and lock it until the lock is released, or the process ends; raises ConfigError if it can't."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"out_dir: another run is writing to {out}; wait for it, or choose another") from None
    except OSError as e:
        raise ConfigError(f"out_dir: {out} can't be written ({e.strerror}); choose another") from None
    return lock


def set_aside(out: Path) -> bool:
    """Move an earlier run's files from `out` to out/previous, replacing those there; returns whether there was one.

    If the process is killed meanwhile, nothing is lost and the next call finishes. Raises ConfigError if a run is
    writing to out/previous.
    """
    part, previous = out / "previous.part", out / "previous"
    found = [path for name in CHECKPOINTS if (path := out / name).exists()]
    if not found and not part.exists():
        return False
    if previous.exists():
        lock_folder(previous).release()
    part.mkdir(exist_ok=True)
    others = ("metrics.jsonl", "config.yaml", "events.out.tfevents.*")
    for path in (*found, *(path for name in others for path in out.glob(name))):  # what resumes comes first
        os.replace(path, part / path.name)
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(part, previous)
    return True
