"""What the scripts of bench share: the machine's name, medians with their range, result files, Markdown tables."""

import contextlib
import json
import operator
import re
import shlex
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

import train
from configurator import keys_of, written
from model import GPT
from robopoet import files
from robopoet.errors import CheckpointError, ConfigError
from robopoet.machine import Machine
from robopoet.text.dataset import find_dataset, read_meta
from robopoet.text.windows import EvalPlan, open_split
from robopoet.training.evaluate import evaluate
from robopoet.training.plan import complete
from robopoet.training.report import describe_machine
from robopoet.training.run import Start
from robopoet.weights import checkpoint

RESULTS = Path(__file__).parent / "results"
PROGRESS_S = 30.0  # seconds between two lines of progress
T = TypeVar("T")


@contextlib.contextmanager
def reporting(describe: Callable[[], str]) -> Iterator[None]:
    """While the block runs, print `describe()` and the time so far to stderr now and then, terminal or not."""
    start, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(PROGRESS_S):
            print(f"{describe()}, {(time.monotonic() - start) / 60:.1f} min", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield the items; now and then a line on stderr says how many are done, such as `laps: 2 of 5, 1.5 min`."""
    done, total = 0, operator.length_hint(items)
    with reporting(lambda: f"{what}: {done} of {total}" if total else f"{what}: {done}"):
        for item in items:
            yield item
            done += 1


def spread(values: list[float]) -> dict[str, float]:
    """The median of repeats, with their minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(figure: dict[str, float], form: str = ",.0f") -> str:
    """A spread as text: the median, then the range in brackets if it shows at this precision."""
    median, low, high = (f"{figure[key]:{form}}" for key in ("median", "min", "max"))
    return median if low == high else f"{median} ({low} to {high})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that a terminal shows its columns too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def side_by_side(columns: list[str], blocks: list[tuple[str, list[list[str]]]]) -> str:
    """A Markdown table that compares `columns`: in each block a row per quantity, with a cell for each column.

    A block is its name, whose lines stand in the block's first rows, and its rows: the quantity, then the cells. Cells
    at a row's end may be left out; a row without any is dropped.
    """
    rows = []
    for name, block in blocks:
        names = name.split("\n")
        for quantity, *cells in block:
            if any(cells):
                row = [names.pop(0) if names else "", quantity, *cells]
                rows.append(row + [""] * (len(columns) + 2 - len(row)))
    return markdown(["", "", *columns], rows)


def wrap_command(command: str, width: int = 100) -> str:
    """A shell command broken into lines of `width` columns; the shell reads the same arguments.

    Lines break between arguments. An argument longer than a line is put into double quotes and breaks at its blanks.
    """
    text, column = "", 0
    for word in shlex.split(command):
        pieces = [shlex.quote(word)]
        if len(pieces[0]) > width - 6 and not set(word) & set('"$`\\!'):
            pieces = f'"{word}"'.split(" ")
        for i, piece in enumerate(pieces):
            if text and column + len(piece) + 3 > width:
                text, column = (f"{text}\\\n ", 1) if i else (f"{text} \\\n    ", 4)
            elif text:
                text, column = f"{text} ", column + 1
            text, column = text + piece, column + len(piece)
    return text


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list of these lines, wrapped at 100 columns."""
    wrapped = [textwrap.fill(f"- {line}", 100, subsequent_indent="  ", break_on_hyphens=False) for line in lines]
    return "\n".join(wrapped)


def last_line(printed: str) -> str:
    """The last line that a process printed, which says why it failed."""
    return (printed.strip().splitlines() or ["it printed nothing"])[-1]


def read_result(path: Path) -> dict[str, Any]:
    """Read a result that `write_result` wrote; raises ConfigError for any other file."""
    result = files.read_json(path, dict[str, Any], ConfigError, "run its bench again")
    if not {"kind", "machine"} <= result.keys():
        raise ConfigError(f"{path}: is not a result of a bench; remove it, or run its bench again")
    return result


def forget_peak(machine: Machine) -> None:
    """Free the cached memory of a CUDA device and reset its peak memory statistics."""
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)


def config_name() -> str:
    """The last YAML file on the command line, without its ending."""
    return ([Path(arg).stem for arg in sys.argv[1:] if arg.endswith((".yaml", ".yml"))] or ["defaults"])[-1]


def train_command(cfg: train.TrainConfig, **changes: Any) -> list[str]:
    """The command that starts a new run of train.py with the keys of `cfg`, except `changes`, and without loggers.

    With minutes, only with those that were given: train.py chooses the others.
    """
    names = [field.name for field in keys_of(train.TrainConfig)]
    keys = {name: getattr(cfg, name) for name in names if not cfg.minutes or name in cfg.given}
    keys |= {"init_from": "scratch", "eval_only": False, "tensorboard": False, "wandb": "off"} | changes
    each = []
    for key, value in keys.items():
        shown = written(value)
        each += [f"--{key}={item}" for item in (shown if isinstance(shown, list) else [shown])]
    return [sys.executable, "-u", train.__file__, *each]  # -u: each line arrives as it is printed


def evaluate_checkpoint(
    saved: dict[str, Any], path: Path, model: GPT, split_name: str, machine: Machine
) -> dict[str, Any]:
    """Evaluate `model`, which has the checkpoint's weights, on a full split of the dataset that it was trained on.

    Raises CheckpointError when the checkpoint does not name a dataset; nanoGPT's and Hugging Face's don't.
    """
    if not {"dataset", "batch_size"} <= saved.get("config", {}).keys():
        raise CheckpointError(f"{path}: does not say what it was trained on; name a checkpoint of train.py")
    start = Start(saved, path, resumes=False)
    cfg = complete(train.TrainConfig(eval_only=True, init_from=str(path)), start)
    folder = find_dataset(cfg.dataset)
    meta = read_meta(folder)
    start.check_fit(cfg.dataset, cfg.optimizer, meta)
    split = open_split(folder, split_name, meta, cfg.block_size, machine.device)
    return evaluate(model, split, meta.load_tokenizer(), EvalPlan(cfg.block_size, cfg.batch_size), machine)


def evaluate_test(path: Path, machine: Machine) -> dict[str, Any]:
    """Evaluate the checkpoint at `path` on the test split of its dataset, as `evaluate_checkpoint` does."""
    saved = checkpoint.load(path)
    model = checkpoint.build_model(saved, path).to(machine.device)
    return evaluate_checkpoint(saved, path, model, "test", machine)


def command_line() -> str:
    """The command that is running; absolute paths are cut to their last part, since they mean nothing elsewhere."""
    args = [re.sub(r"(^|=)/(?:[^=]*/)?(?=[^/])", r"\1", arg) for arg in sys.argv[1:]]
    return f"python -m bench.{Path(sys.argv[0]).stem} {shlex.join(args)}".strip()


def origin(kind: str, machine: Machine) -> dict[str, Any]:
    """Where a result's figures come from: its kind, the command, the date (UTC) and the machine."""
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    return {"kind": kind, "command": command_line(), "date": date, "machine": describe_machine(machine)}


def slug(device: str) -> str:
    """A device's name as file names have it."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_result(result: dict[str, Any], name: str) -> None:
    """Write bench/results/`name`.json and print its name; `DEVICE` in the name stands for the device's slug.

    `name` may be an absolute path.
    """
    path = RESULTS / f"{name.replace('DEVICE', slug(result['machine']['device']))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as f:
        f.write(json.dumps(result, indent=2, sort_keys=True).encode() + b"\n")
    print(f"\nwritten: {path.parent.name}/{path.name}")
