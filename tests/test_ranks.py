"""Two ranks on one machine, over gloo: the same bits twice, one rank's losses, shards, and the end of a rank."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import KINDS

import train
from robopoet.machine import Machine, why_no_compile
from robopoet.text.dataset import read_meta
from robopoet.text.windows import EvalPlan, open_split
from robopoet.training.evaluate import evaluate
from robopoet.weights import checkpoint
from train import TrainConfig

pytestmark = pytest.mark.slow
REPO = Path(__file__).parents[1]

# train.py, but at a step of rank 1 something happens once
FAULTY = """
import os, pathlib, signal, sys, time
import configurator, train
what, step, flag = sys.argv.pop(1), int(sys.argv.pop(1)), pathlib.Path(sys.argv.pop(1))
train_step, forward = train.train_step, train.GPT.forward
poison = ""

def faulty(state, windows, number):
    global poison
    poison = ""
    if state.machine.rank == 1 and number == step and not flag.exists():
        flag.touch()
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "kill agent":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "hang":
            time.sleep(1000)
        elif what in ("SIGTERM", "SIGUSR1"):
            os.kill(os.getpid(), getattr(signal, what))
        elif what == "count":
            states = [value for o in state.optimizers for of_p in o.state.values() for value in of_p.values()]
            flag.write_text(str(sum(t.to_local().numel() for t in (*state.model.parameters(), *states) if t.dim())))
        poison = what
    return train_step(state, windows, number)

def poisoned(self, *args, **keys):
    logits, loss = forward(self, *args, **keys)
    if poison == "overflow":
        loss.register_hook(lambda grad: grad * float("inf"))
    return logits, loss * float("nan") if poison == "nan" else loss

train.train_step, train.GPT.forward = faulty, poisoned
configurator.launch(train.main, train.TrainConfig)
"""


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def command(keys: dict, *script: str, options: tuple[str, ...]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, *(script or ("train.py",))]
    return [*launcher, *(f"--{key}={value}" for key, value in keys.items())]


def torchrun(keys: dict, *script: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run a script on two ranks; returns the finished process."""
    options = ("--nproc_per_node=2", f"--master_port={free_port()}", *options)
    launch = command(keys, *script, options=options)
    return subprocess.run(launch, cwd=REPO, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def train_on_two(keys: dict, *script: str) -> Path:
    """Train to the end; the folder it left."""
    done = torchrun(keys, *script)
    assert done.returncode == 0, done.stderr
    return Path(keys["out_dir"])


@pytest.fixture
def faulty(tmp_path):
    """The start of a command line for FAULTY: what happens, and at which step."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    return lambda what, step: (str(tmp_path / "faulty.py"), what, str(step), str(tmp_path / "happened"))


def losses(out: Path, kind: str = "train") -> list[float]:
    """The losses of a run, by step."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in found if record["kind"] == kind]


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


# train.py, but every rank checks after each step that all have its weights and momenta
EQUAL = """
import torch
import configurator, train
train_step = train.train_step

def checking(state, windows, number):
    result = train_step(state, windows, number)
    momenta = [of_p["momentum_buffer"] for of_p in state.optimizers[1].state.values()]
    own = torch.cat([t.detach().flatten() for t in (*state.model.parameters(), *momenta)])
    everyones = own.new_empty(state.machine.world_size, len(own))
    torch.distributed.all_gather(list(everyones), own)
    assert all(torch.equal(own, other) for other in everyones)
    return result

train.train_step = checking
configurator.launch(train.main, train.TrainConfig)
"""


# three matrices of a shape for two ranks, two for three
@pytest.mark.parametrize("ranks, n_layer, kind", [(2, 3, "learned"), (3, 2, "learned"), (2, 3, "llama")])
def test_ranks_that_share_muons_matrices_learn_as_one_and_keep_equal_weights(small, tmp_path, ranks, n_layer, kind):
    (tmp_path / "equal.py").write_text(EQUAL)
    keys = (
        small
        | KINDS[kind]
        | {"learning_rate": 1e-3, "batch_size": 6, "n_layer": n_layer, "lr_decay_iters": 20, "max_iters": 20}
    )
    train.main(TrainConfig(**keys | {"out_dir": str(tmp_path / "one")}))
    # all ranks, then one, then all again
    for max_iters, alone in ((8, False), (12, True), (20, False)):
        keys |= {"max_iters": max_iters, "init_from": "auto", "eval_interval": 10}
        if alone:
            train.main(TrainConfig(**keys))
        else:
            done = torchrun(keys, str(tmp_path / "equal.py"), options=(f"--nproc_per_node={ranks}",))
            assert done.returncode == 0, done.stderr[-2000:]
    found = losses(Path(keys["out_dir"]))
    assert found == pytest.approx(losses(tmp_path / "one"), abs=1e-5) and len(found) == 20
    torch.testing.assert_close(
        weights(Path(keys["out_dir"]) / "ckpt.pt"), weights(tmp_path / "one" / "ckpt.pt"), atol=1e-4, rtol=0
    )


FORCED = "forcefully exiting"  # what torchrun prints when a rank outlives its signal by 30 s and is killed


def test_when_a_rank_is_killed_the_others_end_soon(small, faulty):
    done = torchrun(small | {"max_iters": 100_000, "eval_interval": 2}, *faulty("kill", 4))
    assert done.returncode != 0 and FORCED not in done.stderr
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] == 4


