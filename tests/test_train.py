import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.backends.common import aot_autograd

import train
from configurator import ConfigError
from model import GPT, GPTConfig
from robopoet.errors import CheckpointError
from robopoet.machine import Machine, why_no_compile
from robopoet.text import tokenizer
from robopoet.text.batches import EvalPlan, TrainWindows, encode_meta, eval_batches, open_split, read_meta
from robopoet.training.evaluate import compare_tags, evaluate
from robopoet.weights import checkpoint
from train import State, TrainConfig

CPU = Machine(torch.device("cpu"), torch.float32)


def run(keys: dict, **changes) -> list[dict]:
    """Train with those keys; returns the records of metrics.jsonl."""
    cfg = TrainConfig(**keys | changes)
    assert cfg.problems() == []
    train.main(cfg)
    return records(cfg.out_dir)


def records(out_dir: str) -> list[dict]:
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(found: list[dict]) -> list[float]:
    return [record["loss"] for record in found if record["kind"] == "train"]


def windows_of(keys: dict, **changes) -> TrainWindows:
    cfg = TrainConfig(**keys | changes)
    meta = read_meta(Path(cfg.dataset))
    split = open_split(Path(cfg.dataset), "train", meta, cfg.block_size, CPU.device)
    return TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)


def sgd_state(keys: dict, **changes) -> State:
    """A state whose step is w -= gradient, so that the change of the weights shows the gradient."""
    cfg = TrainConfig(**keys | changes)
    state = train.build_state(cfg, CPU, train.new_model(cfg, 64))
    sgd = torch.optim.SGD(state.model.parameters(), lr=1.0, fused=True)
    sgd.param_groups[0]["peak_lr"] = 1.0
    state.optimizers = [sgd]
    return state


def weights(model: GPT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- the schedule


def test_learning_rate_at_its_corners():
    cfg = TrainConfig(learning_rate=2e-3, min_lr=2e-4, warmup_iters=4, max_iters=24)
    shares = [train.lr_scale(step, cfg) for step in range(30)]
    assert shares[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])  # warmup starts above 0 and reaches 1 after it
    assert shares[4] == 1.0
    assert shares[14] == pytest.approx((1 + 0.1) / 2)  # half way down the cosine
    assert shares[24:] == pytest.approx([0.1] * 6)
    assert shares[4:25] == sorted(shares[4:25], reverse=True)
    for step in range(4, 24):
        assert shares[step] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 20)))
    assert train.lr_scale(0, dataclasses.replace(cfg, warmup_iters=0)) == 1.0
    assert train.lr_scale(29, dataclasses.replace(cfg, decay_lr=False)) == 1.0
    assert train.lr_scale(12, dataclasses.replace(cfg, lr_decay_iters=12)) == pytest.approx(0.1)
    assert train.lr_scale(0, dataclasses.replace(cfg, warmup_iters=24)) == pytest.approx(1 / 25)


def test_each_group_follows_the_schedule_from_its_own_peak(small):
    cfg = TrainConfig(**small | {"warmup_iters": 0, "max_iters": 10})
    state = train.build_state(cfg, CPU, train.new_model(cfg, 64))
    train.train_step(state, windows_of(small), 5)
    rates = {type(o).__name__: [group["lr"] for group in o.param_groups] for o in state.optimizers}
    assert rates["AdamW"] == pytest.approx([cfg.learning_rate / 2] * 2)
    assert rates["Muon"] == pytest.approx([cfg.muon_learning_rate / 2])


# --- the step


def test_the_rows_of_a_step_are_shared_equally_or_refused(small_config):
    cfg = dataclasses.replace(small_config, batch_size=12, gradient_accumulation_steps=4)
    for ranks in (1, 2, 3, 4, 6, 8, 16, 24, 48):
        count, rows = train.micro_batches(cfg, Machine(CPU.device, CPU.dtype, 0, ranks))
        assert count * rows * ranks == 48 and rows <= 12
    with pytest.raises(ConfigError, match="4 x 12 = 48 rows a step can't be shared equally by 5 ranks"):
        train.micro_batches(cfg, Machine(CPU.device, CPU.dtype, 0, 5))


