"""What the scripts of bench share: the machine's name, medians with their spread, result files, tables."""

import dataclasses
import json
import platform
import re
import shlex
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

import train
from configurator import ConfigError
from model import GPT
from robopoet import untrusted
from robopoet.errors import CheckpointError
from robopoet.machine import Machine
from robopoet.text import tokenizer
from robopoet.text.batches import EvalPlan, find_dataset, open_split, read_meta
from robopoet.training.evaluate import evaluate
from robopoet.training.start import Start, check_fit, complete

RESULTS = Path(__file__).parent / "results"


def describe_machine(machine: Machine) -> dict[str, Any]:
    """What a figure depends on beside the code: device, its memory (GB = 2**30 bytes; CUDA only), dtype, versions."""
    memory_gb = None
    if machine.device.type == "cuda":
        device = torch.cuda.get_device_properties(machine.device)
        name, memory_gb = device.name, round(device.total_memory / 2**30, 1)
    else:
        name = cpu_name() if machine.device.type == "cpu" else f"{platform.machine()} {machine.device.type}"
    return {
        "device": name,
        "memory_gb": memory_gb,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's model, as Linux tells it; elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def spread(values: list[float]) -> dict[str, float]:
    """The median of repeats and the least and greatest of them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def show(figure: dict[str, float], form: str = ",.0f") -> str:
    """A spread as text: the median, then the range in brackets."""
    return f"{figure['median']:{form}} ({figure['min']:{form}} to {figure['max']:{form}})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns padded so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


@dataclasses.dataclass(frozen=True)
class Record:
    """A line of metrics.jsonl, of a step or of an evaluation; what the other kind has is 0, or None."""

    kind: str = ""
    iter: untrusted.Count = 0
    loss: float | None = None  # nats per token
    bpb: Annotated[float, msgspec.Meta(ge=0)] | None = None  # bits per byte
    tokens: untrusted.Count = 0
    loss_by_style: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    tok_per_sec: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    peak_mem_mb: Annotated[float, msgspec.Meta(ge=0)] = 0.0


def read_records(out: Path) -> list[Record]:
    """The lines of a run's metrics.jsonl, but for a last one that is not whole yet; raises ConfigError."""
    path, records = out / "metrics.jsonl", []
    for number, line in enumerate(untrusted.read_bytes(path, ConfigError).splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            where = f"{path}: line {number}"
            records.append(untrusted.decode_json(line, Record, where, ConfigError, "take the line out, or train anew"))
    return records


def read_result(path: Path) -> dict[str, Any]:
    """A result that `write_result` wrote; raises ConfigError when it is none."""
    result = untrusted.read_json(path, dict[str, Any], ConfigError, "run its bench again")
    if not {"kind", "machine"} <= result.keys():
        raise ConfigError(f"{path}: is no result of a bench; remove it, or run its bench again")
    return result


def forget_peak(machine: Machine) -> None:
    """Have peak memory on a CUDA device count from here on, without what was freed before."""
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)


def config_name() -> str:
    """The last YAML file on the command line, without its ending."""
    return ([Path(arg).stem for arg in sys.argv[1:] if arg.endswith((".yaml", ".yml"))] or ["defaults"])[-1]


def train_command(cfg: train.TrainConfig, **changes: Any) -> list[str]:
    """The command that starts train.py afresh with the keys of `cfg` but for `changes`, and with no logger."""
    keys = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(train.TrainConfig)}
    keys |= {"init_from": "scratch", "eval_only": False, "tensorboard": False, "wandb": "off"} | changes
    # -u: a line comes when it is printed, as in a terminal
    return [sys.executable, "-u", train.__file__, *(f"--{key}={value}" for key, value in keys.items())]


def evaluate_checkpoint(
    saved: dict[str, Any], path: Path, model: GPT, split_name: str, machine: Machine
) -> dict[str, Any]:
    """train.evaluate on a whole split of the dataset that the checkpoint was trained on; `model` has its weights.

    Raises CheckpointError when the checkpoint does not say which that was, as nanoGPT's and Hugging Face's don't.
    """
    if not {"dataset", "batch_size"} <= saved.get("config", {}).keys():
        raise CheckpointError(f"{path}: does not say what it was trained on; name a checkpoint of train.py")
    start = Start(saved, path, resumes=False)
    cfg = complete(train.TrainConfig(eval_only=True), start)
    folder = find_dataset(cfg.dataset)
    meta = read_meta(folder)
    check_fit(start, cfg.dataset, cfg.optimizer, meta)
    split = open_split(folder, split_name, meta, cfg.block_size, machine.device)
    token_bytes = tokenizer.token_bytes(tokenizer.from_json(meta.tokenizer))
    return evaluate(model, split, token_bytes, EvalPlan(cfg.block_size, cfg.batch_size), machine)


def command_line() -> str:
    """The command that is running; an absolute path is cut to its last part, for it says nothing elsewhere."""
    args = [re.sub(r"(^|=)/(?:[^=]*/)?(?=[^/])", r"\1", arg) for arg in sys.argv[1:]]
    return f"python -m bench.{Path(sys.argv[0]).stem} {shlex.join(args)}".strip()


def origin(kind: str, machine: Machine) -> dict[str, Any]:
    """Where the figures of a result come from: its kind, the command, the date (UTC) and the machine."""
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    return {"kind": kind, "command": command_line(), "date": date, "machine": describe_machine(machine)}


def slug(device: str) -> str:
    """A device's name as it stands in the names of files."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_result(result: dict[str, Any], name: str) -> None:
    """Write bench/results/`name`.json and say so; `DEVICE` in the name stands for the device's.

    A name that is an absolute path is written there.
    """
    path = RESULTS / f"{name.replace('DEVICE', slug(result['machine']['device']))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.parent.name}/{path.name}")
