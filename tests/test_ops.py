"""robopoet/ops.py beside torch's own functions in float64."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from robopoet import ops
from robopoet.ops import (
    RowwiseCrossEntropy,
    causal_attention,
    cross_entropy,
    dropout,
    linear,
    scaled_dot_product_attention,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rowwise_cross_entropy_equals_torchs_with_gradients(dtype):
    torch.manual_seed(0)
    logits, targets = (5 * torch.randn(150, 61)).to(dtype).requires_grad_(), torch.randint(61, (150,))
    targets[::7] = -1
    before = logits.detach().clone()
    (RowwiseCrossEntropy.apply(logits, targets, -1) * 3).backward()
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=-1)
    (expected * 3).backward()
    precision = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]  # its gradient is rounded
    torch.testing.assert_close(RowwiseCrossEntropy.apply(logits, targets, -1).double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=precision, atol=precision * 1e-2)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_target_that_the_model_rules_out_is_exact(dtype):
    logits, targets = (
        torch.tensor([[0.0, 200.0], [0.0, 200.0], [-2048.0, 2048.0]], dtype=dtype),
        torch.tensor([0, 1, 0]),
    )
    for row in range(3):
        expected = F.cross_entropy(logits[row : row + 1].double(), targets[row : row + 1]).item()
        assert RowwiseCrossEntropy.apply(logits[row : row + 1], targets[row : row + 1], -1).item() == expected
    assert expected == 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_holds_no_second_copy_of_all_logits(dtype):
    logits, targets = torch.randn(3000, 20_011).to(dtype), torch.randint(20_011, (3000,))
    targets[::7] = -1

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            is_new = isinstance(result, torch.Tensor) and not func.is_view
            self.largest = max(self.largest, result.nbytes if is_new else 0)
            return result

    expected = F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction="none")
    with Sizes() as sizes:
        found = cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    assert torch.equal(found, expected) and sizes.largest <= 2**26


@pytest.mark.parametrize("rows, n_in, n_out", [((3, 50), 32, 96), ((150,), 96, 32), ((2, 1), 32, 61)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_in_float32_equals_float64_with_gradients(rows, n_in, n_out, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(*rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out) if bias else None
    ours = [t.clone().requires_grad_() for t in (x, weight, b) if t is not None]
    exact = [t.double().requires_grad_() for t in (x, weight, b) if t is not None]
    y, expected = linear(*ours), F.linear(*exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    towards = torch.randn_like(y)
    (y * towards).sum().backward()
    (expected * towards).sum().backward()
    for one, other in zip(ours, exact, strict=True):
        assert one.grad.shape == one.shape
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kept", [2**24, 0])
@pytest.mark.parametrize("heads", [3, 1])
@pytest.mark.parametrize("T", [1, 7, 64, 256, 257, 700])
def test_flash_attention_equals_causal_attention_with_gradients(T, heads, kept, monkeypatch):
    monkeypatch.setattr(ops, "PROBABILITIES", kept)
    q, k, v = (torch.randn(2, n, T, 8, dtype=torch.float64, requires_grad=True) for n in (3, heads, heads))
    flash = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    plain = causal_attention(q, k, v)
    torch.testing.assert_close(flash, plain, atol=1e-12, rtol=0)
    weight = torch.randn_like(flash)
    for a, b in zip(torch.autograd.grad((flash * weight).sum(), (q, k, v)),
                    torch.autograd.grad((plain * weight).sum(), (q, k, v)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "heads", "shared"), [(1, 4, 4), (1, 9, 3), (3, 4, 4), (3, 9, 3), (1, 6, 1)])
def test_one_query_a_row_equals_torchs_attention(rows, heads, shared, masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, n, T, 8, dtype=torch.float64) for n, T in ((heads, 1), (shared, 20), (shared, 20)))
    mask = torch.randn(rows, 1, 1, 20, dtype=torch.float64) if masked else None
    k_each, v_each = (x.repeat_interleave(heads // shared, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, k_each, v_each, mask)
    found = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_probabilities_that_are_computed_again_are_dropped_alike(monkeypatch):
    q, k, v = (torch.randn(1, 2, 300, 8, requires_grad=True) for _ in range(3))
    found = []
    for kept in (2**24, 0):
        monkeypatch.setattr(ops, "PROBABILITIES", kept)
        torch.manual_seed(0)
        y = scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.03])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_zeroes_a_share_p_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, dtype=dtype, requires_grad=True)  # no multiple of four
    y = dropout(x, p)
    zeros = (y == 0).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(zeros.mean() - p) < 5 * sigma / 1002
    assert (zeros.mean(0) - p).abs().max() < 6 * sigma / math.sqrt(1001)  # no column, row or lane is favoured
    assert (zeros.mean(1) - p).abs().max() < 6 * sigma / math.sqrt(1003)
    for lane in range(4):
        lanes = zeros.flatten()[lane::4]
        assert abs((lanes[1:] * lanes[:-1]).mean() - p * p) < 6 / math.sqrt(len(lanes))
    kept = y[y != 0].double()
    torch.testing.assert_close(
        kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=0
    )
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p), y)
    assert torch.equal(dropout(x, 0.0), x)
