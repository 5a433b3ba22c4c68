"""The stages of bench.gpu, a function each; they run the project's own commands in processes of their own."""

import contextlib
import importlib.util
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import train
from bench import common
from robopoet.errors import ConfigError
from robopoet.training.history import Record, read_records

ROOT = Path(train.__file__).resolve().parent
QUICK = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=8", "--eval_iters=2"]
QUICK += ["--gradient_accumulation_steps=1", "--dtype=float32"]
ADVICE = "halve batch_size"  # what configurator.launch prints when memory runs out
UNCOMPILED = "uncompiled"  # in the warning of machine.compiled when it can't compile


class TimeUpError(ConfigError):
    """A stage ran out of time."""


@dataclass
class Lab:
    """What a stage works with, and what it has found so far, which stays if it fails.

    machine: as common.describe_machine returns it. data, characters: datasets to train on. checkpoint: the model that
    generates. peer: its argument, if there is one. deadline: by time.monotonic(). checks: what must hold -> whether it
    does. estimates: the same for what was estimated for an H100.
    """

    device: str
    machine: dict[str, Any]
    quick: bool
    data: Path
    characters: Path
    checkpoint: Path
    peer: list[str]
    results: Path
    scratch: Path
    deadline: float
    figures: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    estimates: dict[str, bool] = field(default_factory=dict)
    printed: str = ""  # by the last command

    def size(self, full: Any, quick: Any) -> Any:
        """`full`, or `quick` with --quick."""
        return quick if self.quick else full

    def estimate(self, text: str, holds: bool) -> None:
        """Note whether an estimate holds, if it was made for this card."""
        if "H100" in self.machine["device"] and not self.quick:
            self.estimates[text] = holds

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a stage: if it fails the stage fails, but its other parts still run."""
        try:
            yield
        except TimeUpError:
            raise
        except Exception as e:  # whatever it is
            self.checks[f"{name}: {describe(e)}"] = False

    def run(self, *command: str, **environment: str) -> int | None:
        """Run a Python command in the project's folder; returns its exit code, or None if the stage ran out of time.

        Every process that it started is ended by then; `printed` holds what they printed.
        """
        print(f"  python {' '.join(re.sub(r'=/.*/', '=', arg) for arg in command)}", flush=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        environment |= {"PYTHONUNBUFFERED": "1"}  # so that an error is the last line
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=os.environ | environment, start_new_session=True, **pipes
        )
        try:
            self.printed, _ = process.communicate(timeout=max(self.deadline - time.monotonic(), 0.1))
            return process.returncode
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun forwards the first to its ranks
                with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    os.killpg(process.pid, number)
                    self.printed, _ = process.communicate(timeout=10)
                    break
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def must_run(self, *command: str, **environment: str) -> None:
        """Like `run`, but raises ConfigError with the last line printed if it fails."""
        code = self.run(*command, **environment)
        if code is None:
            raise TimeUpError(f"time was up in {' '.join(command[:2])}")
        if code:
            raise ConfigError((self.printed.strip().splitlines() or [f"exit code {code}, and nothing printed"])[-1])

    def train(self, name: str, *args: str, launcher: tuple[str, ...] = ()) -> list[Record]:
        """Train the reference config in a folder called `name`; returns the run's records."""
        keys = [f"--dataset={self.data}", f"--out_dir={self.scratch / name}", f"--device={self.device}", *args]
        script = [*launcher, "train.py", "config/robopoet.yaml", *self.size([], QUICK)]
        self.must_run(*script, *keys, TORCH_LOGS="recompiles")
        return read_records(self.scratch / name)

    def bench(self, module: str, *args: str, keep: str = "") -> dict[str, Any]:
        """Run another bench and return its result; `keep` saves it among the results under that name."""
        name = f"{keep or module}_{common.slug(self.machine['device'])}"
        path = (self.results if keep else self.scratch) / f"{name}.json"
        self.must_run("-m", f"bench.{module}", *args, f"--device={self.device}", f"--out={path.with_suffix('')}")
        return common.read_result(path)

    def time_training(self, name: str, config: str, *args: str, keep: str = "") -> dict[str, Any]:
        """Run bench.train_speed; returns its result and notes it under `name`."""
        laps = self.size(["--steps=50"], [*QUICK, "--repeats=2", "--steps=2", "--warmup_steps=1"])
        result = self.bench("train_speed", f"config/{config}.yaml", *laps, *args, keep=keep)
        self.figures[name] = result
        if self.device.startswith("cuda"):
            self.checks[f"{name}: compiled"] = result["compiled"]
        self.seen.append(f"{name} {result['dt_ms']['median']:.2f} ms, {result['peak_mem_mb'] / 1024:.1f} GB")
        for peer, its in result["peers"].items():
            self.seen.append(f"{peer} {its['dt_ms']['median']:.2f} ms, {its['peak_mem_mb'] / 1024:.1f} GB")
        return result


