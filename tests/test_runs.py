"""Whole runs of train.py: what they leave, how they resume, what their loggers get, what users get wrong."""

import dataclasses
import itertools
import math
import os
import shutil
import socket
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
from conftest import KINDS, LLAMA, records, report_of
from scripts import Script, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import losses, run, windows_of

import configurator
import train
from robopoet.errors import CheckpointError
from robopoet.machine import find_machine
from robopoet.text.dataset import encode_meta, read_meta
from robopoet.training.log import Log, wrapped
from robopoet.training.plan import finish
from robopoet.training.run import Progress
from robopoet.weights import checkpoint
from train import TrainConfig


def test_a_run_learns_and_leaves_what_it_promises(small):
    found = run(small, max_iters=40, eval_interval=20, log_interval=10)
    out = Path(small["out_dir"])
    assert {path.name for path in out.iterdir()} == {
        *("ckpt.pt", "ckpt.prev.pt", "best.pt", "metrics.jsonl", "report.html", "config.yaml", ".lock"),
    }
    trained = [record for record in found if record["kind"] == "train"]
    evaluated = [record for record in found if record["kind"] == "eval"]
    assert [record["iter"] for record in trained] == [1, 10, 20, 30, 40]
    assert [record["iter"] for record in evaluated] == [20, 40]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5
    assert trained[-1]["tokens"] == 40 * 8 * 32
    cosine = [(1 + math.cos(math.pi * (step - 1 - 2) / 38)) / 2 for step in (10, 20, 30, 40)]
    assert [record["lr"] for record in trained] == pytest.approx([0.01 * share for share in (1 / 3, *cosine)])
    assert set(trained[0]) >= {"iter", "loss", "lr", "grad_norm", "dt_ms", "tok_per_sec", "mfu", "tokens", "seconds"}
    assert set(evaluated[0]) >= {"iter", "split", "loss", "ppl", "bpb", "loss_by_style", "tokens", "seconds"}
    best = checkpoint.load(out / "best.pt")
    assert best["best_val_loss"] == min(record["loss"] for record in evaluated)
    assert "optimizer" not in best
    assert checkpoint.load(out / "ckpt.prev.pt")["iter_num"] == 20


@pytest.mark.parametrize(
    "optimizer, kind, dtype",
    [
        ("adamw", "learned", "float32"),
        ("muon", "learned", "bfloat16"),
        ("muon", "llama", "float32"),
        ("adafactor", "llama", "bfloat16"),
    ],
)
def test_resuming_equals_an_uninterrupted_run(small, tmp_path, optimizer, kind, dtype):
    keys = small | KINDS[kind] | {"optimizer": optimizer, "dtype": dtype, "dropout": 0.2}
    keys |= {"gradient_accumulation_steps": 2, "ema": 0.9}
    keys |= {"max_iters": 40, "lr_decay_iters": 40, "eval_interval": 10, "eval_iters": 2}  # 16 rows x 40: over an epoch
    assert windows_of(keys).per_epoch < 40 * 16
    whole = run(keys, out_dir=str(tmp_path / "whole"))
    run(keys, out_dir=str(tmp_path / "parts"), max_iters=30)
    parts = run(keys, out_dir=str(tmp_path / "parts"), init_from="resume")
    assert losses(parts) == losses(whole)
    ends = [checkpoint.load(tmp_path / name / "ckpt.pt") for name in ("whole", "parts")]
    assert ends[0]["iter_num"] == ends[1]["iter_num"] == 40
    assert ends[0]["average"].keys() < ends[0]["model"].keys()  # without the tied matrix
    for part in ("model", "average"):
        for name, p in ends[0][part].items():
            assert torch.equal(p, ends[1][part][name])
    for a, b in zip(*(end["optimizer_states"] for end in ends), strict=True):
        for index, moments in a["state"].items():
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(b["state"][index][k])) for k, v in moments.items()
            )


