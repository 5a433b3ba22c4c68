"""bench.gpu where there is no GPU: each command that it would run exists, and whatever fails, the rest is run."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import configurator
import train
from bench import common, gpu, gpu_stages, learn, sample_speed, table, train_speed
from bench.gpu import GpuConfig, Stage
from bench.gpu_stages import Lab
from robopoet.errors import ConfigError
from robopoet.machine import Machine

ROOT = Path(gpu.__file__).parents[1]
H100 = {"device": "NVIDIA H100 80GB HBM3", "memory_gb": 79.1, "dtype": "bfloat16", "threads": 8, "torch": "2.13.0"}
BENCHES = {"train_speed": (train_speed.SpeedConfig, None), "learn": (learn.LearnConfig, None)}
BENCHES["sample_speed"] = (sample_speed.SampleSpeedConfig, "checkpoint")
SPEED = {"dt_ms": common.spread([1.5]), "tok_per_sec": common.spread([2.7e6]), "mfu": common.spread([0.45])}
SPEED |= {
    "peak_mem_mb": 900.0,
    "peers": {},
    "repeats_loss": [8.0, 7.5],
    "loss_scales": [65536.0, 65536.0],
    "compiled": True,
}
CASES = [{"speed": {"RoboPoet": common.spread([speed])}} for speed in (1000.0, 40_000.0, 900.0)]
SIDE = {"loss": common.spread([1.47]), "seconds": common.spread([90.0]), "curves": []}
CANNED = {
    "train_speed": SPEED,
    "sample_speed": {"cases": CASES, "same_text": True},
    "learn": {"ours": SIDE, "peer": SIDE},
}
TESTS = "tests/test_cuda.py::test_a[adamw-bfloat16] PASSED [ 50%]\ntests/test_cuda.py::test_b SKIPPED [100%]\n"


@pytest.fixture
def peer(tmp_path):
    folder = tmp_path / "nanoGPT"
    folder.mkdir()
    for name in ("train.py", "model.py", "configurator.py"):
        (folder / name).write_text("")
    return folder


@pytest.fixture
def h100(tmp_path, books, monkeypatch):
    """A machine that claims to be an H100, on which every command is well formed, or raises, and ends as `ends` has it.

    Returns the keys that bench.gpu needs, the commands it runs, and `ends`: part of a command -> exit code, text.
    """
    (tmp_path / "best.pt").write_text("")
    commands, ends = [], {}

    def run(lab: Lab, *command: str, **environment: str) -> int | None:
        line = " ".join(command)
        commands.append(line)
        code, lab.printed = next((end for part, end in ends.items() if part in line), (0, TESTS))
        if "pytest" in command:
            return code
        script = next(i for i, arg in enumerate(command) if arg == "train.py" or arg.startswith("bench."))
        name = command[script].removeprefix("bench.")
        cls, positional = BENCHES.get(name, (train.TrainConfig, None))
        cfg = configurator.parse(cls, list(command[script + 1 :]), positional)
        assert cfg.device == "cuda"
        if code == 0 and name == "train.py":
            records = [
                {"kind": "train", "iter": i, "loss": 8.0, "tok_per_sec": 2e6} for i in range(1, cfg.max_iters + 1)
            ]
            records.append({"kind": "eval", "iter": cfg.max_iters, "loss": 3.7, "bpb": 1.6})
            Path(cfg.out_dir).mkdir(exist_ok=True)
            text = "".join(json.dumps(record | {"seconds": 9.0}) + "\n" for record in records)
            (Path(cfg.out_dir) / "metrics.jsonl").write_text(text)
        elif code == 0:
            common.write_result({"kind": name, "machine": H100} | CANNED[name], cfg.out)
        return code

    monkeypatch.chdir(ROOT)  # where the commands run
    monkeypatch.setattr(Lab, "run", run)
    monkeypatch.setattr(common, "describe_machine", lambda machine: H100)
    monkeypatch.setattr(gpu, "find_machine", lambda *args: Machine(torch.device("cuda"), torch.bfloat16))
    keys = {"dataset": str(books), "char_dataset": str(books), "checkpoint": str(tmp_path / "best.pt")}
    return GpuConfig(**keys, results=str(tmp_path / "results")), commands, ends


def results(cfg: GpuConfig) -> dict[int, dict]:
    return {r["stage"]: r for r in (json.loads(path.read_text()) for path in cfg.folder.glob("gpu_*.json"))}


def test_on_a_gpu_every_stage_runs_commands_that_exist(h100, peer, capsys):
    cfg, commands, _ = h100
    gpu.main(dataclasses.replace(cfg, peer=str(peer)))
    found = results(cfg)
    assert sorted(found) == list(range(1, 9))
    for number, result in found.items():
        assert gpu.verdict(result) == "passed" and result["seen"], result
        assert result["checks"] or number == 8
        assert result["kind"] == "gpu" and result["machine"] == H100 and len(result["sources"]) == 12
        assert len(result["commit"]) in (0, 40) and gpu.STAGES[number].expected in " ".join(gpu.table([result]).split())
    assert any(found[number]["estimates"] for number in (3, 4, 5, 6, 7, 8))
    count = lambda *parts: sum(all(part in line for part in parts) for line in commands)  # noqa: E731
    assert count("config/robopoet.yaml", "--record=True") == 1 and count("train.py", "--record=true") == 3
    assert count("--compile_mode=reduce-overhead") == 1 and count("gpt2.yaml", "--vocab_size=50257") == 3
    assert count("--dtype=float16") == 1 and count("--vram_limit_gb=8") == 2 and count("torch.distributed.run") == 1
    assert count("--init_from=resume", "--tensorboard=true") == 1 and count("--compile=false") == 1
    assert count("sample_speed", "--shape=gpt2") == 2 and count("peer_args=config/train_shakespeare_char.py") == 1
    assert count(f"--peer={peer}") == 5  # AdamW, GPT-2, both models that write, characters
    names = {path.name.split("_nvidia")[0] for path in cfg.folder.glob("*.json")}
    assert {
        "train_speed_robopoet_adamw_recorded",
        "train_speed_gpt2",
        "sample_speed_demo",
        "learn_shakespeare_char",
    } < names
    out, _ = capsys.readouterr()
    assert "1 passed, 1 skipped" in out and "- **8 characters** (NVIDIA H100 80GB HBM3): passed" in out


def test_a_second_call_takes_up_what_failed_is_missing_or_lacks_the_peer(h100, peer, capsys):
    cfg, commands, ends = h100
    ends["config/gpt2.yaml"] = 2, "Traceback\ntrain_speed.py: it broke | here"
    with pytest.raises(SystemExit) as end:
        gpu.main(dataclasses.replace(cfg, stages="1,3,4"))
    assert end.value.code == 1
    assert [gpu.verdict(result)[:6] for _, result in sorted(results(cfg).items())] == ["passed", "passed", "FAILED"]
    assert "it broke | here" in capsys.readouterr().out and "it broke" in results(cfg)[4]["printed"]
    ends.clear()
    commands.clear()
    gpu.main(dataclasses.replace(cfg, stages="1,3,4,8"))
    assert not any("-m pytest" in line or "config/robopoet" in line for line in commands)
    assert sum("gpt2" in line for line in commands) == 2 and sum("shakespeare_char" in line for line in commands) == 2
    commands.clear()
    gpu.main(dataclasses.replace(cfg, stages="1,3,4,8"))
    assert not commands and "characters: done before" in capsys.readouterr().out
    gpu.main(dataclasses.replace(cfg, stages="1,4", peer=str(peer)))
    assert commands and all("gpt2" in line for line in commands)


def test_a_change_of_the_code_has_every_stage_run_again(h100, monkeypatch):
    cfg, commands, _ = h100
    gpu.main(dataclasses.replace(cfg, stages="1"))
    monkeypatch.setattr(gpu, "sources", lambda: "another")
    gpu.main(dataclasses.replace(cfg, stages="1"))
    assert len(commands) == 2
    next(cfg.folder.glob("gpu_1_*")).write_text('{"kind": "gpu", "machine": {}}')  # a result that lacks most
    gpu.main(dataclasses.replace(cfg, stages="1"))
    assert len(commands) == 3


def test_a_stage_that_fails_or_lacks_its_files_does_not_stop_the_next(h100, monkeypatch, capsys):
    cfg, *_ = h100

    def breaks(lab):
        lab.seen.append("half of it")
        with lab.part("the half that broke"):
            raise KeyError("x")
        lab.figures["kept"] = 1
        raise RuntimeError("CUDA error:\nan illegal memory access")

    def works(lab):
        lab.checks["it holds"] = True

    monkeypatch.setattr(
        gpu, "STAGES", {1: Stage(breaks, 1, ""), 2: Stage(works, 1, "", "checkpoint"), 3: Stage(works, 1, "")}
    )
    missing = str(ROOT / "out" / "none.pt")
    with pytest.raises(SystemExit):
        gpu.main(dataclasses.replace(cfg, checkpoint=missing))
    found = results(cfg)
    assert found[1]["figures"] == {"kept": 1} and found[1]["seen"] == "half of it"
    assert gpu.verdict(found[1]).startswith(
        "FAILED: the half that broke: KeyError: 'x'; RuntimeError: CUDA error: an ill"
    )
    assert found[2]["error"] == "out/none.pt: not found; run `python train.py config/demo.yaml` first"
    assert gpu.verdict(found[3]) == "passed"
    assert "warning: stage 2, works, will fail: out/none.pt: not found" in capsys.readouterr().err


def test_no_stage_is_begun_that_may_pass_the_budget(h100, capsys):
    cfg, *_ = h100
    gpu.main(dataclasses.replace(cfg, stages="1,2,3", minutes=4.5))
    assert sorted(results(cfg)) == [2]
    assert "no minutes left for --stages=1,3" in capsys.readouterr().out


def make_lab(tmp_path, **changes) -> Lab:
    keys = dict.fromkeys(("data", "characters", "checkpoint", "results", "scratch"), tmp_path)
    keys |= {"device": "cuda", "machine": H100, "quick": False, "peer": [], "deadline": time.monotonic() + 60}
    return Lab(**keys | changes)


@pytest.mark.slow
def test_when_its_time_is_up_all_that_a_stage_started_is_ended(tmp_path):
    lab = make_lab(tmp_path, deadline=time.monotonic() + 8)
    child = "import time; print('child', flush=True); time.sleep(300)"
    parent = f"import subprocess, sys; print('here', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    with pytest.raises(gpu_stages.TimeUpError, match="time was up"), lab.part("a part"):
        lab.must_run("-c", parent)
    assert time.monotonic() - start < 60 and lab.printed == "here\nchild\n"
    assert child not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    lab.deadline += 60
    with pytest.raises(ConfigError, match=r"^the last line$"):
        lab.must_run("-c", "print('the first'); raise SystemExit('the last line')")
    with pytest.raises(ConfigError, match="exit code 7"):
        lab.must_run("-c", "raise SystemExit(7)")


@pytest.mark.parametrize(
    ("printed", "code", "passes", "seen"),
    [
        (TESTS, 0, True, "1 passed, 1 skipped"),
        (
            TESTS.replace("SKIPPED", "FAILED") + "FAILED tests/test_cuda.py::test_b - AssertionError",
            1,
            False,
            "1 failed",
        ),
        (TESTS, None, False, "1 passed"),  # the time was up: what is known so far
        ("no tests ran", 5, False, "no test was run"),
    ],
)
def test_counts_of_the_cuda_tests(h100, tmp_path, printed, code, passes, seen):
    h100[2]["pytest"] = code, printed
    lab = make_lab(tmp_path)
    gpu_stages.cuda_tests(lab)
    assert all(lab.checks.values()) == passes and seen in lab.seen[0]
    assert lab.figures["failures"] == (
        ["FAILED tests/test_cuda.py::test_b - AssertionError"] if "1 failed" in seen else []
    )


def test_without_pytest_the_stage_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install pytest"):
        gpu_stages.cuda_tests(make_lab(tmp_path))


def test_losses_that_differ_and_a_recompilation_are_found(h100, books, tmp_path):
    h100[2]["--compile=false"] = 0, "[0/1] [__recompiles] Recompiling function forward in model.py:1"
    lab = make_lab(tmp_path, data=books)
    gpu_stages.replays(lab)
    assert [what for what, holds in lab.checks.items() if not holds] == ["nothing compiled twice"]
    assert gpu_stages.furthest({1: 2.0, 2: 1.1}, {1: 2.0, 2: 1.0}) == pytest.approx(0.1)
    assert gpu_stages.furthest({1: 2.0}, {1: 2.0, 2: 1.0}) == gpu_stages.furthest({}, {}) == float("inf")


def test_gpt2_in_8_gb_follows_the_advice_until_it_fits(h100, books, tmp_path):
    _, commands, ends = h100
    advice = 2, "train_speed.py: the GPU has too little memory; halve batch_size and double the rest"
    ends |= {"--batch_size=12": advice, "--batch_size=6": advice}
    lab = make_lab(tmp_path, data=books)
    gpu_stages.modes(lab)
    assert all(lab.checks.values()) and "4 x 3 rows" in "".join(lab.figures)
    assert sum("gpt2.yaml" in line for line in commands) == 3 and "one line of advice" in " ".join(lab.seen)
    ends["--batch_size=6"] = 2, f"Traceback (most recent call last):\n{advice[1]}"
    lab = make_lab(tmp_path, data=books)
    gpu_stages.modes(lab)
    assert [what[:13] for what, holds in lab.checks.items() if not holds] == ["GPT-2 in 8 GB"]


def test_what_is_looked_for_is_what_is_printed(small, monkeypatch, capsys):
    def main(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys, "argv", ["train_speed.py"])
    with pytest.raises(SystemExit):
        configurator.launch(main, train_speed.SpeedConfig)
    assert gpu_stages.ADVICE in capsys.readouterr().err
    monkeypatch.setattr("robopoet.machine.why_no_compile", lambda device: "no compiler")
    cfg = train.TrainConfig(**small | {"compile": "true"})
    train.build_state(cfg, Machine(torch.device("cpu"), torch.float32), train.make_model(cfg, 61))
    assert gpu_stages.UNCOMPILED in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["--device=cpu"], "--quick"),
        (["--stages=1,9"], "stages: found '1,9'"),
        (["--stages=all"], "stages: "),
        (["--peer=/nowhere"], "peer: /nowhere is not a checkout of nanoGPT: it has no train.py"),
        (["--minutes=-1"], "minutes: "),
    ],
)
def test_bad_keys_are_named(args, problem):
    with pytest.raises(ConfigError, match=problem):
        configurator.parse(GpuConfig, args)


@pytest.mark.slow
def test_without_a_gpu_the_command_ends_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "device: found cuda" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_it_runs_where_only_what_it_needs_is_installed():
    absent = "matplotlib transformers zstandard pyppmd hypothesis pytest wandb tensorboard"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent.split()!r}))\nimport bench.gpu, bench.train_speed"
    code += ", bench.learn, bench.sample_speed"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_readme_has_a_place_for_it(h100, tmp_path, monkeypatch):
    cfg, *_ = h100
    gpu.main(dataclasses.replace(cfg, stages="1"))
    monkeypatch.setattr(common, "RESULTS", cfg.folder)
    assert "## On a GPU" in table.tables() and "1 cuda_tests" in table.tables()


@pytest.mark.slow
def test_quick_on_a_cpu(books, tmp_path, monkeypatch):
    """The command itself, with every stage's processes; a checkpoint that is missing at first fails one of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    keys = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "max_iters": 2, "warmup_iters": 0}
    keys |= {"device": "cpu", "dtype": "float32"}
    args = [f"--dataset={books}", f"--char_dataset={books}", f"--checkpoint={tmp_path}/out/best.pt"]
    command = [sys.executable, "-m", "bench.gpu", "--device=cpu", "--quick", f"--results={tmp_path}/results", *args]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 1, first.stdout + first.stderr
    assert first.stdout.count("): passed") == 6 and first.stdout.count("): skipped") == 1, first.stdout
    assert "): FAILED: " in first.stdout and f"{tmp_path}/out/best.pt: not found; run" in first.stdout
    train.main(train.TrainConfig(**keys, dataset=str(books), out_dir=str(tmp_path / "out")))
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done before") == 7 and second.stdout.count("): passed") == 7
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert third.returncode == 0 and third.stdout.count("done before") == 8
    assert len(list((tmp_path / "results").glob("gpu_*.json"))) == 8
