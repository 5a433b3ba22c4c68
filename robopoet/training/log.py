"""The log of a run: status lines, metrics.jsonl, report.html, and TensorBoard and Weights & Biases if asked for.

Nothing here may stop the training: no full disk, no lost network, no closed terminal.
"""

import functools
import math
import os
import queue
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from tqdm import tqdm

from configurator import written
from model import GPT
from robopoet.errors import ConfigError, describe, warn
from robopoet.files import append_lines, decode_json, read_lines, replacing
from robopoet.machine import Machine
from robopoet.ops import linear
from robopoet.training.evaluate import result_line
from robopoet.training.history import Record
from robopoet.training.report import RunReport, duration
from robopoet.training.run import Progress

LOGGER_WAIT_S = 10.0  # how long the end of a run waits for a logger
RISING = 3  # evaluations without a better val loss that count as overfitting
Logged = tuple[dict[str, float | str], int]  # numbers and texts, and their step


def to_tensorboard(config: dict[str, Any], run_id: str, records: Iterator[Logged]) -> None:
    """Write records to TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(config["out_dir"])
    last: dict[str, float | str] = {}
    for values, step in records:
        for key, value in values.items():
            if isinstance(value, str):
                board.add_text(key, "    " + value.replace("\n", "\n    "), step)  # as Markdown, a code block
            else:
                board.add_scalar(key, value, step)
        last |= {f"hparam/{key}": values[key] for key in ("train/loss", "val/loss", "val/bpb") if key in values}
    known = {
        key: value if isinstance(value, int | float | str) else str(written(value)) for key, value in config.items()
    }
    board.add_hparams(known, last, run_name=".")
    board.close()


def to_wandb(config: dict[str, Any], run_id: str, records: Iterator[Logged]) -> None:
    """Write records to Weights & Biases."""
    import wandb

    run = wandb.init(
        project=config["wandb_project"],
        name=config["wandb_run_name"] or (None if "WANDB_SWEEP_ID" in os.environ else Path(config["out_dir"]).name),
        dir=config["out_dir"],
        mode=config["wandb"],
        config=config,
        id=run_id or None,
        resume="allow",
    )
    for values, step in records:
        run.log(values | {"iter": step})
    run.finish()


class Sink:
    """A logger in a thread of its own, dropped at its first failure: training never waits for it or fails with it."""

    def __init__(self, name: str, write_all: Callable[[Iterator[Logged]], None]):
        self.name, self.waiting = name, queue.Queue(maxsize=1000)
        self.thread = threading.Thread(target=self._run, args=(write_all,), daemon=True)
        self.thread.start()

    def _run(self, write_all: Callable[[Iterator[Logged]], None]) -> None:
        try:
            write_all(iter(self.waiting.get, None))
        except ImportError as e:
            warn(f"{self.name} is left out: {e}; pip install {self.name.lower()}")
        except Exception as e:  # whatever it is
            warn(f"{self.name} failed and is left out from here on: {e}")

    def put(self, record: Logged | None) -> None:
        """Queue a record (None: the end), or drop it if the logger is a thousand behind."""
        if self.thread.is_alive() and not self.waiting.full():
            self.waiting.put_nowait(record)

    def close(self) -> None:
        """Give the logger some seconds to write what is queued."""
        self.put(None)
        self.thread.join(LOGGER_WAIT_S)
        if self.thread.is_alive():
            warn(f"{self.name} has not answered for {LOGGER_WAIT_S:.0f} s; the run ends without it")


def open_sinks(config: dict[str, Any], run_id: str) -> list[Sink]:
    """The loggers that a run's config asks for."""
    writers = {"TensorBoard": to_tensorboard} if config["tensorboard"] else {}
    writers |= {"wandb": to_wandb} if config["wandb"] != "off" else {}
    return [Sink(name, functools.partial(write_all, config, run_id)) for name, write_all in writers.items()]


def wrapped(text: str) -> str:
    """`text` indented and wrapped to the terminal, without what would move its cursor."""
    lines = ("".join(char if char.isprintable() else " " for char in line) for line in text.strip().splitlines())
    width = max(shutil.get_terminal_size().columns, 20)
    return "\n".join(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="    ") for line in lines)