def test_the_same_command_gives_the_same_bits_however_often_it_evaluates(small, tmp_path):
    once = run(small, out_dir=str(tmp_path / "a"), dropout=0.1)
    again = run(small, out_dir=str(tmp_path / "b"), dropout=0.1, eval_interval=1)
    assert losses(once) == losses(again)
    assert losses(once) != losses(run(small, out_dir=str(tmp_path / "c"), dropout=0.1, seed=2))


@pytest.mark.parametrize("kind", [{}, LLAMA], ids=["gpt2", "llama"])
def test_float16_trains_with_its_scaler_and_resumes_it(small, kind):
    small |= kind
    run(small, dtype="float16")
    saved = checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")
    assert saved["scaler"]["_growth_tracker"] == 6
    found = run(small, dtype="float16", init_from="resume", max_iters=9)
    assert checkpoint.load(Path(small["out_dir"]) / "ckpt.pt")["scaler"]["_growth_tracker"] == 9
    assert all(map(math.isfinite, losses(found)))


def test_epochs_set_the_number_of_steps(small):
    per_epoch = windows_of(small).per_epoch
    found = run(small, epochs=0.25, eval_interval=1000)
    assert found[-1]["iter"] == math.ceil(0.25 * per_epoch / 8)


def test_patience_stops_a_run_that_no_longer_improves(small, monkeypatch):
    told = iter([3.0, 2.0, 2.5, 2.0, 2.1, 1.0])
    real = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: real(*args) | {"loss": next(told)})
    found = run(small, max_iters=12, eval_interval=2, patience=3)
    assert [record["loss"] for record in found if record["kind"] == "eval"] == [3.0, 2.0, 2.5, 2.0, 2.1]
    best = checkpoint.load(Path(small["out_dir"]) / "best.pt")
    assert best["iter_num"] == 4 and best["best_val_loss"] == 2.0


def test_auto_starts_then_goes_on_and_falls_back_to_the_file_before(small, capsys):
    run(small, init_from="auto")
    found = run(small, init_from="auto", max_iters=9)
    assert [record["iter"] for record in found if record["kind"] == "train"] == list(range(1, 10))
    latest = Path(small["out_dir"]) / "ckpt.pt"
    latest.write_bytes(latest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"ckpt\.pt"):
        run(small, init_from="resume", max_iters=12)
    found = run(small, init_from="auto", max_iters=12)  # its metrics, too, go back to step 6
    assert [record["iter"] for record in found if record["kind"] == "train"] == list(range(1, 13))
    assert "resuming from" in capsys.readouterr().err


def test_a_damaged_checkpoint_never_takes_the_place_of_the_whole_one_before(small):
    run(small)
    out = Path(small["out_dir"])
    (out / "ckpt.pt").write_bytes(b"damaged")
    run(small, init_from="auto")  # from step 3 to 6, with one save
    ends = {path.name: checkpoint.load(path)["iter_num"] for path in (out / "ckpt.pt", out / "ckpt.prev.pt")}
    assert ends == {"ckpt.pt": 6, "ckpt.prev.pt": 3}
    assert (out / "ckpt.damaged.pt").read_bytes() == b"damaged"


def test_eval_only_reports_any_split_and_trains_nothing(small, capsys):
    run(small)
    path = Path(small["out_dir"]) / "best.pt"
    before = path.read_bytes()
    expected = [record["loss"] for record in records(small["out_dir"]) if record["kind"] == "eval"]
    for split in ("val", "test", "train"):
        train.main(TrainConfig(**small | {"eval_only": True, "split": split, "init_from": str(path)}))
        out = capsys.readouterr().out
        assert f"{split}.bin: loss" in out and "bits/byte" in out and "alpha" in out and "beta" in out
        if split == "val":
            assert f"loss {min(expected):.4f}" in out
    assert path.read_bytes() == before


# --- loggers


