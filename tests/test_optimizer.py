import copy
import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, get_ident

import pytest
import torch
import torch.nn as nn
from conftest import LLAMA
from peak import PeakMemory
from transformers.optimization import Adafactor

from model import GPT, GPTConfig
from robopoet.errors import CheckpointError
from robopoet.files import convert
from robopoet.machine import Machine
from robopoet.training import memory, optimizer
from robopoet.training.optimizer import (
    Muon,
    Trouble,
    assign_owners,
    configure_optimizers,
    orthogonalize,
    state_shapes,
)
from robopoet.weights.header import SavedOptimizer

SMALL = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
CPU = torch.device("cpu")
SHAPES = [(8, 24), (24, 8), (16, 16), (8, 24)]


def matrices(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


RATES = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99), "muon_lr": 0.02, "muon_weight_decay": 0.1}


def fill_grads(params: list[torch.nn.Parameter], step: int) -> None:
    for p, grad in zip(params, gradients(step), strict=True):
        p.grad = grad.to(p.dtype)


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, **LLAMA)], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor"])
def test_every_parameter_is_in_just_one_group_and_only_matrices_decay(kind, config):
    model = GPT(config)
    optimizers = configure_optimizers(model, Machine(CPU, torch.float32), kind, **RATES)
    groups = [(type(optimizer).__name__, group) for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for _, group in groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if p.dim() >= 2 else 0.0)
    in_muon = {id(p) for name, group in groups if name == "Muon" for p in group["params"]}
    blocks_matrices = {id(p) for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
    assert in_muon == (blocks_matrices if kind == "muon" else set())


def test_adafactor_steps_as_transformers_does_and_keeps_next_to_nothing():
    torch.manual_seed(0)
    ours, theirs = GPT(SMALL), GPT(SMALL)
    theirs.load_state_dict(ours.state_dict())
    [optimizer] = configure_optimizers(ours, Machine(CPU, torch.float32), "adafactor", **RATES | {"weight_decay": 0.0})
    oracle = Adafactor(theirs.parameters(), RATES["lr"], scale_parameter=True, relative_step=False, warmup_init=False)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = 1e-5 * torch.randn(p.shape, generator=generator)  # as small as a large model's
            q.grad = p.grad.clone()
        optimizer.step()
        oracle.step()
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()))
    states = optimizer.state_dict()["state"]
    kept = {f"{i}.{name}": tensor.shape for i, state in states.items() for name, tensor in state.items()}
    assert kept == state_shapes(optimizer)
    assert sum(shape.numel() for shape in kept.values()) < 0.1 * ours.num_params()


