"""A run: how far it has come, and what it saves in its folder."""

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
from torch.utils._pytree import tree_map_only

from configurator import ConfigError, describe, warn
from model import GPT
from robopoet.files import replacing
from robopoet.machine import Machine
from robopoet.text.dataset import Meta
from robopoet.training.average import Average
from robopoet.training.folder import Folder, earlier_runs, set_aside
from robopoet.training.sharding import full_tensor
from robopoet.weights import checkpoint


@dataclass
class Progress:
    """How far a run has come; every checkpoint holds it.

    best_iter: the step of the best evaluation. bad_evals: evaluations since then. seconds: in training alone. other_s:
    in all else, of a run of minutes. run_id: the run's own, in its metrics too.
    """

    iter_num: int = 0
    first_val_loss: float = math.inf
    best_val_loss: float = math.inf
    best_iter: int = 0
    bad_evals: int = 0
    seconds: float = 0.0
    other_s: float = 0.0
    run_id: str = ""

    def note(self, val_loss: float) -> None:
        """Count an evaluation."""
        if self.first_val_loss == math.inf:
            self.first_val_loss = val_loss
        self.bad_evals += 1
        if val_loss < self.best_val_loss:
            self.best_val_loss, self.best_iter, self.bad_evals = val_loss, self.iter_num, 0

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
    """What a run saves in `out`, which is its own until close(), or until its process ends, however it ends.

    config, meta: stored in every checkpoint. Raises ConfigError if the folder can't be written or
    another run is writing to it.
    """

    def __init__(self, out: Path, config: dict[str, Any], meta: Meta, machine: Machine):
        if len(str(out).splitlines()) > 1:
            raise ConfigError(f"out_dir: found {str(out)!r}, must be a single line")
        self.machine, self.best_loss = machine, math.inf  # best.pt's, if it is this run's
        self.about = {"config": config, "tokenizer": meta.tokenizer.to_json()}
        self.about |= {"text_sha256": meta.text_sha256, "identity": meta.identity, "licences": list(meta.licences)}
        self.folder = Folder(out, machine.is_main)

    @property
    def out(self) -> Path:
        """The folder; another once the run has lost its own."""
        return self.folder.path

    def save(
        self,
        model: GPT,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        progress: Progress,
        val_loss: float = math.inf,
        average: Average | None = None,
    ) -> str:
        """Write ckpt.pt, keeping the last one as ckpt.prev.pt, and best.pt if the run has none as good on the disk.

        val_loss: of this step, if it was evaluated. average: of the weights, which best.pt then holds. All ranks call
        it, to gather what is sharded; the main one writes. Returns "" if it was written, else an error message.
        """
        latest = {**checkpoint.model_entries(model), **dataclasses.asdict(progress), **self.about}
        states = [optimizer.state_dict() for optimizer in optimizers]
        latest |= {"average": average.weights if average else {}, "optimizer_states": states}
        latest = tree_map_only(torch.Tensor, self._gather, latest)
        if not self.machine.is_main:
            return ""
        best = {key: value for key, value in latest.items() if key not in ("average", "optimizer_states")}
        best |= {"model": best["model"] | latest["average"], "best_val_loss": val_loss, "best_iter": progress.iter_num}
        for content in (best, latest):  # tied, and written once
            content["model"]["lm_head.weight"] = content["model"]["transformer.wte.weight"]
        # nanoGPT reads "optimizer", AdamW's
        latest |= {"optimizer": latest["optimizer_states"][0], "scaler": scaler.state_dict()}
        try:
            out = self.folder.where()
            if not (out / "best.pt").exists():
                self.best_loss = math.inf
            if val_loss < self.best_loss:
                checkpoint.save(out / "best.pt", best)
                self.best_loss = val_loss
            checkpoint.save(out / "ckpt.pt", latest, keep=out / "ckpt.prev.pt")
        except (OSError, ConfigError) as e:
            kept = "the previous checkpoint is kept" if os.path.exists(self.out / "ckpt.pt") else "there is none"
            return f"step {progress.iter_num} could not be saved: {describe(e)}; {kept}"
        return ""

    def keep_config(self, cfg: Any) -> None:
        """Write the keys of `cfg` that differ from their defaults to config.yaml, with which train.py runs the same.

        block_size is always there, as it may shorten that of init_from; minutes and epochs are not if they have chosen.
        Checkpoints hold all keys from here on.
        """
        self.about["config"] = dataclasses.asdict(cfg)
        if not self.machine.is_main:
            return
        values = {field.name: (getattr(cfg, field.name), field.default) for field in dataclasses.fields(cfg)}
        kept = {key: value for key, (value, default) in values.items() if value != default or key == "block_size"}
        if kept.pop("minutes", 0):
            kept.pop("epochs", 0)
        text = yaml.safe_dump({key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()})
        try:
            with replacing(self.out / "config.yaml") as f:
                f.write(f"# python train.py {shlex.quote(f'{self.out}/config.yaml')}\n{text}".encode())
        except OSError as e:
            warn(describe(e))

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
        replaced = [self.out / name for name in ("best.pt", "ckpt.pt", "ckpt.prev.pt") if resumes]
        found = [path.stat() for path in replaced if path.exists()]
        there = sum(file.st_size for file in found if file.st_nlink == 1)  # else an earlier run keeps it
        free = shutil.disk_usage(self.out).free
        if free + there < needed:
            more_mb = (needed - there) / 2**20
            earlier = f"; earlier runs are in {self.out}/previous" if earlier_runs(self.out) else ""
            raise ConfigError(
                f"out_dir: {self.out} has {free / 2**20:,.0f} MB free, the checkpoints take {more_mb:,.0f} MB more; "
                f"choose another disk, or free some space{earlier}"
            )

    def make_way(self, resumed: Path | None, progress: Progress) -> list[str]:
        """Put aside what the first save must not replace; returns a line that says where an earlier run is, if any.

        resumed: the checkpoint that the run resumes from; None for a new run.
        """
        if not self.machine.is_main:
            return []
        if resumed:
            self.best_loss = progress.best_val_loss
        if resumed == self.out / "ckpt.prev.pt":  # or the save would keep the damaged ckpt.pt in its place
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.out / "ckpt.pt", self.out / "ckpt.damaged.pt")
        if resumed is None and (kept := set_aside(self.out)):
            stays = "; best.pt stays that run's until this one has its own" if (kept / "best.pt").exists() else ""
            return [f"the earlier run is in {kept}: --init_from=auto --out_dir={kept} resumes it{stays}"]
        return []