def test_a_restarted_job_resumes_by_itself_as_if_nothing_had_happened(small, faulty, tmp_path):
    keys = small | {"max_iters": 8, "eval_interval": 2, "dropout": 0.1, "init_from": "auto"}
    done = torchrun(keys, *faulty("kill", 5), options=("--max_restarts=1",))
    assert done.returncode == 0, done.stderr[-2000:]
    whole = torchrun(keys | {"out_dir": tmp_path / "whole"})
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert losses(Path(small["out_dir"])) == losses(tmp_path / "whole")
    assert torch.equal(weights(Path(small["out_dir"]) / "ckpt.pt"), weights(tmp_path / "whole" / "ckpt.pt"))


@pytest.mark.parametrize("timeout_s", [5, 8])
def test_when_a_rank_hangs_the_job_ends_with_the_timeout(small, faulty, timeout_s):
    done = torchrun(small | {"max_iters": 100_000, "timeout_s": timeout_s}, *faulty("hang", 4))
    assert done.returncode != 0 and FORCED not in done.stderr
    assert f"rank 0: another rank is gone or has not answered for {timeout_s} s (" in done.stderr


@pytest.mark.parametrize("shard", [False, True])
def test_a_loss_that_is_not_a_number_on_one_rank_stops_both_and_is_named(small, faulty, shard):
    done = torchrun(small | {"eval_interval": 2, "shard": shard}, *faulty("nan", 3))
    assert done.returncode != 0
    assert "step 4: the loss is not finite" in done.stderr and "rank 1: rows 28 to 31, tokens [" in done.stderr
    assert "rank 0: rows" not in done.stderr
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] == 2


@pytest.mark.parametrize("number, saved", [("SIGTERM", 4), ("SIGUSR1", 6)])
def test_all_ranks_agree_on_the_step_at_which_a_signal_to_one_is_heard(small, faulty, number, saved):
    done = torchrun(small | {"eval_interval": 6}, *faulty(number, 3))
    assert done.returncode == 0, done.stderr[-2000:]
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["iter_num"] == saved
    assert "step 4" in done.stdout


# --- two machines


