import contextlib
import copy
import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA, records
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import train
from model import GPT
from robopoet.errors import ConfigError
from robopoet.machine import Machine, why_no_compile
from robopoet.text.dataset import read_meta
from robopoet.text.windows import EvalPlan, TrainWindows, open_split
from robopoet.training.evaluate import evaluate
from robopoet.training.schedule import StepRows
from train import State, TrainConfig

CPU = Machine(torch.device("cpu"), torch.float32)


def run(keys: dict, **changes) -> list[dict]:
    """Train with those keys; returns the records of metrics.jsonl."""
    cfg = TrainConfig(**keys | changes)
    assert cfg.problems() == []
    train.main(cfg)
    return records(cfg.out_dir)


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
    state = train.build_state(cfg, CPU, train.make_model(cfg, 64))
    sgd = torch.optim.SGD(state.model.parameters(), lr=1.0, fused=True)
    sgd.param_groups[0]["peak_lr"] = 1.0
    state.optimizers = [sgd]
    return state


def weights(model: GPT) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- the schedule


def test_learning_rate_at_its_corners():
    cfg = TrainConfig(learning_rate=2e-3, min_lr=2e-4, warmup_iters=4, max_iters=24)
    shares = [cfg.schedule.lr_scale(step) for step in range(30)]
    assert shares[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])  # warmup starts above 0 and reaches 1 after it
    assert shares[4] == 1.0
    assert shares[14] == pytest.approx((1 + 0.1) / 2)  # half way down the cosine
    assert shares[24:] == pytest.approx([0.1] * 6)
    assert shares[4:25] == sorted(shares[4:25], reverse=True)
    for step in range(4, 24):
        assert shares[step] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * (step - 4) / 20)))
    assert dataclasses.replace(cfg, warmup_iters=0).schedule.lr_scale(0) == 1.0
    assert dataclasses.replace(cfg, decay_lr=False).schedule.lr_scale(29) == 1.0
    assert dataclasses.replace(cfg, lr_decay_iters=12).schedule.lr_scale(12) == pytest.approx(0.1)
    assert dataclasses.replace(cfg, warmup_iters=24).schedule.lr_scale(0) == pytest.approx(1 / 25)


def test_each_group_follows_the_schedule_from_its_own_peak(small):
    cfg = TrainConfig(**small | {"warmup_iters": 0, "max_iters": 10})
    state = train.build_state(cfg, CPU, train.make_model(cfg, 64))
    train.train_step(state, windows_of(small), 5)
    rates = {type(o).__name__: [group["lr"] for group in o.param_groups] for o in state.optimizers}
    assert rates["AdamW"] == pytest.approx([cfg.peak_lr / 2] * 2)
    assert rates["Muon"] == pytest.approx([cfg.muon_learning_rate / 2])


# --- the step


def test_the_rows_of_a_step_are_shared_equally_or_refused():
    for ranks in (1, 2, 3, 4, 6, 8, 16, 24, 48):
        rows = StepRows(12, 4, ranks)
        assert rows.count * rows.size * ranks == 48 and rows.size <= 12
    with pytest.raises(ConfigError, match="4 x 12 = 48 rows a step can't be shared equally by 5 ranks"):
        StepRows(12, 4, 5)


@pytest.mark.parametrize("kind", [{}, LLAMA], ids=["gpt2", "llama"])
def test_accumulating_micro_batches_equals_one_batch(small, kind):
    small, results = small | kind, []
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
    state = train.build_state(cfg, CPU, train.make_model(cfg, 64))
    for step in range(cfg.max_iters):
        loss, _ = train.train_step(state, windows, step)
    assert loss.item() < 0.05


def test_the_seed_of_a_step_differs_by_step_and_rank_and_by_nothing_else():
    places = [(1337, step, rank) for step in range(5) for rank in range(4)]
    seeds = [train.step_seed(*place) for place in places]
    assert len(set(seeds)) == len(seeds)
    torch.manual_seed(5)
    assert seeds == [train.step_seed(*place) for place in places]


