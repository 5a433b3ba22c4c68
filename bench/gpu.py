"""All that a GPU must show, in independent stages; another call runs the ones that are missing or failed.

python -m bench.gpu --peer=PATH_TO_NANOGPT
python -m bench.gpu --stages=1,2 --minutes=9
python -m bench.gpu --device=cpu --quick        # small models: tests the command itself

It prints what was expected beside what it saw, and downloads nothing; it needs data/robopoet and data/shakespeare_char
prepared, and out/demo/best.pt. A stage takes at most eight minutes.
"""

import contextlib
import hashlib
import math
import re
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configurator
from bench import common, gpu_stages
from bench.gpu_stages import ROOT, Lab
from bench.peer import SCRIPTS
from robopoet.errors import ConfigError, bounds, warn
from robopoet.machine import Machine, find_machine


@dataclass(frozen=True)
class Stage:
    """A stage. minutes: how long it may take. expected: on an H100, by arithmetic. needs: a key of NEEDED, if any."""

    run: Callable[[Lab], None]
    minutes: float
    expected: str
    needs: str = ""
    beside_peer: bool = False

    @property
    def name(self) -> str:
        """The name of its function."""
        return self.run.__name__


ADAMW = "recorded, AdamW 1.1-1.6 ms, Muon 1.7-2.3 ms, under 1 GB; nanoGPT 2.5-5 ms"
WRITING = "recorded, one row: demo 0.5-0.9, GPT-2 0.9-1.4 ms a token; 32 rows: 30,000-60,000 tok/s"
GPT2 = "25-33 ms, MFU 40-53%, 9-13 GB; nanoGPT 1.0-1.25x slower"
STAGES = {  # quickest and most important first
    1: Stage(gpu_stages.cuda_tests, 6, "all pass"),
    2: Stage(gpu_stages.replays, 4, "same losses recorded, unrecorded and eager; nothing compiled twice", "dataset"),
    3: Stage(gpu_stages.training_speed, 6, ADAMW, "dataset", beside_peer=True),
    4: Stage(gpu_stages.gpt2_speed, 6, GPT2, beside_peer=True),
    5: Stage(gpu_stages.writing_speed, 5, WRITING, "checkpoint", beside_peer=True),
    6: Stage(gpu_stages.modes, 5, "float16 as bfloat16; fits 8 GB, or one line of advice; one rank ends", "dataset"),
    7: Stage(gpu_stages.whole_run, 5, "val near 3.70 in a minute; over 1,000 tok/s, under 6 GB, under 5.0", "dataset"),
    8: Stage(gpu_stages.characters, 7.5, "val near 1.47, which nanoGPT reports", "char_dataset", beside_peer=True),
}
BINS = ("meta.json", "train.bin", "val.bin")
NEEDED = {  # a key -> the files that must exist, and the command that makes them
    "dataset": (BINS, "python prepare.py data/robopoet"),
    "char_dataset": (BINS, "python prepare.py data/shakespeare_char --tokenizer=char"),
    "checkpoint": (("",), "python train.py config/demo.yaml"),
}


@dataclass(frozen=True)
class GpuConfig:
    """The keys of bench.gpu."""

    # stages
    stages: str = ""  # their numbers, such as 1,2,5 (all unless given)
    minutes: float = 0.0  # budget; a stage that may exceed it is not started (0: no budget)
    stage_minutes: float = 8.0  # a stage that takes longer is stopped
    quick: bool = False  # small models and few steps, to test the command itself; the figures mean nothing
    # what they work on
    peer: str = ""  # a checkout of nanoGPT to compare with
    dataset: str = "robopoet"  # the reference corpus, prepared
    char_dataset: str = "shakespeare_char"  # nanoGPT's corpus of characters, prepared
    checkpoint: str = "out/demo/best.pt"  # the model that generates
    # machine and results
    device: str = "cuda"  # cuda or cuda:N; with quick also cpu or mps
    results: str = ""  # folder of the results (bench/results, or with quick out/bench_gpu, unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = bounds(self, "minutes", 0) + bounds(self, "stage_minutes", 0.01)
        if not re.fullmatch(r"([1-8](,[1-8])*)?", self.stages):
            found.append(f"stages: found {self.stages!r}, must be numbers from 1 to 8, such as 1,2,5")
        if not self.device.startswith("cuda") and not self.quick:
            found.append(f"device: found {self.device}, must be cuda; --device=cpu --quick tries the command itself")
        if self.peer and (lacks := [name for name in SCRIPTS if not (Path(self.peer) / name).is_file()]):
            found.append(f"peer: {self.peer} is not a checkout of nanoGPT: it has no {lacks[0]}")
        return found

    @property
    def numbers(self) -> list[int]:
        """The numbers of the stages asked for."""
        return sorted(map(int, set(self.stages.split(",")))) if self.stages else list(STAGES)

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path(self.results or (ROOT / "out" / "bench_gpu" if self.quick else common.RESULTS)).resolve()

    def path(self, key: str) -> Path:
        """The path that a key of NEEDED names: from here if it exists, else from the project's folder."""
        given = Path(getattr(self, key))
        if (given / NEEDED[key][0][0]).is_file():
            return given.resolve()
        return ROOT / given if key == "checkpoint" else ROOT / "data" / given


