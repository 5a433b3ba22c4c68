"""Two ranks on one machine, over gloo: the same bits twice, one rank's losses, and what happens when one falls out."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import train
from train import TrainConfig

pytestmark = pytest.mark.slow
REPO = Path(__file__).parents[1]

# train.py, but at a step of rank 1 something happens once
FAULTY = """
import os, pathlib, signal, sys, time
import configurator, train
from checkpoint import CheckpointError
from data import DataError
what, step, flag = sys.argv.pop(1), int(sys.argv.pop(1)), pathlib.Path(sys.argv.pop(1))
train_step, forward = train.train_step, train.GPT.forward
poison = False

def faulty(state, windows, cfg, machine, number):
    global poison
    poison = False
    if machine.rank == 1 and number == step and not flag.exists():
        flag.touch()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "hang":
            time.sleep(1000)
        elif what in ("SIGTERM", "SIGUSR1"):
            os.kill(os.getpid(), getattr(signal, what))
        poison = what == "nan"
    return train_step(state, windows, cfg, machine, number)

def poisoned(self, *args, **keys):
    logits, loss = forward(self, *args, **keys)
    return logits, loss * float("nan") if poison else loss

train.train_step, train.GPT.forward = faulty, poisoned
configurator.launch(train.main, train.TrainConfig, DataError, CheckpointError, train.DivergedError, train.RankError)
"""


def torchrun(keys: dict, *script: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run a script on two ranks; what came of it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += [*options, *(script or ("train.py",)), *(f"--{key}={value}" for key, value in keys.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def faulty(tmp_path):
    """The start of a command line for FAULTY: what happens, and at which step."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    return lambda what, step: (str(tmp_path / "faulty.py"), what, str(step), str(tmp_path / "happened"))


def losses(out: Path) -> list[float]:
    """By step; of a step made twice, the later."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in found if record["kind"] == "train"]


def weights(path: Path) -> torch.Tensor:
    return torch.cat([p.flatten() for p in checkpoint.load(path)["model"].values()])


def test_the_same_command_twice_gives_the_same_bits_and_one_rank_the_same_losses(small, tmp_path):
    keys = small | {"optimizer": "adamw", "max_iters": 50, "eval_interval": 25, "gradient_accumulation_steps": 4}
    keys |= {"learning_rate": 1e-3}  # a hot one would make much of the order of summation
    for name in ("a", "b"):
        done = torchrun(keys | {"out_dir": tmp_path / name})
        assert done.returncode == 0, done.stderr[-2000:]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert torch.equal(weights(tmp_path / "a" / "ckpt.pt"), weights(tmp_path / "b" / "ckpt.pt"))
    train.main(TrainConfig(**keys | {"out_dir": str(tmp_path / "one")}))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def seconds_since(happened: Path) -> float:
    """How long ago rank 1 fell out."""
    return time.time() - happened.stat().st_mtime


def test_when_a_rank_is_killed_the_others_end_soon(small, faulty, tmp_path):
    done = torchrun(small | {"max_iters": 100_000, "eval_interval": 2}, *faulty("kill", 4))
    assert done.returncode != 0 and seconds_since(tmp_path / "happened") < 15
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] == 4


def test_a_restarted_job_goes_on_by_itself_as_if_nothing_had_happened(small, faulty, tmp_path):
    keys = small | {"max_iters": 8, "eval_interval": 2, "dropout": 0.1, "init_from": "auto"}
    done = torchrun(keys, *faulty("kill", 5), options=("--max_restarts=1",))
    assert done.returncode == 0, done.stderr[-2000:]
    whole = torchrun(keys | {"out_dir": tmp_path / "whole"})
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert losses(Path(small["out_dir"])) == losses(tmp_path / "whole")
    assert torch.equal(weights(Path(small["out_dir"]) / "ckpt.pt"), weights(tmp_path / "whole" / "ckpt.pt"))


def test_when_a_rank_hangs_the_job_ends_with_the_timeout(small, faulty, tmp_path):
    done = torchrun(small | {"max_iters": 100_000, "timeout_s": 5}, *faulty("hang", 4))
    assert done.returncode != 0 and seconds_since(tmp_path / "happened") < 5 + 10
    assert "rank 0: another rank is gone or has not answered for 5 s" in done.stderr


def test_a_loss_that_is_not_a_number_on_one_rank_stops_both_and_is_named(small, faulty):
    done = torchrun(small | {"eval_interval": 2}, *faulty("nan", 3))
    assert done.returncode != 0
    assert "step 3: the loss is not finite" in done.stderr and "rank 1: rows 28 to 31, tokens [" in done.stderr
    assert "rank 0: rows" not in done.stderr
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] == 2


@pytest.mark.parametrize("number, saved", [("SIGTERM", 4), ("SIGUSR1", 6)])
def test_all_ranks_agree_on_the_step_at_which_a_signal_to_one_is_heard(small, faulty, number, saved):
    done = torchrun(small | {"eval_interval": 6}, *faulty(number, 3))
    assert done.returncode == 0, done.stderr[-2000:]
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] == saved
    assert "step 4" in done.stdout
