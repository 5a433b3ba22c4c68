"""What only a GPU can show: its kernels, recording, and a run that evaluates, saves and resumes between replays."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS, assert_equal
from test_memory import last_words

import train
from robopoet.machine import Machine
from robopoet.text.dataset import read_meta
from robopoet.text.windows import TrainWindows, open_split
from robopoet.training.run import Progress, Run
from robopoet.weights.checkpoint import load_model
from robopoet.writing.decode import generate
from train import TrainConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PRECISION = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 1e-2}


@pytest.fixture(autouse=True)
def compile_afresh():
    torch.set_float32_matmul_precision("highest")  # a run before may have allowed TF32
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def losses_and_norms(cfg: TrainConfig, steps: int) -> tuple[np.ndarray, train.State]:
    """The loss and gradient norm of each step of a run, (steps, 2), read as late as train.py would; and its end."""
    machine, folder = Machine(torch.device("cuda"), getattr(torch, cfg.dtype)), Path(cfg.dataset)
    split = open_split(folder, "train", read_meta(folder), cfg.block_size, machine.device)
    windows = TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)
    state = train.build_state(cfg, machine, train.make_model(cfg, 61))  # a vocabulary that is padded
    assert (state.recorded_update is not None) == cfg.record
    found = []
    for step in range(steps):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            found.append([t.clone() for t in train.train_step(state, windows, step)])
    return np.array([[float(t) for t in pair] for pair in found]), state


@pytest.mark.parametrize(
    "optimizer, kind", [("adamw", "learned"), ("muon", "learned"), ("muon", "rotary"), ("muon", "llama")]
)
@pytest.mark.parametrize("dtype", PRECISION)
def test_recorded_compiled_and_plain_steps_learn_alike(small, optimizer, kind, dtype):
    keys = small | KINDS[kind] | {"optimizer": optimizer, "device": "cuda", "dtype": dtype}
    keys |= {"gradient_accumulation_steps": 2}
    plain, compiled, recorded, recorded_plain = (
        losses_and_norms(TrainConfig(**keys | {"compile": how, "record": record}), 14)[0]
        for how, record in (("false", False), ("true", False), ("true", True), ("false", True))
    )
    np.testing.assert_allclose(compiled, plain, rtol=PRECISION[dtype])
    np.testing.assert_allclose(recorded, compiled, rtol=PRECISION[dtype])
    np.testing.assert_allclose(recorded_plain, plain, rtol=PRECISION[dtype])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recorded_step_draws_its_dropout_as_an_unrecorded_one(small, optimizer):
    keys = small | {"optimizer": optimizer, "device": "cuda", "compile": "true", "dropout": 0.2}
    without, unrecorded, recorded = (
        losses_and_norms(TrainConfig(**keys | changes), 14)[0]
        for changes in ({"dropout": 0.0}, {"record": False}, {"record": True})
    )
    np.testing.assert_allclose(recorded, unrecorded, rtol=1e-3)
    assert abs(without[:, 0] - unrecorded[:, 0]).max() > 1e-3


def test_a_step_that_is_not_finite_updates_nothing_while_it_is_replayed(small, monkeypatch):
    cfg = TrainConfig(**small | {"device": "cuda", "compile": "true", "record": True})
    losses_and_norms(cfg, 1)
    machine, folder = Machine(torch.device("cuda"), torch.float32), Path(cfg.dataset)
    split = open_split(folder, "train", read_meta(folder), cfg.block_size, machine.device)
    windows = TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)
    state = train.build_state(cfg, machine, train.make_model(cfg, 61))
    for step in range(6):
        train.train_step(state, windows, step)
    state.model.transformer.ln_f.weight.data[0] = torch.inf
    before = [p.detach().clone() for p in state.model.parameters()]
    train.train_step(state, windows, 6)
    assert state.trouble.first.tolist() == [6, 1]
    for p, was in zip(state.model.parameters(), before, strict=True):
        assert torch.equal(p, was)


def run(keys: dict, **changes) -> list[float]:
    """The losses that a run of train.py logs, a step each."""
    cfg = TrainConfig(**keys | changes)
    train.main(cfg)
    lines = (Path(cfg.out_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record.get("kind") == "train"]


@pytest.mark.parametrize("record", [False, True])
def test_a_run_evaluates_saves_and_resumes_between_replays(small, tmp_path, record):
    keys = small | {"device": "cuda", "compile": "true", "record": record, "dropout": 0.1, "max_iters": 14}
    keys |= {"lr_decay_iters": 14, "eval_interval": 2, "tensorboard": True}  # which samples at every evaluation
    whole = run(keys, out_dir=str(tmp_path / "whole"))
    for until in (1, 5, 7):  # ended before the recording, right after it, and between replays
        out = str(tmp_path / f"part{until}")
        run(keys, out_dir=out, max_iters=until)
        parts = run(keys, out_dir=out, init_from="resume")
        np.testing.assert_allclose(parts, whole, rtol=1e-3)


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_writing_equals_unrecorded_beyond_the_window(small, tmp_path, dtype, rows, kind):
    run(small, device="cpu", max_iters=3, **KINDS[kind])
    best = Path(small["out_dir"]) / "best.pt"
    model, _, _ = load_model(best, torch.device("cuda"), getattr(torch, dtype))
    prompt = torch.arange(rows * 4, device="cuda").view(rows, 4) % 50
    ids = [
        torch.stack(list(generate(model, prompt, 80, lambda logits: logits.argmax(-1), record=record)))
        for record in (False, True)
    ]
    assert torch.equal(*ids)


def test_evaluation_needs_little_more_than_its_logits(small):
    keys = small | {"device": "cuda", "n_layer": 1, "n_embd": 16, "block_size": 512}
    model = train.make_model(TrainConfig(**keys), 50_257).to("cuda", torch.bfloat16).eval()
    idx = torch.zeros(8, 512, dtype=torch.long, device="cuda")
    logits_bytes = 2 * idx.numel() * 50_257
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        model(idx, idx, reduction="none")
    assert torch.cuda.max_memory_allocated() - before < 1.5 * logits_bytes + 2**29


def test_without_a_gpu_large_enough_a_script_ends_in_one_line(small, capsys, monkeypatch):
    torch.cuda.set_per_process_memory_fraction(64 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
    try:
        said = last_words(small | {"device": "cuda", "batch_size": 4096}, monkeypatch, capsys)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "--batch_size=2048 --gradient_accumulation_steps=2 (now 4096 and 1; the same losses)" in said


@pytest.mark.parametrize("record", [False, True])
def test_what_a_thread_writes_is_the_state_at_the_save_though_steps_go_on(small, tmp_path, record):
    cfg = TrainConfig(**small | {"device": "cuda", "optimizer": "muon", "ema": 0.9, "record": record})
    machine, folder = Machine(torch.device("cuda"), torch.float32), Path(cfg.dataset)
    meta = read_meta(folder)
    split = open_split(folder, "train", meta, cfg.block_size, machine.device)
    windows = TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)
    state = train.build_state(cfg, machine, train.make_model(cfg, meta.vocab_size))
    at_once, later = (Run(tmp_path / name, {}, meta, machine) for name in ("at_once", "later"))
    at_once.saver.in_background = False
    for step in range(20):
        if step % 3 == 0:  # before, at and after the recording
            content = (state.model, state.optimizers, state.scaler, Progress(iter_num=step), -step, state.average)
            at_once.save(*content)
            later.save(*content)
        train.train_step(state, windows, step)
        if step % 3 == 2:
            later.saver.wait()
            assert_equal(*(torch.load(each.out / "ckpt.pt", map_location="cpu") for each in (at_once, later)))
    assert later.saver.in_background and not later.unsaved