@pytest.mark.parametrize("dtype, muons", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")])
def test_muons_products_have_the_runs_dtype_but_for_float16(dtype, muons):
    _, muon = configure_optimizers(GPT(SMALL), Machine(CPU, getattr(torch, dtype)), "muon", **RATES)
    assert muon.dtype is getattr(torch, muons)


@pytest.mark.parametrize("shape", [(3, 32, 96), (2, 96, 32), (1, 48, 48)])
def test_orthogonalized_matrices_keep_their_singular_vectors_and_lose_their_values(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(x, full_matrices=False)
    within = U.mT @ orthogonalize(x, torch.float64) @ Vh.mT  # diagonal, near one
    diagonal = within.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(within, torch.diag_embed(diagonal), atol=1e-9, rtol=0)
    assert diagonal.min() > 0.3 and diagonal.max() < 1.25  # a square matrix's least value may be too small to lift
    assert 0.7 < diagonal.mean() < 1.1


def test_matrices_and_transposed_ones_are_orthogonalized_in_one_stack_as_alone():
    torch.manual_seed(0)
    stacks = [torch.randn(shape, dtype=torch.float64) for shape in [(3, 8, 24), (2, 24, 8), (0, 8, 24), (2, 16, 16)]]
    together = optimizer.orthogonalize_all(stacks, torch.float64, turn=True)
    for x, update in zip(stacks, together, strict=True):
        assert update.shape == x.shape
        for one, its in zip(x, update, strict=True):
            torch.testing.assert_close(its, orthogonalize(one[None], torch.float64)[0], rtol=1e-9, atol=1e-9)
    alone = optimizer.orthogonalize_all(stacks[:2], torch.float64, turn=False)
    assert all(torch.equal(a, orthogonalize(x, torch.float64)) for a, x in zip(alone, stacks[:2], strict=True))


@pytest.mark.parametrize("dtype, precision", [(torch.bfloat16, 0.02), (torch.float32, 0.02)])
def test_muon_steps_as_pytorchs_does(dtype, precision):
    """PyTorch's orthogonalises in bfloat16 whatever the dtype, so no closer than that."""
    ours, theirs = matrices(), matrices()
    muon = Muon(ours, 0.02, 0.1, dtype)
    oracle = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9)
    for step in range(5):
        fill_grads(ours, step)
        fill_grads(theirs, step)
        before = [p.detach().clone() for p in theirs]
        muon.step()
        oracle.step()
        for p, q, q0 in zip(ours, theirs, before, strict=True):
            assert (p - q).norm() < precision * (step + 1) * (q - q0).norm()
            torch.testing.assert_close(muon.state[p]["momentum_buffer"], oracle.state[q]["momentum_buffer"])


def test_muon_in_float64_equals_its_formula_one_matrix_at_a_time():
    params = [torch.nn.Parameter(p.detach().double()) for p in matrices()]
    by_hand = [p.detach().clone() for p in params]
    moments = [torch.zeros_like(p) for p in by_hand]
    muon = Muon(params, 0.02, 0.1, torch.float64)
    for step in range(3):
        fill_grads(params, step)
        for w, m, p in zip(by_hand, moments, params, strict=True):
            m.mul_(0.9).add_(p.grad, alpha=0.1)
            x = 0.1 * p.grad + 0.9 * m
            x = x / x.norm()
            x = x.T if x.shape[0] > x.shape[1] else x
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            x = x.T if x.shape != w.shape else x
            w.mul_(1 - 0.02 * 0.1).sub_(x, alpha=0.02 * math.sqrt(max(1, w.shape[0] / w.shape[1])))
        muon.step()
    for p, w in zip(params, by_hand, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-9, atol=1e-9)


def test_muon_changes_nothing_when_the_scaler_found_an_overflow():
    params = matrices()
    muon = Muon(params, 0.02, 0.1, torch.float32)
    fill_grads(params, 0)
    muon.found_inf = torch.zeros(())
    muon.step()
    before, moments = [p.detach().clone() for p in params], copy.deepcopy(muon.state_dict()["state"])
    fill_grads(params, 1)
    params[0].grad[0, 0] = math.inf
    params[1].grad[0, 0] = math.nan
    muon.found_inf = torch.ones(())
    muon.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    for index, state in muon.state_dict()["state"].items():
        assert torch.equal(state["momentum_buffer"], moments[index]["momentum_buffer"])


def test_a_rate_may_be_a_tensor():
    ours, theirs = matrices(), matrices()
    for params, lr in ((ours, 0.02), (theirs, torch.tensor(0.02))):
        muon = Muon(params, 0.1, 0.1, torch.float32)
        muon.param_groups[0]["lr"] = lr
        fill_grads(params, 0)
        muon.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_of_several_steps_that_are_not_finite_the_first_is_noted():
    trouble, one = Trouble(Machine(CPU, torch.float32)), torch.tensor(1.0)
    losses = [1.0, math.nan, math.inf, 1.0]
    bad = [trouble.note(torch.tensor(i), torch.tensor(loss), one, False).item() for i, loss in enumerate(losses)]
    assert bad == [0, 1, 1, 0] and trouble.first.tolist() == [1, True]


# --- matrices shared among ranks


@pytest.fixture
def on_ranks(monkeypatch):
    """Runs act(rank) on so many ranks, threads that gather as torch.distributed does; returns what they return."""

    def run(ranks: int, act) -> list:
        barrier, sent = Barrier(ranks, timeout=10), {}

        def all_gather(outputs: list[torch.Tensor], mine: torch.Tensor) -> None:
            assert mine.is_contiguous() and all(out.shape == mine.shape for out in outputs) and len(outputs) == ranks
            sent[rank_of[get_ident()]] = mine.clone()
            barrier.wait()
            for rank, out in enumerate(outputs):
                out.copy_(sent[rank])
            barrier.wait()

        def all_to_all_single(output: torch.Tensor, mine: torch.Tensor, received: list[int], parts: list[int]) -> None:
            rank = rank_of[get_ident()]
            sent[rank] = mine.split(parts)
            barrier.wait()
            for place, other in zip(output.split(received), range(ranks), strict=True):
                place.copy_(sent[other][rank])
            barrier.wait()

        def on_rank(rank: int):
            rank_of[get_ident()] = rank
            barrier.wait()  # each in a thread of its own
            return act(rank)

        rank_of: dict[int, int] = {}
        monkeypatch.setattr(memory.dist, "all_gather", all_gather)
        monkeypatch.setattr(memory.dist, "all_to_all_single", all_to_all_single)
        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(on_rank, range(ranks)))

    return run