def test_tensorboard_and_wandb_get_the_same_numbers(small, monkeypatch):
    seen = []

    class Run:
        def log(self, numbers):
            seen.append(numbers)

        def finish(self):
            seen.append("finished")

    wandb = type(sys)("wandb")
    wandb.init = lambda **options: seen.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    found = run(small, sample_tokens=60, tensorboard=True, wandb="offline")
    assert seen[0]["mode"] == "offline" and seen[0]["config"]["n_layer"] == 2 and seen[-1] == "finished"
    assert len(seen[1:-1]) == len(found)
    assert [numbers["train/loss"] for numbers in seen[1:-1] if "train/loss" in numbers] == losses(found)
    assert {"val/loss", "val/ppl", "val/bpb", "val/loss/alpha", "val/loss/beta"} <= set().union(*seen[1:-1])
    texts = [numbers["val/text"] for numbers in seen[1:-1] if "val/text" in numbers]
    assert len(texts) == 2 and all(len(text) > 50 for text in texts)
    board = EventAccumulator(small["out_dir"]).Reload()
    assert set(board.Tags()["scalars"]) >= {"train/loss", "train/mfu", "train/peak_mem_mb", "val/ppl", "val/loss/beta"}
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses(found))
    assert "val/text/text_summary" in board.Tags()["tensors"]


def test_a_run_that_goes_on_keeps_its_id_at_wandb(small, monkeypatch):
    seen = []
    wandb = type(sys)("wandb")
    wandb.init = lambda **options: seen.append(options) or type("Run", (), {"log": print, "finish": print})
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run(small, sample_tokens=20, wandb="offline", max_iters=3)
    run(small, sample_tokens=20, wandb="offline", init_from="auto")
    run(small, sample_tokens=20, wandb="offline")
    ids = [options["id"] for options in seen]
    assert ids[0] == ids[1] != ids[2] and all(options["resume"] == "allow" for options in seen)


def test_the_sample_for_the_loggers_leaves_training_as_it_is(small, tmp_path):
    with_sample = run(small, tensorboard=True, sample_tokens=20, dropout=0.1)
    assert losses(with_sample) == losses(run(small, dropout=0.1, out_dir=str(tmp_path / "plain")))


# --- what a run shows


def test_a_sample_at_each_evaluation_is_shown_in_a_log_file_too(small, monkeypatch, capsys):
    def shown(**keys) -> list[str]:
        """The lines after each evaluation's, until the next of the log."""
        capsys.readouterr()
        plain = {key: small[key] for key in small if key != "sample_tokens"}
        given = [f"--{key}={value}" for key, value in (plain | keys).items()]
        train.main(configurator.parse(TrainConfig, given))
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("    ")]

    first = shown(sample_tokens=20, dropout=0.1)
    curve = losses(records(small["out_dir"]))
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((30, 24)))
    assert shown(sample_tokens=0, dropout=0.1) == []
    assert losses(records(small["out_dir"])) == curve
    found = shown(dropout=0.1)
    assert len("".join(found)) > len("".join(first)) > 10 and all(len(line) <= 30 for line in found)
    assert losses(records(small["out_dir"])) == curve


def test_the_seconds_of_training_leave_out_evaluations(small, monkeypatch):
    ticks, pauses, evaluate = itertools.count(), [], train.evaluate

    def slow(*args):
        pauses.append(10_000)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) + sum(pauses))
    found = [r for r in run(small, max_iters=4, eval_interval=2, log_interval=1) if r["kind"] == "train"]
    assert len(pauses) == 2 and found[-1]["seconds"] < 1000
    laps = [after["seconds"] - before["seconds"] for before, after in itertools.pairwise(found)]
    assert [r["dt_ms"] for r in found[1:]] == pytest.approx([1000 * lap for lap in laps])


def test_a_samples_control_characters_do_not_reach_the_terminal():
    assert wrapped("a\x1b[2Jb\n\n  c\x07\td\u202e") == "    a [2Jb\n\n      c  d"


