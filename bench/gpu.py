"""All that a GPU must show, in stages that stand alone; a second call takes up those that are missing or failed.

python -m bench.gpu --peer=PATH_TO_NANOGPT
python -m bench.gpu --stages=1,2 --minutes=9
python -m bench.gpu --device=cpu --quick        # the same stages, small: does the command itself work?
"""

import contextlib
import hashlib
import math
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import configurator
from bench import common, gpu_stages
from bench.common import markdown
from bench.gpu_stages import ROOT, Lab
from bench.peer import SCRIPTS
from configurator import ConfigError, bounds
from robopoet.machine import Machine, find_machine


@dataclass(frozen=True)
class Stage:
    """minutes: that it may well take. expected: of an H100, by arithmetic. needs: keys of what it works on."""

    run: Callable[[Lab], None]
    minutes: float
    expected: str
    needs: str = ""
    beside_peer: bool = False

    @property
    def name(self) -> str:
        """That of its function."""
        return self.run.__name__


ADAMW = "recorded, AdamW 1.1-1.6 ms, Muon 1.7-2.3 ms, under 1 GB; nanoGPT 2.5-5 ms"
WRITING = "recorded, a row: demo 0.5-0.9, GPT-2 0.9-1.4 ms a token; 32 rows: 30,000-60,000 tok/s"
GPT2 = "25-33 ms, MFU 40-53%, 9-13 GB; nanoGPT 1.0-1.25x slower"
STAGES = {  # quickest and most important first
    1: Stage(gpu_stages.cuda_tests, 6, "all pass"),
    2: Stage(gpu_stages.replays, 4, "losses as unrecorded and as eager; nothing compiled twice", "dataset"),
    3: Stage(gpu_stages.training_speed, 6, ADAMW, "dataset", beside_peer=True),
    4: Stage(gpu_stages.gpt2_speed, 6, GPT2, beside_peer=True),
    5: Stage(gpu_stages.writing_speed, 5, WRITING, "checkpoint", beside_peer=True),
    6: Stage(gpu_stages.modes, 5, "float16 as bfloat16; fits 8 GB, or advice in one line; a rank ends", "dataset"),
    7: Stage(gpu_stages.whole_run, 5, "val near 3.70 in a minute; over 1,000 tok/s, under 6 GB, under 5.0", "dataset"),
    8: Stage(gpu_stages.characters, 7.5, "val near 1.47, which nanoGPT reports", "char_dataset", beside_peer=True),
}
BINS = ("meta.json", "train.bin", "val.bin")
NEEDED = {  # a key -> the files that must be there, and the command that makes them
    "dataset": (BINS, "python prepare.py data/robopoet"),
    "char_dataset": (BINS, "python prepare.py data/shakespeare_char --tokenizer=char"),
    "checkpoint": (("",), "python train.py config/demo.yaml"),
}


@dataclass(frozen=True)
class GpuConfig:
    """The keys of bench.gpu."""

    # stages
    stages: str = ""  # their numbers, as 1,2,5 (all unless given)
    minutes: float = 0.0  # start no stage that may pass this budget (0: no budget)
    stage_minutes: float = 8.0  # a stage that takes longer is ended
    quick: bool = False  # small models and few steps, a test of the command itself: its figures mean nothing
    # what they work on
    peer: str = ""  # a checkout of nanoGPT, to stand beside ours
    dataset: str = "robopoet"  # the reference corpus, prepared
    char_dataset: str = "shakespeare_char"  # nanoGPT's corpus of characters, prepared
    checkpoint: str = "out/demo/best.pt"  # the model that writes
    # machine and results
    device: str = "cuda"  # cuda or cuda:N; with quick also cpu or mps
    results: str = ""  # folder of the results (bench/results, or with quick out/bench_gpu, unless given)

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        found = bounds(self, "minutes", 0) + bounds(self, "stage_minutes", 0.01)
        if not re.fullmatch(r"([1-8](,[1-8])*)?", self.stages):
            found.append(f"stages: found {self.stages!r}, must be numbers of 1 to 8, as 1,2,5")
        if not self.device.startswith("cuda") and not self.quick:
            found.append(f"device: found {self.device}, must be cuda; --device=cpu --quick tries the command itself")
        if self.peer and (lacks := [name for name in SCRIPTS if not (Path(self.peer) / name).is_file()]):
            found.append(f"peer: {self.peer} is no checkout of nanoGPT: it has no {lacks[0]}")
        return found

    @property
    def numbers(self) -> list[int]:
        """Those of the stages asked for."""
        return sorted(map(int, set(self.stages.split(",")))) if self.stages else list(STAGES)

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path(self.results or (ROOT / "out" / "bench_gpu" if self.quick else common.RESULTS)).resolve()

    def path(self, key: str) -> Path:
        """What a key of NEEDED names: as seen from here, or else from the project's folder."""
        given = Path(getattr(self, key))
        if (given / NEEDED[key][0][0]).is_file():
            return given.resolve()
        return ROOT / given if key == "checkpoint" else ROOT / "data" / given