def train_muon(rank: int, ranks: int, found_inf: float = 0.0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The weights and momenta after three steps, and a fourth that may have overflowed."""
    params = [torch.nn.Parameter(p.detach().double()) for p in matrices()]
    muon = Muon(params, 0.02, 0.1, torch.float64, rank=rank, ranks=ranks)
    for step in range(4):
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.double() * (math.nan if found_inf and step == 3 else 1)
        muon.found_inf = torch.tensor(found_inf if step == 3 else 0.0)
        muon.step()
    return [p.detach() for p in params], [muon.state[p]["momentum_buffer"] for p in params]


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
@pytest.mark.parametrize("ranks", [2, 3, 5])  # one shape has two matrices, each other one
def test_ranks_share_the_matrices_and_end_with_the_weights_of_one(on_ranks, monkeypatch, ranks, found_inf):
    alone, done = train_muon(0, 1, found_inf), []

    def noting(batch: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        done.extend(batch.clone())
        return orthogonalize(batch, dtype)

    monkeypatch.setattr(optimizer, "orthogonalize", noting)
    found = on_ranks(ranks, lambda rank: train_muon(rank, ranks, found_inf))
    for weights, moments in found:
        for ours, theirs in zip(weights + moments, alone[0] + alone[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(weights, found[0][0], strict=True))
    assert len(done) == 4 * len(SHAPES)  # in each step, each matrix once, by any rank
    assert len({x.sum().item() for x in done}) == len(done)


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_shards_reach_the_owners_of_their_matrices_and_come_back(on_ranks, ranks):
    n, n_rows, columns = 4, 7, 3  # the last of five ranks has no row
    matrices = torch.arange(float(n * n_rows * columns)).view(n, n_rows, columns)
    counts = [2, *[0] * (ranks - 2), 2]
    shards = [*matrices.chunk(ranks, dim=1), *[matrices[:, :0]] * ranks][:ranks]

    def act(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        owned = memory.to_owners(shards[rank], n_rows, counts, rank)
        return owned, memory.from_owners(2 * owned, counts, rank)

    found = on_ranks(ranks, act)
    assert torch.equal(torch.cat([owned for owned, _ in found]), matrices)
    for (_, back), shard in zip(found, shards, strict=True):
        assert torch.equal(back, 2 * shard)


def test_sharded_muon_needs_little_more_than_a_shard():
    """Beside weights, gradients and momenta, each a shard; of eight ranks, whose messages nobody answers."""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (8,))
        params = [torch.randn(shape) for shape in 8 * [(192, 64), (64, 64), (256, 64)]]
        params = [nn.Parameter(distribute_tensor(p, mesh, [Shard(0)], src_data_rank=None)) for p in params]
        muon = Muon(params, 0.02, 0.1, torch.float32, rank=0, ranks=8)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            with PeakMemory() as memory:
                muon.step()
    finally:
        torch.distributed.destroy_process_group()
    assert memory.peak < 4 * sum(p.to_local().nbytes for p in params)  # a matrix of each kind is whole here


def test_ranks_have_equal_shares_of_the_work():
    def cost(rows: int, columns: int) -> int:
        """FLOPs of five steps: two products by the short side's square, and one as long as the matrix."""
        n, m = min(rows, columns), max(rows, columns)
        return 5 * (2 * n * m * n + 2 * n**3 + 2 * n * n * m)

    def loads(width: int, layers: int, ranks: int) -> list[int]:
        shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)] * layers
        owners = assign_owners([torch.Size(shape) for shape in shapes], ranks)
        assert len(owners) == len(shapes) and set(owners) <= set(range(ranks))
        return [sum(cost(*s) for s, owner in zip(shapes, owners, strict=True) if owner == r) for r in range(ranks)]

    for width, layers, ranks, excess in [(256, 6, 2, 1.0), (192, 3, 2, 1.03), (256, 4, 3, 1.03), (768, 12, 8, 1.03)]:
        found = loads(width, layers, ranks)
        assert max(found) <= excess * sum(found) / ranks
    assert sorted(loads(64, 1, 8))[:4] == [0] * 4  # fewer matrices than ranks: one each


@pytest.mark.parametrize(("capturable", "place"), [(True, "meta"), (False, "cpu")])
def test_a_step_count_is_restored_to_where_this_runs_settings_keep_it(capturable, place):
    """A run saved on another device, whose AdamW had other settings; the meta device stands for this one's."""
    saved, here = (nn.Linear(3, 2, device=device) for device in ("cpu", "meta"))
    theirs = torch.optim.AdamW(saved.parameters(), 0.5, fused=False)
    saved(torch.ones(3)).sum().backward()
    theirs.step()
    theirs.param_groups[0]["capturable"] = not capturable
    ours = torch.optim.AdamW(here.parameters(), 0.25, capturable=capturable)
    state = convert(theirs.state_dict(), SavedOptimizer, "", CheckpointError, "")
    optimizer.restore_states(ours, state, "", Path("ckpt.pt"), 1)
    for state in ours.state.values():
        assert state["step"].device.type == place and state["exp_avg"].device.type == "meta"
    (group,) = ours.param_groups
    assert (group["capturable"], group["fused"], group["lr"]) == (capturable, None, 0.25)