RECORD = {"kind": "train", "iter": 10, "loss": 1.0, "lr": 1e-3, "dt_ms": 100.0, "tok_per_sec": 1.0, "mfu": 0.1}
RESULT = {"loss": 1.0, "loss_se": 0.1, "ppl": 2.7, "bpb": 1.0, "loss_by_style": {}, "tokens": 9, "seconds": 30.0}


def test_overfitting_is_told_once_with_the_step_of_the_best_model(tmp_path, small, capsys):
    def told(train_loss: float, *val_losses: float) -> list[str]:
        log = Log(lambda: tmp_path, Progress(), find_machine("cpu", "float32"), [], report_of(small))
        progress = Progress()
        for val_loss in val_losses:
            progress.iter_num += 10
            log.train(RECORD | {"loss": train_loss}, max_iters=100, eval_interval=10)
            progress.note(val_loss)
            log.evaluation(progress, RESULT | {"loss": val_loss})
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("overfitting")]

    [line] = told(2.0, 5.0, 4.5, 4.6, 4.55, 4.7, 4.8, 4.9)
    assert "lowest, 4.5000, at step 20" in line and "--patience=3 stops" in line
    assert told(2.0, 5.0, 4.5, 4.6, 4.55, 4.4, 4.8, 4.9) == []  # it found a better one
    assert told(4.6, 5.0, 4.5, 4.6, 4.7, 4.8) == []  # it doesn't learn at all


def test_a_run_ends_with_its_losses_its_model_and_how_to_write_with_it(small, capsys, tmp_path):
    found = [r["loss"] for r in run(small, out_dir=str(tmp_path / "my poet"), max_iters=9) if r["kind"] == "eval"]
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0].startswith(f"best val loss {min(found):.4f} at step 9, the first was {found[0]:.4f}; ")
    assert lines[1:] == [
        f"the model: {tmp_path}/my poet/best.pt",
        f"to write with it: python sample.py '{tmp_path}/my poet/best.pt'",
    ]


def test_the_time_left_counts_evaluations(tmp_path, small, capsys):
    log = Log(lambda: tmp_path, Progress(), find_machine("cpu", "float32"), [], report_of(small))
    log.train(RECORD, max_iters=110, eval_interval=25)
    log.evaluation(Progress(iter_num=10), RESULT)
    log.train(RECORD, max_iters=110, eval_interval=25)
    etas = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "eta" in line]
    assert etas == ["0:10", "2:10"]  # 100 steps of 0.1 s; and 4 evaluations of 30 s


@pytest.mark.parametrize(
    ("steps", "given", "expected"),
    [(600, None, 60), (15, None, 2), (5, None, 1), (600_000, None, 1000), (600, 250, 250)],
)
@pytest.mark.parametrize("windows", [1, 10_000])
def test_evaluations_are_a_tenth_of_the_run_apart_however_small_the_text(steps, given, expected, windows):
    assert finish(TrainConfig(max_iters=steps, eval_interval=given), windows).eval_interval == expected


def test_a_runs_config_yaml_gives_the_same_run(small, tmp_path):
    keys = small | {"learning_rate": 1e-5, "dropout": 0.1, "eval_interval": None, "epochs": 0.3, "bias": False}
    first = run(keys)
    path = f"{small['out_dir']}/config.yaml"
    assert "n_layer: 2\n" in Path(path).read_text() and "seed" not in Path(path).read_text()
    train.main(configurator.parse(TrainConfig, [path]))
    assert losses(records(small["out_dir"])) == losses(first)
    assert Path(small["out_dir"], "previous/1/config.yaml").exists()


# --- loggers that fail