def missing(stage: Stage, cfg: GpuConfig) -> str:
    """What the stage lacks, and the command that makes it; empty if nothing."""
    names, command = NEEDED.get(stage.needs, ((), ""))
    for path in (cfg.path(stage.needs) / name for name in names):
        if not path.is_file():
            return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}: not found; run `{command}` first"
    return ""


def sources() -> str:
    """A hash of the code that the stages run: results count while it stays as it is, committed or not."""
    sha, patterns = hashlib.sha256(), ("*.py", "robopoet/**/*.py", "bench/*.py", "config/*.yaml")
    for path in sorted({*(path for pattern in patterns for path in ROOT.glob(pattern)), ROOT / "tests/test_cuda.py"}):
        sha.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return sha.hexdigest()[:12]


def commit() -> str:
    """The commit that is checked out, empty where there is no git."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return ""


def perform(number: int, cfg: GpuConfig, machine: Machine, deadline: float) -> dict[str, Any]:
    """Run a stage until `deadline` at most; its result, whatever happens to it."""
    start, result = time.monotonic(), common.origin("gpu", machine)
    paths = [cfg.path(key) for key in NEEDED]
    peer = [f"--peer={Path(cfg.peer).resolve()}"] if cfg.peer else []
    with tempfile.TemporaryDirectory(prefix="bench_gpu_") as scratch:
        lab = Lab(cfg.device, result["machine"], cfg.quick, *paths, peer, cfg.folder, Path(scratch), deadline)
        error = missing(STAGES[number], cfg)
        try:
            if not error:
                STAGES[number].run(lab)
        except Exception as e:  # whatever it is, the next stage must have its turn
            error = gpu_stages.describe(e)
    result |= {"stage": number, "minutes": (time.monotonic() - start) / 60, "commit": commit(), "sources": sources()}
    result |= {"quick": cfg.quick, "beside_peer": bool(cfg.peer), "seen": "; ".join(lab.seen), "figures": lab.figures}
    result |= {"error": error, "checks": lab.checks, "estimates": lab.estimates}
    return result | ({"printed": lab.printed[-3000:].replace(f"{ROOT}/", "")} if is_failed(result) else {})


def is_failed(result: dict[str, Any]) -> bool:
    """Whether a stage came to an error, or something that must hold does not."""
    return bool(result["error"]) or not all(result["checks"].values())


def is_done(result: dict[str, Any], cfg: GpuConfig) -> bool:
    """Whether an earlier result stands: it passed, with the code as it is, and beside a peer if one is asked for."""
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
    return "passed" + (f", but not as reckoned: {'; '.join(off)}" if off else "")


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table that shows these results."""
    rows = []
    for r in sorted(results, key=lambda r: (r["machine"]["device"], r["stage"])):
        stage = STAGES[r["stage"]]
        row = [r["machine"]["device"], f"{r['stage']} {stage.name}", stage.expected, r["seen"], verdict(r)]
        rows.append([cell.replace("|", "/") for cell in row])
    return markdown(["Device", "Stage", "Expected", "Seen", "Verdict"], rows)


def main(cfg: GpuConfig) -> None:
    """Run the stages that are asked for and not done yet, print the table; exit code 1 if one has failed."""
    start, machine = time.monotonic(), find_machine(cfg.device, "auto")
    device = common.slug(common.describe_machine(machine)["device"])
    for number in cfg.numbers:
        if lacks := missing(STAGES[number], cfg):
            configurator.warn(f"stage {number}, {STAGES[number].name}, will fail: {lacks}")
    end, results, later = start + 60 * cfg.minutes if cfg.minutes else math.inf, [], []
    for number in cfg.numbers:
        stage, what = STAGES[number], f"stage {number}, {STAGES[number].name}"
        path = cfg.folder / f"gpu_{number}_{stage.name}_{device}.json"
        with contextlib.suppress(ConfigError):  # there is none, or it is damaged
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
