"""Checkpoints written in a thread while training goes on, as on CUDA; here on a CPU, which else writes them at once."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Threaded, assert_equal, at_step

import configurator
import train
from robopoet.errors import ConfigError
from robopoet.machine import Machine
from robopoet.text.dataset import read_meta
from robopoet.text.windows import TrainWindows, open_split
from robopoet.training.run import Progress, Run
from robopoet.weights import checkpoint
from train import TrainConfig

CPU = Machine(torch.device("cpu"), torch.float32)
REPO = Path(__file__).parents[1]


def begun(cfg: TrainConfig):
    """A state that has made three steps, a function that makes another, and one that makes a Run in a folder."""
    meta = read_meta(Path(cfg.dataset))
    split = open_split(Path(cfg.dataset), "train", meta, cfg.block_size, CPU.device)
    windows = TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)
    state = train.build_state(cfg, CPU, train.make_model(cfg, meta.vocab_size), split, meta)
    for number in range(3):
        train.train_step(state, windows, number)
    return (
        state,
        lambda number: train.train_step(state, windows, number),
        lambda out: Run(out, configurator.values_of(cfg), meta, CPU),
    )


def slowly(monkeypatch, until=lambda: time.sleep(0.2)) -> None:
    """Let each file wait `until` something before it is written."""
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args, **keys: (until(), save(*args, **keys)))


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adafactor"])
def test_a_slow_save_holds_the_bytes_of_its_step_though_training_goes_on(small, tmp_path, monkeypatch, optimizer):
    state, step, run_in = begun(TrainConfig(**small | {"optimizer": optimizer, "ema": 0.9, "decay_lr": False}))
    at_once, later = run_in(tmp_path / "at_once"), run_in(tmp_path / "later")
    later.saver.in_background = True
    gate, said = threading.Event(), []
    for end, loss in ((3, 2.0), (6, 3.0)):  # the second is not the best, and keeps the first one's ckpt.pt
        content = (state.model, state.optimizers, state.scaler, Progress(iter_num=end, run_id="1"), loss, state.average)
        at_once.save(*content)
        before = state.model.lm_head.weight.detach().clone()
        with monkeypatch.context() as patch:
            slowly(patch, lambda: gate.wait(60))
            later.save(*content, said.append)
            for number in range(end, end + 3):
                step(number)
            assert len(said) == end // 3 - 1 and not list(later.out.glob("*.part"))
            gate.set()
            later.saver.wait()
        gate.clear()
        assert not torch.equal(state.model.lm_head.weight, before)
        assert torch.equal(checkpoint.load(later.out / "ckpt.pt")["model"]["lm_head.weight"], before)
    assert said == [f"saved {later.out}/ckpt.pt, step {end}" for end in (3, 6)]
    names = sorted(path.name for path in at_once.out.glob("*.pt"))
    assert names == ["best.pt", "ckpt.prev.pt", "ckpt.pt"]
    for name in names:
        assert (later.out / name).read_bytes() == (at_once.out / name).read_bytes(), name


def test_saves_follow_one_another_and_the_run_waits_for_the_last(small, monkeypatch, capsys, saver):
    calls, threads, save, snapshot = [], set(), checkpoint.save, checkpoint.Saver.snapshot

    def copying(saver, tensor):
        calls.extend(["copies"] if calls[-1:] != ["copies"] else [])
        return snapshot(saver, tensor)

    def noting(path, content, keep=None):
        calls.append((path.name, content["iter_num"], "begins"))
        threads.add(threading.current_thread() is threading.main_thread())
        time.sleep(0.05)
        save(path, content, keep)
        calls.append((path.name, content["iter_num"], "ends"))

    monkeypatch.setattr(checkpoint, "save", noting)
    monkeypatch.setattr(checkpoint.Saver, "snapshot", copying)
    train.main(TrainConfig(**small | {"eval_interval": 2}))
    expected = []
    for step in (2, 4, 6):  # its loss falls, and memory holds one copy of the state at a time
        files = [(name, step, what) for name in ("best.pt", "ckpt.pt") for what in ("begins", "ends")]
        expected += ["copies", *files]
    assert calls == expected
    assert threads == {saver == "at once"}
    out = Path(small["out_dir"])
    assert checkpoint.load(out / "ckpt.prev.pt")["iter_num"] == 4
    told = re.findall(rf"^saved {out}/ckpt\.pt, step (\d)$", capsys.readouterr().out, re.M)
    assert told == ["2", "4", "6"]


def test_a_run_that_saves_in_a_thread_learns_the_same(small, tmp_path, monkeypatch):
    keys = small | {"dropout": 0.1, "ema": 0.9, "eval_interval": 1}
    train.main(TrainConfig(**keys | {"out_dir": str(tmp_path / "at_once")}))
    monkeypatch.setattr(checkpoint, "Saver", Threaded)
    slowly(monkeypatch, lambda: time.sleep(0.02))
    train.main(TrainConfig(**keys))
    apart = {"config", "run_id", "seconds", "other_s"}  # out_dir, and what no two runs have in common
    for name in ("ckpt.pt", "ckpt.prev.pt", "best.pt"):
        ours, other = (checkpoint.load(tmp_path / folder / name) for folder in ("out", "at_once"))
        assert ours.keys() == other.keys()
        assert_equal(*({key: value for key, value in each.items() if key not in apart} for each in (ours, other)))


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), KeyboardInterrupt(), ValueError("a bug")])
def test_whatever_ends_a_run_waits_for_what_is_being_written(small, monkeypatch, error):
    def end() -> None:
        raise error

    monkeypatch.setattr(checkpoint, "Saver", Threaded)
    slowly(monkeypatch)
    at_step(monkeypatch, 3, end)
    with pytest.raises(ConfigError if isinstance(error, RuntimeError) else type(error)):
        train.main(TrainConfig(**small))
    out = Path(small["out_dir"])
    assert checkpoint.load(out / "ckpt.pt")["iter_num"] == 3 and not list(out.glob("*.part"))


def test_a_bug_in_the_thread_ends_the_run(small, monkeypatch):
    monkeypatch.setattr(checkpoint, "Saver", Threaded)
    monkeypatch.setattr(checkpoint, "save", lambda *args, **keys: {}["no such key"])
    with pytest.raises(KeyError, match="no such key"):
        train.main(TrainConfig(**small))


def test_without_memory_for_copies_all_is_written_at_once(small, tmp_path, monkeypatch):
    state, _, run_in = begun(TrainConfig(**small))
    at_once, later = run_in(tmp_path / "at_once"), run_in(tmp_path / "later")
    later.saver.in_background = True
    empty_like, calls = torch.empty_like, []

    def scarce(*args, **keys):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("CUDA error: out of memory")
        return empty_like(*args, **keys)

    content = (state.model, state.optimizers, state.scaler, Progress(iter_num=3))
    at_once.save(*content)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "empty_like", scarce)
        later.save(*content)
    assert len(calls) == 4  # it is not tried again for each tensor
    assert (later.out / "ckpt.pt").read_bytes() == (at_once.out / "ckpt.pt").read_bytes()


def test_on_cuda_copies_are_pinned_and_whole_before_the_thread_begins(monkeypatch):
    told, main = [], threading.current_thread()

    class Copy:
        def copy_(self, source, non_blocking):
            told.append(("copied", source, non_blocking))
            return self

    def empty_like(tensor, device, pin_memory):
        told.append((device, pin_memory))
        return Copy()

    monkeypatch.setattr(checkpoint.torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("waited"))
    saver, tensor = checkpoint.Saver(Machine(torch.device("cuda"), torch.bfloat16)), SimpleNamespace(is_cuda=True)
    with saver:
        assert isinstance(saver.snapshot(tensor), Copy)
        saver.start(lambda: told.append(threading.current_thread() is main))
    assert told == [("cpu", True), ("copied", tensor, True), "waited", False]
    told.clear()
    saver = checkpoint.Saver(CPU)
    assert saver.snapshot(tensor) is tensor
    saver.start(lambda: told.append(threading.current_thread() is main))
    assert told == [True]


# train.py, but it saves in a thread, and slowly
THREADED = """
import time
import configurator, train
from robopoet.weights import checkpoint