def missing(stage: Stage, cfg: GpuConfig) -> str:
    """The file that the stage lacks and the command that makes it; empty if it lacks nothing."""
    names, command = NEEDED.get(stage.needs, ((), ""))
    for path in (cfg.path(stage.needs) / name for name in names):
        if not path.is_file():
            return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}: not found; run `{command}` first"
    return ""


def sources() -> str:
    """A hash of the code that the stages run; results count until it changes, committed or not."""
    sha, patterns = hashlib.sha256(), ("*.py", "robopoet/**/*.py", "bench/*.py", "config/*.yaml")
    for path in sorted({*(path for pattern in patterns for path in ROOT.glob(pattern)), ROOT / "tests/test_cuda.py"}):
        sha.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def commit() -> str:
    """The commit that is checked out; empty without git."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return ""


def perform(number: int, cfg: GpuConfig, machine: Machine, deadline: float) -> dict[str, Any]:
    """Run a stage until `deadline` at most; returns its result, even if it fails."""
    start, result = time.monotonic(), common.origin("gpu", machine)
    paths = [cfg.path(key) for key in NEEDED]
    peer = [f"--peer={Path(cfg.peer).resolve()}"] if cfg.peer else []
    with tempfile.TemporaryDirectory(prefix="bench_gpu_") as scratch:
        lab = Lab(cfg.device, result["machine"], cfg.quick, *paths, peer, cfg.folder, Path(scratch), deadline)
        error = missing(STAGES[number], cfg)
        try:
            if not error:
                STAGES[number].run(lab)
        except Exception as e:  # whatever it is: the next stage must run
            error = gpu_stages.describe(e)
    result |= {"stage": number, "minutes": (time.monotonic() - start) / 60, "commit": commit(), "sources": sources()}
    result |= {"quick": cfg.quick, "beside_peer": bool(cfg.peer), "seen": "; ".join(lab.seen), "figures": lab.figures}
    result |= {"error": error, "checks": lab.checks, "estimates": lab.estimates}
    return result | ({"printed": lab.printed[-3000:].replace(f"{ROOT}/", "")} if is_failed(result) else {})


def is_failed(result: dict[str, Any]) -> bool:
    """Whether a stage ended in an error, or one of its checks failed."""
    return bool(result["error"]) or not all(result["checks"].values())


def is_done(result: dict[str, Any], cfg: GpuConfig) -> bool:
    """Whether an earlier result still counts: it passed, with this code, and with a peer if one is asked for."""
    if (result.get("sources"), result.get("quick")) != (sources(), cfg.quick) or is_failed(result):
        return False
    return result["beside_peer"] or not (cfg.peer and STAGES[result["stage"]].beside_peer)


def verdict(result: dict[str, Any]) -> str:
    """A stage's result in a few words."""
    if is_failed(result):
        wrong = [what for what, holds in result["checks"].items() if not holds]
        return "FAILED: " + "; ".join([*wrong, *filter(None, [result["error"]])])
    if result["seen"].startswith("skipped"):
        return "skipped"
    off = [what for what, holds in result["estimates"].items() if not holds]
    return "passed" + (f", but off the estimate: {'; '.join(off)}" if off else "")


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown list of these results: each stage's verdict, what was expected and what was seen."""
    items = []
    for r in sorted(results, key=lambda r: (r["machine"]["device"], r["stage"])):
        stage = STAGES[r["stage"]]
        items.append(f"- **{r['stage']} {stage.name}** ({r['machine']['device']}): {verdict(r)}")
        items += [f"  - {name}: {text}" for name, text in (("expected", stage.expected), ("seen", r["seen"])) if text]
    return "\n".join(
        textwrap.fill(item, 100, subsequent_indent=" " * (item.index("-") + 2), break_long_words=False)
        for item in items
    )


def main(cfg: GpuConfig) -> None:
    """Run the stages that are asked for and not done yet, and print a summary; exit code 1 if one failed."""
    start, machine = time.monotonic(), find_machine(cfg.device, "auto")
    device = common.slug(common.describe_machine(machine)["device"])
    for number in cfg.numbers:
        if lacks := missing(STAGES[number], cfg):
            warn(f"stage {number}, {STAGES[number].name}, will fail: {lacks}")
    end, results, later = start + 60 * cfg.minutes if cfg.minutes else math.inf, [], []
    for number in common.progress(cfg.numbers, "stages"):
        stage, what = STAGES[number], f"stage {number}, {STAGES[number].name}"
        path = cfg.folder / f"gpu_{number}_{stage.name}_{device}.json"
        with contextlib.suppress(ConfigError):  # none, or damaged
            if is_done(before := common.read_result(path), cfg):
                print(f"{what}: done before")
                results.append(before)
                continue
        now, minutes = time.monotonic(), 0.5 if cfg.quick else stage.minutes
        if now + 60 * minutes > end:
            later.append(f"{number}")
            continue
        print(f"{what}: {stage.expected}", flush=True)
        results.append(perform(number, cfg, machine, min(end, now + 60 * cfg.stage_minutes)))
        common.write_result(results[-1], str(path.with_suffix("")))
        print(f"{what}: {verdict(results[-1])} ({results[-1]['minutes']:.1f} min)\n", flush=True)
    print(table(results))
    if later:
        print(f"\nno minutes left for --stages={','.join(later)}")
    if any(map(is_failed, results)):
        raise SystemExit(1)


if __name__ == "__main__":
    configurator.launch(main, GpuConfig)