def test_a_machine_that_is_killed_comes_back_and_the_run_resumes_by_itself(small, faulty, tmp_path):
    keys = small | {"max_iters": 12, "eval_interval": 3, "dropout": 0.1}
    whole = train_on_two(keys | {"out_dir": tmp_path / "whole"})
    port = free_port()
    options = ("--nnodes=2", "--nproc_per_node=1", "--max_restarts=3", "--local_addr=localhost")
    options += ("--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}")
    environment = ENVIRONMENT | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = []

    def start(*script: str) -> subprocess.Popen:
        launch = command(keys | {"init_from": "auto"}, *script, options=options)
        agents.append(subprocess.Popen(launch, cwd=REPO, env=environment, stderr=log))
        return agents[-1]

    with open(tmp_path / "log", "wb") as log:
        try:
            first = start()
            while socket.socket().connect_ex(("localhost", port)):  # the rendezvous is the first's
                time.sleep(0.1)
            assert start(*faulty("kill agent", 7)).wait(120) == -9
            back = start()
            ends = back.wait(180), first.wait(60)
        finally:
            for agent in agents:
                agent.terminate()
    said = (tmp_path / "log").read_text()
    assert ends == (0, 0), said[-4000:]
    assert "rank 0: another rank is gone" in said and "TORCH_DISABLE_SHARE" not in said
    assert losses(Path(small["out_dir"])) == losses(whole)
    assert torch.equal(weights(Path(small["out_dir"]) / "ckpt.pt"), weights(whole / "ckpt.pt"))


# train.py, whose ranks average gradients in many small buckets, as large models do; rank 0 notes its graphs
BUCKETS = """
import functools, json, os, pathlib
import torch
import configurator, model, train
uncompiled, forward = 0, model.Block.forward
def counting(self, *args):
    global uncompiled
    if not torch.compiler.is_compiling():
        uncompiled += self.training
    return forward(self, *args)
model.Block.forward = counting
torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 10_000
train.DistributedDataParallel = functools.partial(train.DistributedDataParallel, bucket_cap_mb=0.01)
configurator.launch(train.main, train.TrainConfig)
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
if os.environ["RANK"] == "0":
    pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps([uncompiled, graphs]))
"""


@pytest.mark.skipif(why_no_compile(torch.device("cpu")) is not None, reason="can't compile here")
@pytest.mark.parametrize("shard", [False, True])
def test_compiled_ranks_learn_as_plain_ones(small, tmp_path, shard):
    (tmp_path / "buckets.py").write_text(BUCKETS)
    keys = small | {"optimizer": "adamw", "gradient_accumulation_steps": 4, "learning_rate": 1e-3, "shard": shard}
    keys["n_layer"] = 5
    plain, compiled = (
        train_on_two(keys | {"out_dir": tmp_path / how, "compile": how}, str(tmp_path / "buckets.py"))
        for how in ("false", "true")
    )
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4) and len(losses(plain)) == 6
    uncompiled, graphs = json.loads((tmp_path / "buckets.json").read_text())
    assert uncompiled == 0 and graphs <= 3  # one for all blocks, though ranks gather weights between them


# --- --shard=true


@pytest.fixture
def uneven(small) -> dict:
    """Keys of a run whose matrices two ranks can't halve evenly, with micro-batches and an odd number of batches."""
    keys = small | {"block_size": 33, "n_embd": 34, "gradient_accumulation_steps": 4, "eval_iters": 3}
    return keys | {"learning_rate": 1e-3, "max_iters": 30, "lr_decay_iters": 30, "eval_interval": 10}


def tensors(path: Path) -> list[torch.Tensor]:
    """The weights and the optimizers' states in a checkpoint."""
    content = checkpoint.load(path)
    assert content["model"].pop("lm_head.weight") is content["model"]["transformer.wte.weight"]
    leaves = torch.utils._pytree.tree_leaves([content["model"], content["optimizer_states"]])
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    "optimizer, kind, sampled",
    [("adamw", "learned", 0), ("muon", "learned", 0), ("muon", "rotary", 50), ("muon", "llama", 50)],
)
def test_sharded_ranks_learn_as_ranks_with_copies_and_hold_half_each(
    uneven, faulty, tmp_path, optimizer, kind, sampled
):
    keys = uneven | {"n_head": 1} | KINDS[kind] | {"optimizer": optimizer, "sampled_softmax": sampled, "dropout": 0.1}
    if kind == "llama":
        keys |= {"n_head": 3, "n_embd": 42}  # c_attn has 70 rows
    copies = train_on_two(keys | {"out_dir": tmp_path / "copies"})
    halves = train_on_two(keys | {"out_dir": tmp_path / "halves", "shard": True}, *faulty("count", 4))
    assert losses(halves) == pytest.approx(losses(copies), abs=1e-5) and len(losses(halves)) == 30
    assert losses(halves, "eval") == pytest.approx(losses(copies, "eval"), abs=1e-5)
    torch.testing.assert_close(weights(halves / "ckpt.pt"), weights(copies / "ckpt.pt"), atol=1e-4, rtol=0)
    numbers = sum(t.numel() for t in tensors(halves / "ckpt.pt") if t.dim())
    assert int((tmp_path / "happened").read_text()) == pytest.approx(numbers / 2, rel=0.05)


