"""A run: what it starts from, how far it has come, and what it saves in its folder."""

import contextlib
import dataclasses
import functools
import math
import os
import secrets
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._pytree import tree_map_only

from model import GPT
from robopoet.errors import CheckpointError, ConfigError, describe, warn
from robopoet.files import move, replacing
from robopoet.machine import Machine
from robopoet.text.dataset import SPLITS, Meta
from robopoet.text.excerpts import last_excerpts
from robopoet.text.tokenizer import Tokenizer
from robopoet.text.windows import Split
from robopoet.training.folder import Folder, earlier_runs, replaces, set_aside
from robopoet.training.memory import full_tensor
from robopoet.training.optimizer import Average, restore_states, state_shapes
from robopoet.training.report import RunReport
from robopoet.weights import checkpoint
from robopoet.weights.header import config_entries, read_header, read_run

# what earlier versions saved for a key that is now None: chosen by train.py
EARLIER_AUTO = {"learning_rate": 0, "muon_weight_decay": -1, "lr_decay_iters": 0, "eval_interval": 0}
EARLIER_AUTO |= {"wandb_run_name": ""}


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


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run starts from (None: from scratch), its path, and whether the run resumes."""

    content: dict[str, Any] | None
    path: Path
    resumes: bool

    @property
    def tunes(self) -> bool:
        """Whether a new run begins with weights that another one learned."""
        return self.content is not None and not self.resumes

    @property
    def is_ours(self) -> bool:
        """Whether a run of ours saved the checkpoint."""
        return self.content is not None and {"config", "model_extra"} <= self.content.keys()

    @property
    def config(self) -> dict[str, Any]:
        """The keys of the run that saved the checkpoint, as this version writes them."""
        saved = (self.content or {})["config"]
        plain = {key: saved[key] for key in EARLIER_AUTO.keys() & saved.keys() if type(saved[key]) in (int, float, str)}
        return saved | {key: None for key, value in plain.items() if value == EARLIER_AUTO[key]}

    def licences(self, meta: Meta) -> list[str]:
        """Those of the texts that a run reads, and of what the weights that it starts from were trained on."""
        theirs = read_header(self.content, self.path).licences if self.content else ()
        return [*dict.fromkeys([*meta.licences, *theirs])]

    def excerpts(self, split: Split, tok: Tokenizer, block_size: int) -> dict[str, list[int]]:
        """What a model that began with another's weights reads before it writes, of the text it is now trained on."""
        tunes = self.content and (not self.is_ours or self.content.get("excerpts"))
        return last_excerpts(split, tok, block_size // 4) if tunes else {}

    def build_model(self, block_size: int, dropout: float, vocab_size: int) -> GPT:
        """The checkpoint's model, its context shortened to `block_size`, with new ids up to `vocab_size`."""
        model = checkpoint.build_model(self.content or {}, self.path, dropout, vocab_size)
        model.crop_block_size(block_size)
        return model

    def release(self) -> None:
        """Free the checkpoint's tensors once the run has copied them."""
        if self.content:
            self.content.clear()

    def check_fit(self, dataset: str, optimizer: str, meta: Meta) -> None:
        """Raise CheckpointError if the dataset or, on resuming, the optimizer is not the checkpoint's."""
        if self.content is None:
            return
        path, problems = self.path, list[str]()
        if self.resumes and self.content.get("text_sha256") != meta.text_sha256:
            raise CheckpointError(
                f"{path}: it was trained on another text than {dataset}; a new run can start from its weights: "
                f"prepare.py --tokenizer={path}, then --init_from={path} with another --out_dir"
            )
        theirs, ours = checkpoint.tokenizer_of(self.content, path).to_json(), meta.tokenizer.to_json()
        if not self.resumes:  # a new run may add special tokens to the checkpoint's
            ours["specials"] = ours["specials"][: len(theirs["specials"])]
        header = read_header(self.content, path)
        if self.resumes and (changes := meta.changes(header.identity)):
            cut = f"another cut of {dataset}'s text, {_list(changes)}"
            problems.append(f"it was trained on {cut}; prepare that as it was")
        elif theirs != ours:
            problems.append(f"its tokenizer is not the dataset's; prepare that again, with --tokenizer={path}")
        elif not self.resumes:
            warn_of_other_splits(self.content, path, dataset, meta)
        if self.resumes and (saved := header.config.optimizer) != optimizer:
            problems.append(f"optimizer: the checkpoint has {saved}, the config {optimizer}")
        if problems:
            raise CheckpointError(f"{path}: " + "\n  ".join(problems))

    def restore(
        self,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        average: Average | None,
        teachers: dict[str, str],
    ) -> Progress:
        """Give optimizers, scaler and the weights' average their saved states; returns how far the run had come.

        teachers: path -> SHA-256. A new run is at step 0 and gets a run_id. Raises CheckpointError unless all is such
        as this run itself would save.
        """
        if self.content is None or not self.resumes:
            return Progress(run_id=secrets.token_hex(4))
        path, saved = self.path, read_run(self.content, self.path)
        for name in teachers.keys() & saved.teachers.keys():
            if teachers[name] != saved.teachers[name]:
                advice = "put that back, or begin a new run"
                raise CheckpointError(f"teacher: {name} is not the model that has taught this run so far; {advice}")
        if any(weight.dtype is not torch.float32 for weight in self.content["model"].values()):
            raise CheckpointError(f"{path}: its weights are not all float32, as a run's are; use --init_from={path}")
        if len(saved.optimizer_states) != len(optimizers):
            found = len(saved.optimizer_states)
            raise CheckpointError(f"{path}: has the states of {found} optimizers, the run has {len(optimizers)}")
        for i, (optimizer, state) in enumerate(zip(optimizers, saved.optimizer_states, strict=True)):
            restore_states(optimizer, state, f"the states of its optimizer {i}", path, saved.iter_num)
        if average and (saved.average or saved.config.ema):  # a run may begin to average when it is resumed
            shapes = {name: weight.shape for name, weight in average.weights.items()}
            checkpoint.check_tensors(saved.average, shapes, "its averages", path, (torch.float32,))
            average.load(saved.average)
        if scaler.is_enabled() and saved.scaler:
            scaler.load_state_dict(scaler.state_dict() | dataclasses.asdict(saved.scaler))
        return Progress(**{field.name: getattr(saved, field.name) for field in dataclasses.fields(Progress)})


def find_start(init_from: str, out: Path, eval_only: bool) -> Start:
    """What `init_from` names; raises ConfigError or CheckpointError if there is no such thing."""
    latest, previous = out / "ckpt.pt", out / "ckpt.prev.pt"
    if init_from == "scratch" or (init_from == "auto" and not latest.exists() and not previous.exists()):
        if eval_only:
            raise ConfigError(f"init_from: auto found no ckpt.pt in {out}; name one, e.g. --init_from=out/demo/best.pt")
        kept = [folder for folder in (out / "previous", *earlier_runs(out)) if (folder / "ckpt.pt").exists()]
        if init_from == "auto" and kept:
            warn(f"{out} has no ckpt.pt, a new run begins; --out_dir={kept[-1]} resumes the one there")
        return Start(None, latest, False)
    if init_from not in ("resume", "auto"):
        if not eval_only and replaces(out, Path(init_from)):
            raise ConfigError(f"init_from: {init_from} is what this run replaces; choose another out_dir")
        return Start(checkpoint.load(Path(init_from)), Path(init_from), False)
    try:
        return Start(checkpoint.load(latest), latest, True)
    except CheckpointError as e:
        if init_from == "resume" or not previous.exists():
            raise
        warn(f"{e}; resuming from {previous}")
        return Start(checkpoint.load(previous), previous, True)


def warn_of_other_splits(content: dict[str, Any], path: Path, dataset: str, meta: Meta) -> None:
    """Warn that a checkpoint may have read what it is evaluated on: it was trained on other splits of the same text."""
    header = read_header(content, path)
    changes = meta.changes({key: length for key, length in header.identity.items() if key in SPLITS})
    if changes and header.text_sha256 == meta.text_sha256:
        warn(f"{path} was trained on another cut of {dataset}'s text and may have read its val split: {_list(changes)}")


def _list(changes: dict[str, str]) -> str:
    return ", ".join(f"{key} {change}" for key, change in changes.items())


class Run:
    """What a run saves in `out`, which is its own until close(), or until its process ends, however it ends.

    config, meta: stored in every checkpoint. Raises ConfigError if the folder can't be written or another run is
    writing to it.
    """

    def __init__(self, out: Path, config: dict[str, Any], meta: Meta, machine: Machine):
        if len(str(out).splitlines()) > 1:
            raise ConfigError(f"out_dir: found {str(out)!r}, must be a single line")
        self.config, self.meta, self.machine = config, meta, machine
        self.licences = list(meta.licences)
        self.teachers, self.excerpts = dict[str, str](), dict[str, list[int]]()  # path -> SHA-256; style -> ids
        self.best_loss = math.inf  # best.pt's, if it is this run's
        self.folder = Folder(out, machine.is_main)
        self.report = RunReport(meta, machine)
        self.saver, self.unsaved = checkpoint.Saver(machine), ""  # why the last save failed, if it did

    @property
    def out(self) -> Path:
        """The folder; another once the run has lost its own."""
        return self.folder.path

    def take_from(self, start: Start, split: Split, tok: Tokenizer, teachers: dict[str, str]) -> None:
        """Store in every checkpoint what the run has from its start, its training split and its teachers."""
        self.teachers, self.licences = teachers, start.licences(self.meta)
        self.excerpts = start.excerpts(split, tok, self.config["block_size"])

    def save(
        self,
        model: GPT,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        progress: Progress,
        val_loss: float = math.inf,
        average: Average | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Write ckpt.pt, keeping the last one as ckpt.prev.pt, and best.pt if the run has none as good on the disk.

        val_loss: of this step, if it was evaluated. average: of the weights, which best.pt then holds. All ranks call
        it, to gather what is sharded; the main one writes, on CUDA in the saver's thread. tell: gets a line once all is
        written, or that it could not be, which `unsaved` then holds until the next save.
        """
        self.saver.wait()
        kept = model.state_dict(), average.weights if average else {}, [each.state_dict() for each in optimizers]
        del kept[0]["lm_head.weight"]  # tied, and written once
        weights, averaged, states = tree_map_only(torch.Tensor, self._gather, kept)
        if not self.machine.is_main:
            return
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        shape, meta = config_entries(model.config), self.meta
        best = {
            # nanoGPT's keys
            "model": weights,  # its state dict: name -> float32 tensor
            "model_args": shape["model_args"],  # seven of GPTConfig's values
            "iter_num": progress.iter_num,  # steps taken
            "best_val_loss": val_loss,  # nats/token
            "config": self.config,  # the value of each key of train.py
            # ours; with nanoGPT's above, enough to write
            "model_extra": shape["model_extra"],  # GPTConfig's others
            "tokenizer": meta.tokenizer.to_json(),  # as in meta.json
            "text_sha256": meta.text_sha256,  # tells which text the model has read
            "identity": meta.identity,  # how it was cut: each split's length, and the tags
            "excerpts": self.excerpts,  # style -> ids that the model reads before a prompt, if it began as another's
            "licences": self.licences,  # the texts', and those of the weights that the run started from
            "teachers": self.teachers,  # path -> SHA-256 of the models that have taught it
            "first_val_loss": progress.first_val_loss,  # nats/token, at the first evaluation
            "best_iter": progress.iter_num,  # the step of best_val_loss
            "bad_evals": progress.bad_evals,  # evaluations since then, for patience
            "seconds": progress.seconds,  # time in training alone
            "other_s": progress.other_s,  # time in all else, of a run of minutes
            "run_id": progress.run_id,  # the run's own, also in its metrics.jsonl
        }
        latest = best | {
            "best_val_loss": progress.best_val_loss,
            "best_iter": progress.best_iter,
            # what only resuming needs
            "optimizer": states[0],  # AdamW's state, where nanoGPT looks for it
            "optimizer_states": states,  # each optimizer's
            "scaler": scaler.state_dict(),  # the loss scale of float16; empty for other dtypes
            "average": averaged,  # name -> averaged weight; empty without ema
        }
        best["model"] = weights | averaged
        best["model"]["lm_head.weight"] = best["model"]["transformer.wte.weight"]
        self.saver.start(functools.partial(self._write, best, latest, tell))

    def _write(self, best: dict[str, Any], latest: dict[str, Any], tell: Callable[[str], None]) -> None:
        """Write best.pt, if it is that, and ckpt.pt."""
        self.unsaved, step = "", latest["iter_num"]
        try:
            out = self.folder.where()
            if not (out / "best.pt").exists():
                self.best_loss = math.inf
            if best["best_val_loss"] < self.best_loss:
                checkpoint.save(out / "best.pt", best)
                self.best_loss = best["best_val_loss"]
            checkpoint.save(out / "ckpt.pt", latest, keep=out / "ckpt.prev.pt")
        except (OSError, ConfigError) as e:
            stays = "the previous checkpoint is kept" if os.path.exists(self.out / "ckpt.pt") else "there is none"
            self.unsaved = f"step {step} could not be saved: {describe(e)}; {stays}"
        tell(self.unsaved or f"saved {self.out / 'ckpt.pt'}, step {step}")

    def keep_config(self, config: dict[str, Any], written: dict[str, Any], shown: dict[str, Any]) -> None:
        """Save the keys `config` in checkpoints from here on, and write config.yaml, with which train.py runs the same.

        written: what config.yaml holds. shown: the settings in the report.
        """
        self.config = self.report.config = config
        self.report.settings = shown
        if not self.machine.is_main:
            return
        try:
            with replacing(self.out / "config.yaml") as f:
                command = f"# python train.py {shlex.quote(f'{self.out}/config.yaml')}\n"
                f.write(f"{command}{yaml.safe_dump(written)}".encode())
        except OSError as e:
            warn(describe(e))

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The full tensor, as it is now, on the main rank; if it is sharded on its CPU, so no device holds all."""
        gathered = full_tensor(tensor)
        if not self.machine.is_main:
            return None
        return self.saver.snapshot(tensor) if gathered is tensor else gathered.cpu()

    def check_space(self, model: GPT, optimizers: list[torch.optim.Optimizer], resumes: bool, averages: bool) -> None:
        """Raise ConfigError unless the disk holds best.pt, ckpt.pt, ckpt.prev.pt and the one being written.

        averages: whether the run keeps an average of its weights.
        """
        if not self.machine.is_main:
            return
        weights = 4 * model.num_params()
        states = 4 * sum(shape.numel() for each in optimizers for shape in state_shapes(each).values())
        needed = weights + 3 * ((1 + averages) * weights + states)
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
                move({self.out / "ckpt.pt": self.out / "ckpt.damaged.pt"})
        if resumed is None and (kept := set_aside(self.out)):
            stays = "; best.pt stays that run's until this one has its own" if (kept / "best.pt").exists() else ""
            return [f"the earlier run is in {kept}: --init_from=auto --out_dir={kept} resumes it{stays}"]
        return []