def test_tensorboard_takes_every_kind_of_key(small, capsys):
    pytest.importorskip("tensorboard")
    run(small, tensorboard=True, max_iters=2, plans=("1:9:1",))
    assert "left out" not in capsys.readouterr().err
    assert [*Path(small["out_dir"]).glob("events.out.tfevents.*")]


def test_a_failing_logger_never_stops_training(small, monkeypatch, capsys):
    class Run:
        def log(self, numbers):
            raise ConnectionError("the network is gone")

    wandb = type(sys)("wandb")
    wandb.init = lambda **options: Run()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it fails
    found = run(small, tensorboard=True, wandb="online")
    assert found[-1]["iter"] == 6
    err = capsys.readouterr().err
    assert (
        err.count("wandb failed") == 1
        and err.count("TensorBoard is left out") == err.count("pip install tensorboard") == 1
    )


# --- what users get wrong


def test_mistakes_are_told_before_training(small, tmp_path):
    run(small)
    (tmp_path / "file").write_text("")
    wrong = {
        "nowhere' is not prepared": {"dataset": str(tmp_path / "nowhere")},
        r"out_dir: .* can't be written": {"out_dir": str(tmp_path / "file" / "out")},
        "must have at least 100001; add text or lower block_size": {
            "block_size": 100_000,
            "out_dir": str(tmp_path / "new"),
        },
        "nothere.pt: not found": {"init_from": str(tmp_path / "nothere.pt")},
        "n_layer: the checkpoint has 2, the config 3": {"init_from": "resume", "n_layer": 3},
        "optimizer: the checkpoint has muon": {"init_from": "resume", "optimizer": "adamw"},
    }
    for message, changes in wrong.items():
        with pytest.raises((ValueError, OSError), match=message):
            train.main(TrainConfig(**small | changes))


def test_data_of_another_tokenizer_or_text_is_refused(small, books, tmp_path):
    run(small)
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.bin").write_bytes((books / f"{name}.bin").read_bytes())
    for key, message in {"tokenizer": "its tokenizer is not the dataset's", "text_sha256": "another text"}.items():
        meta = read_meta(books)
        tok = msgspec.structs.replace(meta.tokenizer, chars=meta.tokenizer.chars[::-1])
        meta = dataclasses.replace(meta, **({"tokenizer": tok} if key == "tokenizer" else {"text_sha256": "0" * 64}))
        (tmp_path / "meta.json").write_bytes(encode_meta(meta))
        with pytest.raises(CheckpointError, match=message):
            train.main(TrainConfig(**small | {"dataset": str(tmp_path), "init_from": "resume"}))


def test_command_line_mistakes_end_in_one_message_and_exit_code_2(small):
    keys = small | {"n_heads": 2, "batch_size": 0, "dtype": "int8"}
    done = run_script("train.py", *(f"--{key}={value}" for key, value in keys.items()))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for message in ("--n_heads: no such key; did you mean n_head?", "batch_size: found 0", "--dtype: found 'int8'"):
        assert message in done.stderr


def test_two_gloo_ranks_equal_one(small, tmp_path):
    keys = small | {"optimizer": "adamw", "max_iters": 20, "eval_interval": 10, "gradient_accumulation_steps": 4}
    one = run(keys, out_dir=str(tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    args = [f"--{key}={value}" for key, value in (keys | {"out_dir": tmp_path / "two"}).items()]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # as torchrun tells each rank
    with open(tmp_path / "printed", "w+") as printed:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), printed.fileno())
        ranks = [Script("train.py", *args, **streams, **world, RANK=str(i), LOCAL_RANK=str(i)) for i in range(2)]
        ends = [rank.wait() for rank in ranks]
    assert ends == [0, 0], (tmp_path / "printed").read_text()[-2000:]
    two = records(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    for a, b in zip(one, two, strict=True):
        assert a["kind"] == b["kind"] and a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    ends = [checkpoint.load(tmp_path / name / "ckpt.pt")["model"] for name in ("one", "two")]
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], atol=2e-3, rtol=0)