def test_one_rank_evaluates_what_sharded_ranks_have_learnt(uneven):
    cfg = TrainConfig(**uneven)
    out, folder = train_on_two(uneven | {"shard": True}), Path(cfg.dataset)
    cpu, meta = Machine(torch.device("cpu"), torch.float32), read_meta(folder)
    split = open_split(folder, "val", meta, cfg.block_size, cpu.device)
    model, tok, content = checkpoint.load_model(out / "ckpt.pt", cpu.device, cpu.dtype)
    plan = EvalPlan(cfg.block_size, cfg.batch_size, cfg.eval_iters)
    found = evaluate(model, split, tok, plan, cpu)
    assert content["iter_num"] == 30 and found["loss"] == pytest.approx(losses(out, "eval")[-1], abs=1e-6)


def test_shards_copies_and_one_rank_resume_each_others_checkpoints(uneven, tmp_path):
    whole = train_on_two(uneven | {"out_dir": tmp_path / "whole", "shard": True})
    half = {shard: tmp_path / f"half_{shard}" for shard in (True, False)}
    for shard, out in half.items():
        train_on_two(uneven | {"out_dir": out, "shard": shard, "max_iters": 20})

    def copy_half(name: str, shard_before: bool) -> dict:
        shutil.copytree(half[shard_before], tmp_path / name)
        return uneven | {"out_dir": str(tmp_path / name), "init_from": "resume"}

    train_on_two(copy_half("shards", True) | {"shard": True})
    assert losses(tmp_path / "shards") == losses(whole)
    ends = [tensors(out / "ckpt.pt") for out in (whole, tmp_path / "shards")]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    train_on_two(copy_half("copies", True))
    train_on_two(copy_half("shards_of_copies", False) | {"shard": True})
    train.main(TrainConfig(**copy_half("one", True) | {"shard": True}))  # alone it changes nothing
    for name in ("copies", "shards_of_copies", "one"):
        assert losses(tmp_path / name) == pytest.approx(losses(whole), abs=1e-5) and len(losses(tmp_path / name)) == 30


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_in_float16_is_skipped_by_shards_as_by_copies(uneven, faulty, tmp_path, optimizer):
    keys = uneven | {"optimizer": optimizer, "dtype": "float16", "max_iters": 8}
    ends = []
    for shard in (False, True):
        out = train_on_two(keys | {"out_dir": tmp_path / str(shard), "shard": shard}, *faulty("overflow", 3))
        (tmp_path / "happened").unlink()
        ends.append((losses(out), checkpoint.load(out / "ckpt.pt")["scaler"]))
    assert all(map(math.isfinite, ends[1][0])) and ends[1][0] == pytest.approx(ends[0][0], abs=1e-3)
    assert ends[1][1] == ends[0][1] and ends[1][1]["scale"] == 2.0**15


# train.py, but the main rank's folder is moved while it trains
MOVED = """
import os, sys
import configurator, train
train_step, out = train.train_step, sys.argv.pop(1)

def moving(state, windows, number):
    if number == 2 and state.machine.is_main:
        os.rename(out, out + "-moved")
    return train_step(state, windows, number)

train.train_step = moving
configurator.launch(train.main, train.TrainConfig)
"""


def test_all_ranks_end_when_their_folder_is_moved(small, tmp_path):
    """The end counts as one that was asked for: torchrun would restart ranks that fail, and auto begin a new run."""
    (tmp_path / "moved.py").write_text(MOVED)
    out = small["out_dir"]
    done = torchrun(small, str(tmp_path / "moved.py"), out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{out} was moved while this run wrote to it") == 1 and not Path(out).exists()
    assert checkpoint.load(Path(f"{out}-moved") / "ckpt.pt")["iter_num"] == 4
