"""What a run does when it is signalled, and when no one reads what it prints; see tests/README.md."""

import contextlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import at_step, records
from scripts import Script

import train
from robopoet.errors import warn
from robopoet.machine import Machine, Signals
from robopoet.training.run import Run
from robopoet.weights import checkpoint
from train import TrainConfig

# --- 11: signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["step", "evaluation", "save"])
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_resumes_to_the_same_bits(
    small, tmp_path, monkeypatch, number, moment
):
    keys, before = small | {"dropout": 0.1, "max_iters": 9}, signal.getsignal(number)
    train.main(TrainConfig(**keys | {"out_dir": str(tmp_path / "whole")}))

    sent = []

    def send() -> None:
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        if moment == "step":
            at_step(patch, 4, send)
        else:
            module, name = (train, "evaluate") if moment == "evaluation" else (checkpoint, "save")
            work = getattr(module, name)
            patch.setattr(module, name, lambda *args, **more: (send(), work(*args, **more))[1])
        with pytest.raises(SystemExit) as ended:
            train.main(TrainConfig(**keys))
    assert ended.value.code == train.RESUMABLE
    stopped = checkpoint.load(Path(keys["out_dir"]) / "ckpt.pt")["iter_num"]
    assert stopped == (5 if moment == "step" else 4)  # heard at the end of the step that follows
    assert signal.getsignal(number) == before
    train.main(TrainConfig(**keys | {"init_from": "auto"}))
    whole = {r["iter"]: r["loss"] for r in records(tmp_path / "whole") if r["kind"] == "train"}
    parts = {r["iter"]: r["loss"] for r in records(keys["out_dir"]) if r["kind"] == "train"}
    assert whole == parts
    ends = [checkpoint.load(tmp_path / name / "ckpt.pt")["model"] for name in ("whole", "out")]
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


def test_usr1_saves_and_the_run_continues(small, monkeypatch):
    saved, save = [], Run.save

    def noting(run, *content):
        saved.append(content[3].iter_num)
        return save(run, *content)

    monkeypatch.setattr(Run, "save", noting)
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    train.main(TrainConfig(**small | {"eval_interval": 6}))
    assert saved == [4, 6]


def test_the_alarm_of_a_signal_ends_with_the_training():
    with Signals(Machine(torch.device("cpu"), torch.float32), 600.0) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.agreed().end and signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_second_interrupt_ends_at_once(small, monkeypatch):
    survived = []

    def interrupt_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            survived.append(1)

    at_step(monkeypatch, 2, interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        train.main(TrainConfig(**small))
    assert len(survived) == 1
    assert not (Path(small["out_dir"]) / "ckpt.pt").exists()  # the step was not awaited


def with_a_reader(args: list[str]) -> tuple[Script, int]:
    """A run of train.py, and the end of a pipe from which to read what it prints."""
    ours, its = os.pipe()
    process = Script("train.py", *args, stdin=its, stdout=its, stderr=2)
    os.close(its)
    return process, ours


def test_a_process_that_is_told_to_end_prints_how_to_resume(small):
    args = [f"--{key}={value}" for key, value in (small | {"max_iters": 100_000, "eval_interval": 100_000}).items()]
    process, ours = with_a_reader(args)
    with open(ours) as shown:
        while not shown.readline().startswith("step      3"):
            pass
        process.signal(signal.SIGTERM)
        out = shown.read()
    assert process.wait() == train.RESUMABLE and re.search(r"--init_from=auto .* from step \d", out)
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] >= 3


# --- 25: terminals and pipes


def test_a_run_continues_when_no_one_reads_what_it_prints(small):
    args = [f"--{key}={value}" for key, value in (small | {"max_iters": 60, "eval_interval": 60}).items()]
    process, ours = with_a_reader(args)
    with open(ours) as shown:
        while not shown.readline().startswith("step"):
            pass
    process.signal(signal.SIGHUP)
    assert process.wait() == 0
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] == 60


def test_a_run_continues_when_its_terminal_closes(small):
    args = [f"--{key}={value}" for key, value in (small | {"max_iters": 60, "eval_interval": 60}).items()]
    ours, its = os.openpty()
    process = Script("train.py", *args, stdin=its, stdout=its, stderr=its)
    os.close(its)
    shown = b""
    while b"step      1" not in shown:
        shown += os.read(ours, 1000)
    os.close(ours)
    process.signal(signal.SIGHUP)
    assert process.wait() == 0
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] == 60


def test_a_warning_that_no_one_can_read_stops_nothing(monkeypatch):
    ours, its = os.openpty()
    os.close(ours)
    with open(its, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        warn("the disk is full")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            closed.close()
