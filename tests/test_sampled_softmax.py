"""The sampled softmax: every id is drawn as often as it should be, so that sums over a sample are right on average."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ranks import losses, train_on_two
from test_train import run
from torch.utils.flop_counter import FlopCounterMode

import train
from model import GPT, GPTConfig
from robopoet.machine import Machine
from robopoet.text.dataset import read_meta
from robopoet.text.windows import TrainWindows, open_split
from robopoet.training import loss
from robopoet.training.loss import SampledSoftmax, inclusion_probabilities, sampling_weights
from robopoet.weights import checkpoint
from train import TrainConfig

CPU = torch.device("cpu")
MACHINE = Machine(CPU, torch.float32)
V, T = 60, 16


class Sampler(SampledSoftmax):
    """One whose ids are weighted as Zipf's law has it."""

    def __init__(self, size: int):
        self.weights, self.size, self.machine = 1 / torch.arange(1, V + 1, dtype=torch.float64), size, MACHINE


def make_model(**changes) -> GPT:
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=2, n_head=2, n_embd=16, **changes)).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, some of which are ignored."""
    torch.manual_seed(2)
    idx, targets = torch.randint(V, (2, 4, T)) // torch.tensor([1, 3])[:, None, None]
    targets[0, :5] = -1
    return idx, targets


@pytest.mark.parametrize("size", [1, 5, 30, 59, 60])
def test_inclusion_probabilities_are_proportional_to_the_weights_unless_certain(size):
    weights = torch.rand(V, generator=torch.Generator().manual_seed(size), dtype=torch.float64) ** 4 + 1e-6
    low, high = 0.0, 1e9
    for _ in range(200):  # the factor by bisection
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1, middle * w) for w in weights.tolist()) < size else (low, middle)
    found = inclusion_probabilities(weights, size)
    torch.testing.assert_close(found, (weights * high).clamp(max=1), atol=1e-9, rtol=1e-9)
    assert found.sum().item() == pytest.approx(size, abs=1e-6)


def test_equal_weights_are_drawn_with_equal_probability():
    for n in (1, 7, 64):
        torch.testing.assert_close(inclusion_probabilities(torch.full((n,), 0.3).double(), n), torch.ones(n).double())


def test_a_sample_of_all_ids_gives_the_loss_and_gradients_of_the_full_softmax():
    (idx, targets), full, sampled = rows(), make_model(), make_model()
    _, expected = full(idx, targets)
    places, (ids, shifts) = Sampler(V)(targets)
    assert sorted(ids.tolist()) == list(range(V)) and not shifts.any()
    _, loss = sampled(idx, places, candidates=(ids, shifts))
    for each in (expected, loss):
        each.backward()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-12)
    for a, b in zip(sampled.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-9)


def test_the_loss_of_a_sample_is_that_of_a_naive_loop_over_its_ids():
    model, (idx, targets) = make_model(), rows()
    places, (ids, shifts) = Sampler(35)(targets)
    _, loss = model(idx, places, candidates=(ids, shifts))
    logits, _ = model(idx, targets)
    found = []
    for z, y in zip(logits.flatten(0, 1).tolist(), targets.flatten().tolist(), strict=True):
        if y >= 0:
            terms = [math.exp(z[i] + s) for i, s in zip(ids.tolist(), shifts.tolist(), strict=True)]
            found.append(math.log(sum(terms)) - z[y])
    assert loss.item() == pytest.approx(sum(found) / len(found), abs=1e-9)


@pytest.mark.parametrize("size", [24, 40])  # with 24, targets leave room for fewer than a quarter
def test_ids_are_drawn_once_each_as_often_as_they_should_and_estimate_the_sum_over_all(size):
    _, targets = rows()
    own = set(targets.flatten().tolist()) - {-1}
    sampler, draws = Sampler(size), 4000
    n_drawn = max(size - len(own), size // 4)
    others = torch.tensor(sorted(set(range(V)) - own))
    expected = torch.zeros(V, dtype=torch.float64)
    expected[others] = inclusion_probabilities(sampler.weights[others], n_drawn)
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    counts, sums = torch.zeros(V, dtype=torch.float64), []
    torch.manual_seed(0)
    for _ in range(draws):
        places, (ids, shifts) = sampler(targets)
        assert len(set(ids.tolist())) == len(ids) == len(own) + n_drawn
        assert own <= set(ids.tolist()) and not shifts[: len(own)].any()
        assert torch.equal(torch.where(places >= 0, ids[places], -1), targets)
        counts[ids[len(own) :]] += 1
        sums.append((logits[ids] + shifts).exp().sum().item())
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((counts / draws - expected).abs() <= 5 * error + 1e-12).all()
    exact = logits.exp().sum().item()
    assert abs(np.mean(sums) - exact) < 5 * np.std(sums) / math.sqrt(draws) < 0.05 * exact


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("window, whole", [(128, True), (100, False)])  # as many windows of as many tokens at most
def test_weights_are_the_counts_of_the_train_split(books: Path, monkeypatch, on_disk, window, whole):
    if on_disk:
        monkeypatch.setattr("robopoet.text.windows.ON_DEVICE_BYTES", 0)
    monkeypatch.setattr(loss, "WINDOW", window)
    meta = read_meta(books)
    split = open_split(books, "train", meta, 32, CPU)
    tokens = np.fromfile(books / "train.bin", dtype="<u2")
    weights = sampling_weights(split, meta.vocab_size, CPU)
    counts = np.bincount(tokens, minlength=meta.vocab_size)
    found = weights.numpy() ** (4 / 3) - 1
    assert weights.dtype is torch.float64 and len(found) == meta.vocab_size and (weights > 0).all()
    assert (len(tokens) <= window * window) == whole
    if whole:
        np.testing.assert_allclose(found, counts, atol=window + 1)  # windows may overlap, or reach beyond the end
    assert np.corrcoef(found, counts)[0, 1] > 0.99


def test_a_run_learns_with_a_sample_and_resumes_bit_for_bit(small, tmp_path):
    keys = small | {"sampled_softmax": 30, "max_iters": 40, "lr_decay_iters": 40, "eval_interval": 20}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    found = [record["loss"] for record in run(keys, out_dir=str(whole)) if record["kind"] == "eval"]
    full = run(keys, out_dir=str(tmp_path / "full"), sampled_softmax=0)
    best = [record["loss"] for record in full if record["kind"] == "eval"]
    assert found[-1] < found[0] and found[-1] == pytest.approx(best[-1], abs=0.15) and found != best
    run(keys, out_dir=str(resumed), max_iters=20)
    run(keys, out_dir=str(resumed), init_from="resume")
    expected, weights = (checkpoint.load(folder / "ckpt.pt")["model"] for folder in (whole, resumed))
    assert all(torch.equal(expected[name], weights[name]) for name in expected)


def test_a_step_is_compared_with_one_sample_however_many_micro_batches_it_has(small, tmp_path):
    keys = small | {"sampled_softmax": 30, "learning_rate": 1e-3, "eval_interval": 6}
    found = []
    for count in (1, 2, 8):
        out = tmp_path / str(count)
        shares = {"batch_size": 8 // count, "gradient_accumulation_steps": count}
        found.append([r["loss"] for r in run(keys | shares, out_dir=str(out)) if r["kind"] == "train"])
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(8, 1), (4, 2), (2, 4)])
def test_two_ranks_compare_with_the_sample_of_one(small, tmp_path, shares):
    keys = small | {"sampled_softmax": 30, "learning_rate": 1e-3, "max_iters": 12, "lr_decay_iters": 12}
    run(keys, out_dir=str(tmp_path / "one"))
    batch_size, count = shares
    shared = {"batch_size": batch_size, "gradient_accumulation_steps": count, "out_dir": tmp_path / "two"}
    found = losses(train_on_two(keys | shared))
    assert found == pytest.approx(losses(tmp_path / "one"), abs=1e-5) and len(found) == 12


def test_compiled_steps_with_samples_learn_as_plain_ones_without_compiling_anew(small, books):
    keys = small | {"sampled_softmax": 40, "batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    cfg, meta, found = TrainConfig(**keys), read_meta(books), []
    split = open_split(books, "train", meta, cfg.block_size, CPU)
    windows = TrainWindows(split, cfg.block_size, cfg.seed, cfg.tag_prob)
    for compiled in (False, True):
        state = train.build_state(cfg, MACHINE, train.make_model(cfg, meta.vocab_size), split)
        if compiled:
            torch._dynamo.reset()
            state.forward = torch.compile(state.model, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            found.append([float(train.train_step(state, windows, step)[0]) for step in range(6)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_the_flops_of_a_sample_are_those_of_its_logits_and_never_more_than_of_all():
    model = GPT(GPTConfig(vocab_size=1000)).double()  # the counter doesn't know oneDNN's products in float32
    idx, ids = torch.randint(300, (2, 128)), torch.arange(300)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx, candidates=(ids, torch.zeros(300)))[1].backward()
    assert counter.get_total_flops() / idx.numel() == pytest.approx(model.flops_per_token(300), rel=0.01)
    assert model.flops_per_token(2000) == model.flops_per_token(1000) == model.flops_per_token()