class Threaded(checkpoint.Saver):
    def __init__(self, machine):
        super().__init__(machine)
        self.in_background = True

def slow(*args, **keys):
    time.sleep(0.005)
    save(*args, **keys)
    time.sleep(0.005)

save, checkpoint.save, checkpoint.Saver = checkpoint.save, slow, Threaded
configurator.launch(train.main, train.TrainConfig)
"""


@pytest.mark.slow
def test_a_run_that_saves_in_a_thread_survives_kills_at_any_moment(small, tmp_path):
    """What it reported saved is there each time, and it ends with the losses and weights of an unbroken run."""
    rng, out = random.Random(0), Path(small["out_dir"])
    keys = small | {"dropout": 0.1, "max_iters": 200, "eval_interval": 2, "init_from": "auto"}
    train.main(TrainConfig(**keys | {"out_dir": str(tmp_path / "whole")}))
    argv = [sys.executable, "-u", "-c", THREADED, *(f"--{key}={value}" for key, value in keys.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kills, step, of_saves = 8, 0, lambda lines: (line for line in lines if line.startswith("saved "))
    while step < 200:
        wanted = rng.randrange(1, 20) if kills else 200
        with subprocess.Popen(argv, cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True) as process:
            said = [*itertools.islice(of_saves(process.stdout), wanted)]
            if kills:
                time.sleep(rng.random() * 0.1)
                process.kill()
                kills -= 1
            said += of_saves(process.stdout)
        assert said and process.returncode in (0, -9)
        step = checkpoint.load(out / "ckpt.pt")["iter_num"]
        assert step >= int(said[-1].split()[-1])
        checkpoint.load(out / "best.pt")
    assert not kills
    runs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "whole", out)]
    whole, parts = ({r["iter"]: r["loss"] for r in map(json.loads, lines) if r["kind"] == "train"} for lines in runs)
    assert whole == parts and len(whole) == 200
    ends = [checkpoint.load(folder / "ckpt.pt")["model"] for folder in (tmp_path / "whole", out)]
    torch.testing.assert_close(*ends, rtol=0, atol=0)