def test_accumulating_micro_batches_equals_one_batch(small):
    results = []
    for batch_size, accumulated in ((16, 1), (4, 4), (2, 8)):
        keys = small | {"batch_size": batch_size, "gradient_accumulation_steps": accumulated, "grad_clip": 0.0}
        state = sgd_state(keys)
        before = weights(state.model)
        loss, norm = train.train_step(state, windows_of(keys), 3)
        results.append((loss, norm, weights(state.model) - before))
    for loss, norm, change in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(norm, results[0][1])
        torch.testing.assert_close(change, results[0][2], atol=1e-6, rtol=1e-4)


def test_gradients_are_those_of_the_mean_loss_and_clipped_to_the_norm(small):
    keys = small | {"warmup_iters": 0, "grad_clip": 0.01}
    state, windows = sgd_state(keys), windows_of(keys)
    oracle = sgd_state(keys).model.double()
    inputs, targets = windows.batch(0, 8, CPU.device)
    _, loss = oracle(inputs, targets)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in oracle.parameters()])
    before = weights(state.model)
    found, norm = train.train_step(state, windows, 0)
    assert found.item() == pytest.approx(loss.item(), abs=1e-5)
    assert norm.item() == pytest.approx(gradient.norm().item(), rel=1e-4)
    change = (weights(state.model) - before).double()
    torch.testing.assert_close(change, -gradient * 0.01 / gradient.norm(), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_one_batch_to_near_zero(small, optimizer):
    keys = small | {"optimizer": optimizer, "max_iters": 100, "learning_rate": 1e-2, "tag_prob": 0.0}
    cfg, windows = TrainConfig(**keys), windows_of(keys)
    windows.rows = lambda first, count: (np.arange(count) * cfg.block_size, np.full(count, -1))
    state = train.build_state(cfg, CPU, train.new_model(cfg, 64))
    for step in range(cfg.max_iters):
        loss, _ = train.train_step(state, windows, step)
    assert loss.item() < 0.05


def test_dropouts_seed_differs_by_step_and_rank_and_by_nothing_else():
    places = [(1337, step, rank) for step in range(5) for rank in range(4)]
    seeds = [train.dropout_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    torch.manual_seed(5)
    assert seeds == [train.dropout_seed(*place) for place in places]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_in_float16_stops_both_optimizers_and_lowers_the_scale(small, optimizer):
    keys = small | {"optimizer": optimizer, "dtype": "float16"}
    cfg, machine, windows = TrainConfig(**keys), Machine(CPU.device, torch.float16), windows_of(keys)
    state = train.build_state(cfg, machine, train.new_model(cfg, 64))
    train.train_step(state, windows, 0)
    before, scale = weights(state.model), state.scaler.get_scale()
    wte = state.model.transformer.wte.weight
    handle = wte.register_hook(lambda grad: grad * math.inf)  # AdamW's; what Muon has is finite
    train.train_step(state, windows, 1)
    handle.remove()
    assert torch.equal(weights(state.model), before) and state.scaler.get_scale() == scale / 2
    _, norm = train.train_step(state, windows, 2)
    assert norm.isfinite() and not torch.equal(weights(state.model), before)


class RecordedOnCPU:
    """Stands in for torch.cuda: recording changes nothing, replaying does what was recorded."""

    def __init__(self, monkeypatch, state: State):
        self.state, self.replays = state, 0
        stream = contextlib.nullcontext()
        stream.wait_stream = lambda other: None
        for name, made in {
            "CUDAGraph": lambda: self,
            "current_stream": lambda: stream,
            "stream": lambda stream: stream,
            "graph": lambda graph, stream: self,
        }.items():
            monkeypatch.setattr(torch.cuda, name, made)
        monkeypatch.setattr("robopoet.recording.capture_stream", lambda: stream)

    def __enter__(self):
        self.random = torch.get_rng_state()
        self.before = copy.deepcopy([self.state.model.state_dict(), [o.state_dict() for o in self.state.optimizers]])

    def __exit__(self, *raised):
        model, optimizers = self.before
        self.state.model.load_state_dict(model)
        for optimizer, before in zip(self.state.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(before)
        torch.set_rng_state(self.random)

    def replay(self):
        graphed = self.state.graphed_update
        for result, now in zip(graphed.results, graphed.function(*graphed.arguments), strict=True):
            result.copy_(now)
        self.replays += 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recorded_step_is_given_each_steps_rows_seed_and_rate(small, monkeypatch, optimizer):
    keys = small | {"optimizer": optimizer, "dropout": 0.1, "gradient_accumulation_steps": 2}
    cfg, windows = TrainConfig(**keys), windows_of(keys)
    ends = []
    for recorded in (False, True):
        state = train.build_state(cfg, CPU, train.new_model(cfg, 64))
        if recorded:
            device = RecordedOnCPU(monkeypatch, state)
            state.graphed_update = train.Graphed(functools.partial(train.update, state))
        found = [tuple(float(x) for x in train.train_step(state, windows, step)) for step in range(6)]
        ends.append((found, weights(state.model)))
    assert device.replays == 3
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=1e-5)
    torch.testing.assert_close(ends[1][1], ends[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_nothing_is_compiled_anew_while_a_step_is_recorded(small, books, monkeypatch, optimizer):
    keys = small | {"optimizer": optimizer, "gradient_accumulation_steps": 2}
    cfg, windows, meta = TrainConfig(**keys), windows_of(keys), read_meta(books)
    val = open_split(books, "val", meta, cfg.block_size, CPU.device)
    token_bytes = tokenizer.token_bytes(tokenizer.from_json(meta.tokenizer))
    found = []
    for recorded in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        state = train.build_state(cfg, CPU, train.new_model(cfg, meta.vocab_size))
        if recorded:
            state.forward = torch.compile(state.model, backend="aot_eager")
            device = RecordedOnCPU(monkeypatch, state)
            state.graphed_update = train.Graphed(functools.partial(train.update, state))
        losses = []
        for step in range(6):
            with torch._dynamo.config.patch(error_on_recompile=True):
                losses.append(float(train.train_step(state, windows, step)[0]))
            if step in (1, 4):
                evaluate(state.model, val, token_bytes, EvalPlan(cfg.block_size, cfg.batch_size), CPU)
        found.append(losses)
    assert device.replays == 3 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_a_compiled_backward_is_given_no_gradient_for_the_logits(small):
    cfg, sizes = TrainConfig(**small), []

    def count(graph, inputs):
        sizes.append([tuple(node.meta["val"].shape) for node in graph.graph.nodes if node.op == "placeholder"])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    model = train.new_model(cfg, 61)
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    idx = torch.zeros(8, 32, dtype=torch.long)
    torch.compile(model, backend=backend, fullgraph=True)(idx, idx)[1].backward()
    backward = sizes[1]
    assert () in backward  # the loss's
    assert all(shape[-1:] != (61,) or len(shape) < 3 for shape in backward)


@pytest.mark.slow
@pytest.mark.skipif(why_no_compile(CPU.device) is not None, reason="can't compile here")
@pytest.mark.parametrize("dtype, precision", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_compiled_steps_on_cpu_learn_as_plain_ones(small, dtype, precision):
    machine, windows, found = Machine(CPU.device, getattr(torch, dtype)), windows_of(small), []
    for how in ("false", "true"):
        cfg = TrainConfig(**small | {"dtype": dtype, "compile": how})
        state = train.build_state(cfg, machine, train.new_model(cfg, 61))
        assert (state.forward is not state.model) == (how == "true")
        steps = [train.train_step(state, windows, step) for step in range(6)]
        found.append([(loss.item(), norm.item()) for loss, norm in steps])
    np.testing.assert_allclose(found[1], found[0], rtol=precision)


# --- evaluation


def test_evaluation_equals_a_naive_loop(small, small_config, books):
    meta = read_meta(books)
    split = open_split(books, "val", meta, 32, CPU.device)
    lengths = tokenizer.token_bytes(tokenizer.from_json(meta.tokenizer))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=meta.vocab_size, n_layer=2, n_head=2, n_embd=32)).double()
    nats, count, size, means = {}, {}, 0, []
    for entry in meta.splits["val"].documents:
        ids = split.tokens[entry.start : entry.stop].long()
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            inputs = window[:-1].clone()
            inputs[0] = meta.styles[entry.style]
            logits = model(inputs[None], targets=window[None, 1:])[0][0]
            found = [-logits[i].log_softmax(-1)[target].item() for i, target in enumerate(window[1:])]
            nats[entry.style] = nats.get(entry.style, 0) + sum(found)
            count[entry.style] = count.get(entry.style, 0) + len(found)
            size += sum(lengths[target] for target in window[1:])
            means.append(np.mean(found))
    plan = EvalPlan(small_config.block_size, small_config.batch_size)
    result = evaluate(model, split, lengths, plan, CPU)
    total = sum(nats.values()) / sum(count.values())
    assert result["loss"] == pytest.approx(total, abs=1e-9)
    assert result["ppl"] == pytest.approx(math.exp(total))
    assert result["bpb"] == pytest.approx(sum(nats.values()) / math.log(2) / size)
    assert result["loss_by_style"] == pytest.approx({style: nats[style] / count[style] for style in nats})
    assert result["loss_se"] == pytest.approx(np.std(means) / math.sqrt(len(means)))
    assert result["tokens"] == sum(count.values()) == sum(e.stop - e.start - 1 for e in meta.splits["val"].documents)


def test_evaluation_shared_by_ranks_sums_to_the_whole(small_config, books, monkeypatch):
    meta = read_meta(books)
    split = open_split(books, "val", meta, 32, CPU.device)
    plan, ranks = EvalPlan(32, 8), [dataclasses.replace(CPU, rank=rank, world_size=2) for rank in range(2)]
    whole = [batch.targets for batch in eval_batches(split, plan, CPU)]
    shared = [[b.targets for b in eval_batches(split, plan, rank)] for rank in ranks]
    assert sum(map(len, shared)) == len(whole)
    for i, batch in enumerate(whole):
        assert torch.equal(batch, shared[i % 2][i // 2])


# --- whole runs


def test_a_run_learns_and_leaves_what_it_promises(small):
    found = run(small, max_iters=40, eval_interval=20, log_interval=10)
    out = Path(small["out_dir"])
    assert {path.name for path in out.iterdir()} == {"ckpt.pt", "ckpt.prev.pt", "best.pt", "metrics.jsonl", ".lock"}
    trained = [record for record in found if record["kind"] == "train"]
    evaluated = [record for record in found if record["kind"] == "eval"]
    assert [record["iter"] for record in trained] == [1, 10, 20, 30, 40]
    assert [record["iter"] for record in evaluated] == [20, 40]
    assert trained[-1]["loss"] < trained[0]["loss"] - 0.5
    assert trained[-1]["tokens"] == 40 * 8 * 32
    assert set(trained[0]) >= {"iter", "loss", "lr", "grad_norm", "dt_ms", "tok_per_sec", "mfu", "tokens", "seconds"}
    assert set(evaluated[0]) >= {"iter", "split", "loss", "ppl", "bpb", "loss_by_style", "tokens", "seconds"}
    best = checkpoint.load(out / "best.pt")
    assert best["best_val_loss"] == min(record["loss"] for record in evaluated)
    assert "optimizer" not in best
    assert checkpoint.load(out / "ckpt.prev.pt")["iter_num"] == 20


@pytest.mark.parametrize(
    "optimizer, dtype", [("adamw", "float32"), ("adamw", "bfloat16"), ("muon", "float32"), ("muon", "bfloat16")]
)
def test_resuming_equals_an_uninterrupted_run(small, tmp_path, optimizer, dtype):
    keys = small | {"optimizer": optimizer, "dtype": dtype, "dropout": 0.2, "gradient_accumulation_steps": 2}
    keys |= {"max_iters": 40, "lr_decay_iters": 40, "eval_interval": 10, "eval_iters": 2}  # 16 rows x 40: over an epoch
    assert windows_of(keys).per_epoch < 40 * 16
    whole = run(keys, out_dir=str(tmp_path / "whole"))
    run(keys, out_dir=str(tmp_path / "parts"), max_iters=30)
    parts = run(keys, out_dir=str(tmp_path / "parts"), init_from="resume")
    assert losses(parts) == losses(whole)
    ends = [checkpoint.load(tmp_path / name / "ckpt.pt") for name in ("whole", "parts")]
    assert ends[0]["iter_num"] == ends[1]["iter_num"] == 40
    for name, p in ends[0]["model"].items():
        assert torch.equal(p, ends[1]["model"][name])
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


def test_float16_trains_with_its_scaler_and_resumes_it(small):
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


def test_a_new_run_can_start_from_any_checkpoint_and_takes_its_shape(small, shapeless, tmp_path):
    run(small)
    path = str(Path(small["out_dir"]) / "best.pt")
    found = run(shapeless, out_dir=str(tmp_path / "tuned"), init_from=path, learning_rate=1e-5)
    assert found[0]["iter"] == 1
    assert checkpoint.load(tmp_path / "tuned" / "best.pt")["model_args"]["n_layer"] == 2


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


def test_the_cost_of_a_wrong_tag_is_that_of_a_naive_loop(small, small_config, books):
    model = train.new_model(small_config, read_meta(books).vocab_size).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    meta = read_meta(books)
    split = open_split(books, "val", meta, 32, CPU.device)
    found = compare_tags(model, split, meta.styles, EvalPlan(small_config.block_size, small_config.batch_size), CPU)
    assert found.keys() == {("alpha", "beta"), ("beta", "alpha")}
    for document, style in enumerate(split.styles):
        wrong = next(tag for name, tag in meta.styles.items() if name != style)
        more = []
        ids = split.tokens[split.starts[document] : split.stops[document]].long()
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            losses = []
            for tag in (meta.styles[style], wrong):
                inputs = torch.cat([torch.tensor([tag]), window[1:-1]])
                logits = model(inputs[None], inputs[None])[0][0]
                losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
            more.append(losses[1] - losses[0])
        mean, error = found[style, "beta" if style == "alpha" else "alpha"]
        assert mean == pytest.approx(np.mean(more)) and error == pytest.approx(np.std(more) / len(more) ** 0.5)


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
    found = run(small, tensorboard=True, wandb="offline")
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
    run(small, wandb="offline", max_iters=3)
    run(small, wandb="offline", init_from="auto")
    run(small, wandb="offline")
    ids = [options["id"] for options in seen]
    assert ids[0] == ids[1] != ids[2] and all(options["resume"] == "allow" for options in seen)


def test_the_sample_for_the_loggers_leaves_training_as_it_is(small, tmp_path):
    with_sample = run(small, tensorboard=True, dropout=0.1)
    assert losses(with_sample) == losses(run(small, dropout=0.1, out_dir=str(tmp_path / "plain")))


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
        "must have at least block_size": {"block_size": 100_000, "out_dir": str(tmp_path / "new")},
        "warmup_iters: found 7": {"warmup_iters": 7},
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


def command(keys: dict, *launcher: str) -> subprocess.CompletedProcess:
    args = [f"--{key}={value}" for key, value in keys.items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, "train.py", *args], capture_output=True, text=True, env=environment
    )


def test_command_line_mistakes_end_in_one_message_and_exit_code_2(small):
    done = command(small | {"n_heads": 2, "batch_size": 0, "dtype": "int8"})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for message in ("--n_heads: no such key; did you mean n_head?", "batch_size: found 0", "--dtype: found 'int8'"):
        assert message in done.stderr


def test_two_gloo_ranks_equal_one(small, tmp_path):
    keys = small | {"optimizer": "adamw", "max_iters": 20, "eval_interval": 10, "gradient_accumulation_steps": 4}
    one = run(keys, out_dir=str(tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    done = command(keys | {"out_dir": tmp_path / "two"}, *launcher)
    assert done.returncode == 0, done.stderr[-2000:]
    two = records(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    for a, b in zip(one, two, strict=True):
        assert a["kind"] == b["kind"] and a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    ends = [checkpoint.load(tmp_path / name / "ckpt.pt")["model"] for name in ("one", "two")]
    for name, p in ends[0].items():
        torch.testing.assert_close(p, ends[1][name], atol=2e-3, rtol=0)