def test_ranks_that_read_the_same_rows_drop_other_numbers_of_them(small, monkeypatch):
    keys, found = small | {"dropout": 0.5}, []
    windows, cfg = windows_of(keys), TrainConfig(**keys)
    rows = windows.batch(0, 8, CPU.device)
    monkeypatch.setattr(windows, "batch", lambda *place: rows)
    for rank in (0, 1, 1):
        state = train.build_state(cfg, CPU, train.make_model(cfg, 64))
        state.machine = dataclasses.replace(CPU, rank=rank)
        found.append(train.train_step(state, windows, 0)[0].item())
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_an_overflow_in_float16_stops_every_optimizer_and_lowers_the_scale(small, optimizer):
    keys = small | {"optimizer": optimizer, "dtype": "float16"}
    cfg, machine, windows = TrainConfig(**keys), Machine(CPU.device, torch.float16), windows_of(keys)
    state = train.build_state(cfg, machine, train.make_model(cfg, 64))
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
        monkeypatch.setattr("robopoet.machine.capture_stream", lambda: stream)

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
        graphed = self.state.recorded_update
        for result, now in zip(graphed.results, graphed.function(*graphed.arguments), strict=True):
            result.copy_(now)
        self.replays += 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_recorded_step_is_given_each_steps_rows_seed_and_rate(small, monkeypatch, optimizer):
    keys = small | {"optimizer": optimizer, "dropout": 0.1, "gradient_accumulation_steps": 2}
    cfg, windows = TrainConfig(**keys), windows_of(keys)
    ends = []
    for recorded in (False, True):
        state = train.build_state(cfg, CPU, train.make_model(cfg, 64))
        if recorded:
            device = RecordedOnCPU(monkeypatch, state)
            state.recorded_update = train.Graphed(functools.partial(train.update, state))
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
    tok = meta.load_tokenizer()
    found = []
    for recorded in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        state = train.build_state(cfg, CPU, train.make_model(cfg, meta.vocab_size))
        if recorded:
            state.forward = torch.compile(state.model, backend="aot_eager")
            device = RecordedOnCPU(monkeypatch, state)
            state.recorded_update = train.Graphed(functools.partial(train.update, state))
        losses = []
        for step in range(6):
            with torch._dynamo.config.patch(error_on_recompile=True):
                losses.append(float(train.train_step(state, windows, step)[0]))
            if step in (1, 4):
                evaluate(state.model, val, tok, EvalPlan(cfg.block_size, cfg.batch_size), CPU)
        found.append(losses)
    assert device.replays == 3 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_a_compiled_backward_is_given_no_gradient_for_the_logits(small):
    cfg, sizes = TrainConfig(**small), []

    def count(graph, inputs):
        sizes.append([tuple(node.meta["val"].shape) for node in graph.graph.nodes if node.op == "placeholder"])
        return make_boxed_func(graph)

    torch._dynamo.reset()
    model = train.make_model(cfg, 61)
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
        state = train.build_state(cfg, machine, train.make_model(cfg, 61))
        assert (state.forward is not state.model) == (how == "true")
        steps = [train.train_step(state, windows, step) for step in range(6)]
        found.append([(loss.item(), norm.item()) for loss, norm in steps])
    np.testing.assert_allclose(found[1], found[0], rtol=precision)


def test_each_optimizer_has_a_learning_rate_of_its_own_unless_one_is_given():
    kinds = "muon", "adamw", "adafactor"
    assert [TrainConfig(optimizer=kind).peak_lr for kind in kinds] == [1e-2, 1e-3, 2e-3]
    assert all(TrainConfig(optimizer=kind, learning_rate=5e-4).peak_lr == 5e-4 for kind in kinds)
    assert TrainConfig(optimizer="adamw", min_lr=5e-4, max_iters=10).schedule.lr_scale(99) == pytest.approx(0.5)