class Log:
    """Status lines, metrics.jsonl and the report, and `sinks` beside them; silent on all ranks but the main one.

    later: what metrics.jsonl held of the steps that will run again, or of the one before the next.
    where: returns the run's folder, which may change.
    """

    def __init__(
        self, where: Callable[[], Path], progress: Progress, machine: Machine, sinks: list[Sink], report: RunReport
    ):
        self.active, self.where, self.run_id, self.machine = machine.is_main, where, progress.run_id, machine
        self.sinks, self.report, self.prints = sinks, report, True
        self.train_loss, self.eval_s = math.inf, 0.0  # the last record's loss; how long the last evaluation took
        self.left_s = 0.0  # until the end of the run; 0: unknown
        self.later: list[Record] = []
        if self.active:
            self._keep_until(progress.iter_num)

    def _keep_until(self, step: int) -> None:
        """Drop the records of steps that will run again, except their plans, of other runs, and what are none."""
        path = self.where() / "metrics.jsonl"
        with replacing(path) as f:
            for number, line in read_lines(path, ConfigError) if step and path.exists() else ():
                try:
                    found = decode_json(line, Record, f"{path}: line {number}", ConfigError, "dropped")
                    if found.run != self.run_id:
                        continue
                    if found.iter <= step or found.kind == "plan":
                        f.write(line + b"\n")
                        self.report.add(found)
                    if found.iter >= step:
                        self.later.append(found)
                except ConfigError as e:
                    warn(str(e))

    def print(self, *lines: str) -> None:
        """Print lines above the progress bar; if no one reads it any more, carry on without."""
        if self.active and self.prints:
            try:
                tqdm.write("\n".join(lines))
            except OSError:  # a closed pipe or terminal
                self.prints = False
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def begin(self, parameters: int, *lines: str) -> None:
        """Print what a run starts with, and show it in a first report; parameters: how many the model has."""
        self.print(f"{self.machine}, parameters: {parameters:,}", *lines)
        self.report.parameters = parameters
        self._renew_report()

    def _renew_report(self, ended: bool = False) -> None:
        if self.active:
            try:
                with replacing(self.where() / "report.html") as f:
                    f.write(self.report.page(self.left_s, ended))
            except Exception as e:  # whatever it is
                warn(f"the report is not renewed: {describe(e)}")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record, a line of JSON, and pass its numbers and text to the sinks."""
        if not self.active:
            return
        try:
            line = msgspec.json.encode(record | {"run": self.run_id}) + b"\n"  # NaN becomes null
            self.report.add(decode_json(line, Record, "metrics.jsonl", ConfigError, "not shown"))
            append_lines(self.where() / "metrics.jsonl", line)
        except (OSError, ConfigError) as e:
            warn(f"a record of step {record['iter']} is lost: {describe(e)}")
        where = record["split"] if record["kind"] == "eval" else "train"
        flat = record | {f"loss/{style}": loss for style, loss in record.get("loss_by_style", {}).items()}
        values = {f"{where}/{key}": flat[key] for key in flat if key == "text" or isinstance(flat[key], int | float)}
        for sink in self.sinks:
            sink.put((values, record["iter"]))

    def train(self, record: dict[str, Any], max_iters: int, eval_interval: int) -> None:
        """Write a training record and print it as a status line."""
        self.write(record)
        self.train_loss = record["loss"]
        left = max_iters - record["iter"]
        self.left_s = record["dt_ms"] / 1000 * left + self.eval_s * math.ceil(left / eval_interval)
        self.print(
            f"step {record['iter']:>6}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['tok_per_sec']:,.0f} tok/s  mfu {record['mfu']:.1%}  eta {duration(self.left_s)}"
        )

    def evaluation(self, progress: Progress, result: dict[str, Any]) -> None:
        """Write an evaluation of the val split, print it, with its text if there is one, and renew the report."""
        self.write({"kind": "eval", "iter": progress.iter_num, "split": "val", **result})
        self.eval_s = result["seconds"]
        self._renew_report()
        self.print(f"step {progress.iter_num:>6}  val {result_line(result)}")
        if text := result.get("text", ""):
            self.print(wrapped(text))
            if "copied_words" in result:
                self.print(f"    longest copy: {result['copied_words']} words")
        if progress.bad_evals == RISING and self.train_loss < progress.best_val_loss:
            best, step = progress.best_val_loss, progress.best_iter
            self.print(
                f"overfitting: val loss was lowest, {best:.4f}, at step {step}, kept in best.pt; --patience={RISING} "
                "stops; what helps: more text, --init_from=a model that writes, a smaller n_layer and n_embd, dropout"
            )

    def close(self) -> None:
        """Renew the report, as the run has ended, and close the sinks."""
        self._renew_report(ended=True)
        for sink in self.sinks:
            sink.close()


class Meter:
    """Times the steps between two status lines, without evaluation and saving."""

    def __init__(self, machine: Machine, model: GPT, tokens_per_step: int, n_logits: int = 0):
        self.machine, self.tokens_per_step = machine, tokens_per_step
        self.flops_per_step = model.flops_per_token(n_logits) * tokens_per_step
        self.peak_flops, self.peak_mem_mb = machine.matmul_flops(linear) * machine.world_size, 0.0
        self.compile_s: float | None = None
        self.restart()

    @property
    def running_s(self) -> float:
        """Seconds of this lap so far."""
        return time.perf_counter() - self.since

    def restart(self) -> None:
        """Start a new lap."""
        self.machine.synchronize()
        self.steps, self.since = 0, time.perf_counter()

    def lap(self, progress: Progress, loss: torch.Tensor, norm: torch.Tensor, lr: float) -> dict[str, Any]:
        """The record of the steps since the last lap, whose seconds it adds to `progress`."""
        mean_loss = self.machine.all_reduce(loss).item() / self.machine.world_size  # waits for the device
        elapsed_s = time.perf_counter() - self.since
        if self.compile_s is None:  # the first lap is one step, which compiles
            self.compile_s = elapsed_s
        dt_s = elapsed_s / self.steps
        self.peak_mem_mb = max(self.peak_mem_mb, self.machine.peak_mem_mb())
        progress.seconds += elapsed_s
        record = {
            "kind": "train",
            "iter": progress.iter_num,
            "loss": mean_loss,
            "lr": lr,
            "grad_norm": norm.item(),
            "dt_ms": 1000 * dt_s,
            "tok_per_sec": self.tokens_per_step / dt_s,
            "mfu": self._mfu(self.flops_per_step / dt_s),
            "tokens": progress.iter_num * self.tokens_per_step,
            "seconds": progress.seconds,
            "compile_s": self.compile_s,
            "peak_mem_mb": self.peak_mem_mb,
        }
        self.restart()
        return record

    def _mfu(self, flops: float) -> float:
        """The share of the peak FLOP/s, which is measured again if exceeded: another load may have lowered it."""
        if flops > self.peak_flops:
            self.peak_flops = max(flops, self.machine.matmul_flops(linear) * self.machine.world_size)
        return flops / self.peak_flops
