"""How a script begins and ends: one line for a user's mistake, under torchrun too, and its name."""

import os
import re
import subprocess
import sys

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import configurator
from bench.gpu import GpuConfig
from robopoet import files
from robopoet.errors import ConfigError
from sample import SampleConfig


@pytest.mark.parametrize("problem", [ConfigError("key: is bad"), FileNotFoundError(2, "No such file", "x")])
def test_a_users_mistake_ends_in_one_line_and_exit_2(monkeypatch, capsys, problem):
    monkeypatch.setattr("sys.argv", [os.path.join("some", "script.py")])

    def main(cfg):
        raise problem

    with pytest.raises(SystemExit) as caught:
        configurator.launch(main, SampleConfig)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("script.py: ")


def test_a_bench_is_called_by_its_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(files.HOME / "bench" / "gpu.py"), "--device=cpu"])
    with pytest.raises(SystemExit):
        configurator.launch(print, GpuConfig)
    assert capsys.readouterr().err.startswith("bench.gpu: device: found cpu")
    assert configurator.usage(GpuConfig).startswith("python -m bench.gpu [CONFIG.yaml ...] [--key=value ...]")


RANK = """
import os, sys, time
from dataclasses import dataclass
import configurator
from robopoet.errors import ConfigError, warn
time.sleep = lambda seconds: os.kill(os.getpid(), 15) if sys.argv.pop() == "--ended" else None
@dataclass
class Config:
    def problems(self): return []
def main(cfg):
    warn("slow")
    raise ConfigError("key: is bad")
configurator.parse = lambda *_: Config()
configurator.launch(main, Config)
"""


def test_of_torchruns_ranks_the_first_tells_what_all_have_found(tmp_path):
    (tmp_path / "s.py").write_text(RANK)
    report = tmp_path / "error.json"
    env = os.environ | {"PYTHONPATH": str(files.HOME), "TORCHELASTIC_RUN_ID": "x"}
    for rank, arg, code, err in (
        ("0", "", 2, "warning: slow\ns.py: key: is bad\n"),
        ("1", "--ended", 0, ""),
        ("1", "--alone", 2, "s.py: key: is bad\n"),
    ):
        env |= {"LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": str(report)}
        done = subprocess.run([sys.executable, tmp_path / "s.py", arg], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, err)
        assert report.exists() == bool(code)
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(report)) if code else None
        assert not failure or failure.message["extraInfo"]["py_callstack"] == "s.py: key: is bad"
        report.unlink(missing_ok=True)


def test_a_bug_is_not_taken_for_a_users_mistake(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py"])

    def main(cfg):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        configurator.launch(main, SampleConfig)


def test_make_help_lists_what_make_does():
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}  # make test's own
    listed = subprocess.run(["make", "help"], cwd=files.HOME, env=env, capture_output=True, text=True).stdout
    phony = re.search(r"PHONY: (.*)", (files.HOME / "Makefile").read_text())[1].split()
    assert sorted(line.split(":")[0] for line in listed.splitlines()) == sorted(f"make {name}" for name in phony)