def describe(e: Exception) -> str:
    """An exception in one line."""
    return " ".join((str(e) if isinstance(e, ConfigError) else f"{type(e).__name__}: {e}").split())[:300]


def losses(records: list[Record]) -> dict[int, float]:
    """The loss of each step of a run."""
    return {r.iter: r.loss for r in records if r.kind == "train" and r.loss is not None}


def furthest(these: dict[int, float], those: dict[int, float]) -> float:
    """The largest relative difference between two runs' losses at the same step; inf if one lacks a step."""
    if these.keys() != those.keys():
        return float("inf")
    return max((abs(these[step] - those[step]) / those[step] for step in those), default=float("inf"))


# ---------------------------------------------------------------------------------------------------------------------
# the stages


def cuda_tests(lab: Lab) -> None:
    """Run tests/test_cuda.py."""
    if importlib.util.find_spec("pytest") is None:
        raise ConfigError("pytest is not installed here; pip install pytest")
    code = lab.run("-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "--tb=short", "tests/test_cuda.py")
    found = Counter(re.findall(r"::\S+ (PASSED|FAILED|ERROR|SKIPPED)", lab.printed))
    lab.figures |= {"counts": dict(found), "failures": re.findall(r"^(?:FAILED|ERROR) \S+.*$", lab.printed, re.M)}
    lab.seen.append(", ".join(f"{count} {name.lower()}" for name, count in found.items()) or "no test was run")
    if not lab.device.startswith("cuda"):
        lab.seen = ["skipped: no CUDA"]
        lab.checks["tests are found"] = code == 0
        return
    lab.checks |= {"all in time": code is not None, "all pass": code == 0 and found["PASSED"] > 0}


def replays(lab: Lab) -> None:
    """The reference run, eager, compiled and recorded; each evaluates, saves and samples, the last also resumes."""
    steps, until, warmup = lab.size((40, 17, 10), (6, 4, 2))
    keys = [f"--lr_decay_iters={steps}", f"--warmup_iters={warmup}", "--log_interval=1", "--tensorboard=true"]
    keys += [f"--eval_interval={lab.size(5, 3)}", "--eval_iters=10"]
    recompiled = uncompiled = 0
    runs: dict[str, dict[int, float]] = {}
    for name, more, end in (
        ("eager_still", ["--compile=false", "--dropout=0"], steps),
        ("compiled_still", ["--dropout=0"], steps),
        ("compiled", [], steps),
        ("recorded", ["--record=true"], until),
        ("recorded", ["--record=true", "--init_from=resume"], steps),
    ):
        records = lab.train(name, *keys, f"--max_iters={end}", *more)
        runs[name] = losses(records)
        recompiled += lab.printed.count("Recompiling function")
        uncompiled += lab.printed.count(UNCOMPILED)
        lab.figures[name] = {"losses": runs[name], "val": [r.loss for r in records if r.kind == "eval"]}
    for what, one, other in (
        ("compiled as eager", "compiled_still", "eager_still"),
        ("recorded and resumed as neither", "recorded", "compiled"),
    ):
        far = furthest(runs[one], runs[other])
        lab.checks[f"{what}, to 2%"] = far < 0.02 and len(runs[one]) == steps
        lab.seen.append(f"{what}: losses differ by {far:.2%}")
    lab.checks |= {"nothing compiled twice": not recompiled, "compiled at all": not uncompiled}
    lab.seen.append(f"{recompiled} recompilations")


def training_speed(lab: Lab) -> None:
    """The reference model with AdamW and Muon, recorded and not, beside nanoGPT and reduce-overhead."""
    all_four = [("AdamW", False), ("AdamW", True), ("Muon", False), ("Muon", True)]
    for name, recorded in lab.size(all_four, [("AdamW", False), ("Muon", True)]):
        config = "robopoet" if name == "Muon" else "robopoet_adamw"
        how = f"{name}{', recorded' * recorded}"
        more = [f"--dataset={lab.data}", f"--record={recorded}", f"--start={not recorded and not lab.quick}"]
        more += lab.peer if how == "AdamW" else []
        with lab.part(how):
            result = lab.time_training(how, config, *more, keep=f"train_speed_{config}{'_recorded' * recorded}")
            if recorded:
                lab.estimate(f"{how} under 2.5 ms", result["dt_ms"]["median"] < 2.5)
                lab.estimate(f"{how} under 1 GB", result["peak_mem_mb"] < 1024)
    if lab.device.startswith("cuda"):
        more = [f"--dataset={lab.data}", "--start=false", "--compile=true", "--compile_mode=reduce-overhead"]
        with lab.part("AdamW, reduce-overhead"):
            lab.time_training("AdamW, reduce-overhead", "robopoet_adamw", *more)


def gpt2_speed(lab: Lab) -> None:
    """GPT-2 124M on random ids, 12 rows of 1,024 tokens a step, beside nanoGPT with its own vocabulary."""
    rows = 12 if (lab.machine["memory_gb"] or 0) >= 16 else 4  # a smaller card takes three micro-batches
    shape = [f"--batch_size={rows}", f"--gradient_accumulation_steps={12 // rows}", "--vocab_size=50257"]
    shape = lab.size([*shape, "--repeats=3", "--steps=10"], ["--vocab_size=300"])
    for recorded in lab.size((False, True), (False,)):
        name, first = "recorded" if recorded else "unrecorded", not recorded
        more = [f"--record={recorded}", f"--start={first and not lab.quick}", *(lab.peer if first else [])]
        with lab.part(name):
            result = lab.time_training(name, "gpt2", *shape, *more, keep=f"train_speed_gpt2{'_recorded' * recorded}")
            lab.seen.append(f"MFU {result['mfu']['median']:.0%}")
            lab.estimate(f"{name}: MFU over 35%", result["mfu"]["median"] > 0.35)


def writing_speed(lab: Lab) -> None:
    """The demo and GPT-2's shape, one row and 32, recorded and not, beside nanoGPT."""
    few = ["--prompt=to be", "--batch_size=2", "--max_new_tokens=4", "--long_tokens=8", "--check_tokens=4"]
    few += ["--repeats=1"]
    all_four = [("demo", False), ("demo", True), ("gpt2", False), ("gpt2", True)]
    for model, recorded in lab.size(all_four, [("demo", False)]):
        name, shape = f"{model}{'_recorded' * recorded}", "checkpoint" if model == "demo" else model
        args = [str(lab.checkpoint), f"--shape={shape}", f"--record={recorded}", *lab.size([], few)]
        args += [f"--starts={lab.size(3, 0)}", *lab.peer] if not recorded else ["--starts=0"]
        with lab.part(name):
            result = lab.bench("sample_speed", *args, keep=f"sample_speed_{name}")
            one, many = (case["speed"]["RoboPoet"]["median"] for case in result["cases"][:2])
            lab.figures[name] = result
            lab.seen.append(f"{name} {1000 / one:.2f} ms a token, {many:,.0f} tok/s")
            lab.checks[f"{name}: the same text by all"] = result["same_text"]
            if recorded:
                lab.estimate(f"{name} under 1.5 ms a token", 1000 / one < 1.5)


def modes(lab: Lab) -> None:
    """float16 beside bfloat16; what fits into 8 GB; one rank under torchrun."""
    keys, twenty = [f"--dataset={lab.data}", "--start=false"], lab.size(["--steps=4", "--repeats=5"], [])
    with lab.part("float16"):
        its, ours = (
            lab.time_training(dtype, "robopoet", *keys, *twenty, f"--dtype={dtype}")
            for dtype in ("bfloat16", "float16")
        )
        far = furthest(*(dict(enumerate(result["repeats_loss"])) for result in (ours, its)))
        lab.checks["float16's losses as bfloat16's, to 5%"] = far < 0.05
        lab.seen.append(f"losses differ by {far:.1%}, scale {ours['loss_scales'][-1]:g}")
        lab.estimate("float16 as fast as bfloat16, to 10%", ours["dt_ms"]["median"] < 1.1 * its["dt_ms"]["median"])
    with lab.part("the reference in 8 GB"):
        result = lab.time_training("reference in 8 GB", "robopoet", *keys, "--vram_limit_gb=8")
        lab.checks["the reference in 8 GB: under 6 GB"] = result["peak_mem_mb"] < 6 * 1024
    with lab.part("GPT-2 in 8 GB"):
        few = lab.size(["--vocab_size=50257", "--repeats=1", "--steps=3"], ["--vocab_size=300"])
        for count in (1, 2, 4, 12):  # follows the advice until it fits
            rows = [f"--batch_size={12 // count}", f"--gradient_accumulation_steps={count}"]
            name = f"GPT-2 in 8 GB, {count} x {12 // count} rows"
            try:
                lab.time_training(name, "gpt2", *few, *rows, "--start=false", "--vram_limit_gb=8")
                break
            except ConfigError as e:
                if ADVICE not in str(e) or "Traceback" in lab.printed or count == 12:
                    raise
                lab.seen.append(f"{name}: out of memory, one line of advice")
    with lab.part("one rank"):
        steps, launcher = lab.size(20, 4), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
        found = losses(
            lab.train("rank", f"--max_iters={steps}", "--warmup_iters=2", "--log_interval=1", launcher=launcher)
        )
        lab.checks["one rank comes to its end"] = len(found) == steps
        lab.seen.append(f"one rank: loss {found[steps]:.3f} after {steps} steps")


def whole_run(lab: Lab) -> None:
    """The reference run from start to end, as configured and recorded, compared with its targets."""
    few = lab.size([], ["--max_iters=8", "--warmup_iters=2", "--eval_interval=4", "--log_interval=1"])
    for name, more in (("as_configured", []), ("recorded", ["--record=true"]))[: lab.size(2, 1)]:
        with lab.part(name):
            start = time.perf_counter()
            records = lab.train(name, *few, *more)
            wall_s = time.perf_counter() - start
            steps, evals = ([r for r in records if r.kind == kind] for kind in ("train", "eval"))
            val = min(r.loss for r in evals if r.loss is not None)
            speed, peak = statistics.median(r.tok_per_sec for r in steps), max(r.peak_mem_mb for r in steps)
            lab.figures[name] = {"val": val, "tok_per_sec": speed, "peak_mem_mb": peak, "wall_s": wall_s}
            lab.figures[name] |= {"training_s": steps[-1].seconds, "curve": {r.iter: r.loss for r in evals}}
            lab.seen.append(f"{name}: val {val:.3f}, {wall_s:,.0f} s, {speed:,.0f} tok/s, {peak / 1024:.1f} GB")
            lab.checks |= {f"{name}: under 6 GB": peak < 6 * 1024}
            targets = {f"{name}: over 1,000 tokens/s": speed > 1000, f"{name}: val under 5.0": val < 5.0}
            lab.checks |= lab.size(targets, {})
            lab.estimate(f"{name}: val under 3.75", val < 3.75)


def characters(lab: Lab) -> None:
    """nanoGPT's run on characters, 10.7M parameters: with Muon, with its own recipe, and by nanoGPT itself."""
    keys = [f"--dataset={lab.characters}"]
    keys += lab.size([], [*QUICK, "--max_iters=4", "--warmup_iters=1", "--eval_interval=2"])
    muon = ["--optimizer=muon", "--learning_rate=1e-2", "--min_lr=0", "--beta1=0.8", "--max_iters=2000"]
    peer = list(lab.peer)
    if peer:
        small = " --compile=False --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=8 --dtype=float32"
        its = f"config/train_shakespeare_char.py --device={lab.device} --max_iters={lab.size('5000', '4' + small)}"
        peer += [f"--peer_args={its}", f"--peer_evals={lab.size(20, 2)}"]
    both = ("Muon", muon, "_muon"), ("nanoGPT's recipe", peer, "")
    for name, more, kept in lab.size(both, both[1:]):
        with lab.part(name):
            config = "config/shakespeare_char.yaml"
            result = lab.bench("learn", config, *keys, *more, keep=f"learn_shakespeare_char{kept}")
            lab.figures[name] = result
            for who, side in ((name, result["ours"]), ("nanoGPT", result["peer"])):
                if side:
                    lab.seen.append(f"{who}: {side['loss']['median']:.4f} after {side['seconds']['median']:,.0f} s")
            lab.estimate(f"{name}: val under 1.50", result["ours"]["loss"]["median"] < 1.50)
