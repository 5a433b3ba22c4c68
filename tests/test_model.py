import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model import (
    AVX512,
    GPT,
    GPTConfig,
    KVCache,
    Linear,
    RowwiseCrossEntropy,
    cross_entropies,
    dropout,
    linear,
    plain_attention,
)

SMALL = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)


def make(config: GPTConfig = SMALL, dtype: torch.dtype = torch.float64, scale: float = 4.0) -> GPT:
    """A model in eval mode with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    model = GPT(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale).add_(torch.randn_like(p), alpha=0.02)
    return model


def ids(*shape: int, vocab_size: int = SMALL.vocab_size, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def forward_by_hand(model: GPT, idx: np.ndarray) -> np.ndarray:
    """GPT-2 on one sequence in float64 with loops over heads and positions: (T,) -> (T, V)."""
    w = {name: p.detach().double().numpy() for name, p in model.state_dict().items()}
    c = model.config

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w.get(
            name + ".bias", 0
        )

    def gelu(x):
        if c.gelu == "none":
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: len(idx)]
    size = c.n_embd // c.n_head
    for layer in range(c.n_layer):
        at = f"transformer.h.{layer}."
        qkv = linear(norm(x, at + "ln_1"), at + "attn.c_attn")
        out = np.zeros_like(x)
        for head in range(c.n_head):
            q, k, v = (qkv[:, part * c.n_embd + head * size :][:, :size] for part in range(3))
            for t in range(len(idx)):
                scores = np.array([q[t] @ k[s] for s in range(t + 1)]) / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[t, head * size : (head + 1) * size] = (weights / weights.sum()) @ v[: t + 1]
        x = x + linear(out, at + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, at + "ln_2"), at + "mlp.c_fc")), at + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_forward_equals_a_float64_reimplementation(bias, gelu):
    model = make(GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32, bias=bias, gelu=gelu))
    idx = ids(3, 16)
    logits, _ = model(idx, targets=idx)
    for row in range(3):
        np.testing.assert_allclose(logits[row].detach().numpy(), forward_by_hand(model, idx[row].numpy()), atol=1e-9)


def test_loss_is_the_mean_negative_log_probability_of_counted_targets():
    model = make()
    idx, targets = ids(2, 16), ids(2, 16, seed=2)
    targets[0, 5:] = -1
    logits, loss = model(idx, targets)
    probs = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    expected = torch.zeros(2, 16, dtype=torch.float64)
    for b in range(2):
        for t in range(16):
            if targets[b, t] >= 0:
                expected[b, t] = -torch.log(probs[b, t, targets[b, t]])
    _, losses = model(idx, targets, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(loss, expected.sum() / 21, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rowwise_cross_entropy_equals_torchs_with_gradients(dtype):
    torch.manual_seed(0)
    logits, targets = (5 * torch.randn(150, 61)).to(dtype).requires_grad_(), ids(150)
    targets[::7] = -1
    before = logits.detach().clone()
    (RowwiseCrossEntropy.apply(logits, targets) * 3).backward()
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, ignore_index=-1)
    (expected * 3).backward()
    precision = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]  # of the gradient's own dtype
    torch.testing.assert_close(RowwiseCrossEntropy.apply(logits, targets).double(), expected, rtol=1e-6, atol=0)
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
        assert RowwiseCrossEntropy.apply(logits[row : row + 1], targets[row : row + 1]).item() == expected
    assert expected == 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_holds_no_second_copy_of_all_logits(dtype):
    logits, targets = torch.randn(3000, 20_011).to(dtype), ids(3000)
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
        found = cross_entropies(logits, targets)
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


@pytest.mark.parametrize("dtype, precision", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_the_fast_step_has_the_loss_and_every_gradient_of_a_plain_one_in_float64(dtype, precision):
    """Plain: F.linear, PyTorch's own attention and cross-entropy; precision: of the largest number of each gradient."""
    fast, plain = make(dtype=torch.float32, scale=1.0).train(), make(dtype=torch.float32, scale=1.0).double().train()
    idx, targets, last = ids(4, 16), ids(4, 16, seed=2), []
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        _, loss = fast(idx, targets)
    loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "model.plain_attention", lambda q, k, v, p: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        )
        plain.transformer.ln_f.register_forward_hook(lambda module, args, x: last.append(x))
        plain(idx, targets)
    logits = F.linear(last[0], plain.lm_head.weight)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=precision)
    for (name, p), q in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= precision * q.grad.abs().max(), name


def test_a_token_changes_no_logit_before_it():
    model = make()
    idx = ids(1, 16)
    before, _ = model(idx, targets=idx)
    for t in range(16):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
        after, _ = model(changed, targets=idx)
        assert torch.equal(after[0, :t], before[0, :t])
        assert not torch.equal(after[0, t], before[0, t])


@pytest.mark.parametrize("T", [1, 7, 64])
def test_flash_attention_equals_plain_attention_with_gradients(T):
    q, k, v = (torch.randn(2, 3, T, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    flash = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    plain = plain_attention(q, k, v)
    torch.testing.assert_close(flash, plain, atol=1e-12, rtol=0)
    weight = torch.randn_like(flash)
    for a, b in zip(torch.autograd.grad((flash * weight).sum(), (q, k, v)),
                    torch.autograd.grad((plain * weight).sum(), (q, k, v)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_long_rows_take_flash_and_agree_with_the_hand_written_forward():
    config = GPTConfig(block_size=300, vocab_size=61, n_layer=1, n_head=2, n_embd=16)
    model, idx = make(config), ids(1, 300)
    logits, _ = model(idx, targets=idx)
    np.testing.assert_allclose(logits[0].detach().numpy(), forward_by_hand(model, idx[0].numpy()), atol=1e-9)


def test_dropout_acts_in_training_only():
    model = make(GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32, dropout=0.5))
    idx = ids(1, 16)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


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


# --- size, names, initialisation


def test_reference_model_has_exactly_6493440_parameters():
    assert GPT(GPTConfig()).num_params() == 6_493_440


def test_state_dict_has_nanogpt_names_and_shapes():
    C, V, T = 32, 61, 16
    block = {
        "ln_1.weight": (C,), "ln_1.bias": (C,), "attn.c_attn.weight": (3 * C, C), "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C), "attn.c_proj.bias": (C,), "ln_2.weight": (C,), "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C), "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C), "mlp.c_proj.bias": (C,),
    }  # fmt: skip
    expected = {f"transformer.h.{i}.{name}": shape for i in range(2) for name, shape in block.items()} | {
        "transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C), "lm_head.weight": (V, C),
        "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,),
    }  # fmt: skip
    model = GPT(SMALL)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == expected
    assert model.lm_head.weight is model.transformer.wte.weight


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig())
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert torch.all(p == ("ln" in name and name.endswith("weight")))
        else:
            expected = 0.02 / math.sqrt(12) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.03, name
            assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel())


def test_flops_per_token_agrees_with_counting_the_matrix_products():
    model = GPT(GPTConfig(vocab_size=1000)).double()  # the counter doesn't know oneDNN's products in float32
    idx = ids(2, 128, vocab_size=1000)
    with FlopCounterMode(display=False) as counter:
        model(idx, targets=idx)[1].backward()
    assert counter.get_total_flops() / idx.numel() == pytest.approx(model.flops_per_token(), rel=0.01)


# --- writing


def greedy(logits):
    return logits.argmax(-1)


def seeded(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        return torch.multinomial(logits.double().softmax(-1), 1, generator=generator)[:, 0]

    return choose


@torch.inference_mode()
def write_naively(model, idx, max_new_tokens, choose, tag=None):
    """What `generate` must equal: the whole window is read again for every token."""
    for _ in range(max_new_tokens):
        window = idx[:, model.window_start(idx.shape[1]) :].clone()
        if tag is not None:
            window[:, 0] = tag
        chosen = choose(model(window)[0][:, -1])
        idx = torch.cat([idx, chosen[:, None]], dim=1)
        yield chosen


def record_lengths(monkeypatch):
    """Let a cache on the CPU count as it does on CUDA."""
    make_cache = KVCache.__init__

    def init(self, *args):
        make_cache(self, *args)
        self.length = torch.zeros(1, dtype=torch.long)

    monkeypatch.setattr(KVCache, "__init__", init)


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("tag", [None, 60])
@pytest.mark.parametrize("rows, n_prompt", [(3, 1), (1, 10), (3, 16), (1, 16), (2, 40)])
def test_cached_writing_equals_naive_below_and_beyond_the_block(monkeypatch, rows, n_prompt, tag, as_on_cuda):
    model, prompt = make(), ids(rows, n_prompt)
    if as_on_cuda:
        record_lengths(monkeypatch)
    for choose in (lambda: greedy, lambda: seeded(5)):
        tags = None if tag is None else torch.full((rows,), tag)
        cached = torch.stack(list(model.generate(prompt, 60, choose(), tags)))
        naive = torch.stack(list(write_naively(model, prompt, 60, choose(), tag)))
        assert torch.equal(cached, naive)
        assert len(set(cached[:, 0].tolist())) > 3  # the test would be idle if it wrote one word for ever


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_cached_logits_are_within_1e_4_of_naive_in_float32(packed, rows):
    model, prompt = make(dtype=torch.float32, scale=2.0), ids(rows, 5)
    written = copy.deepcopy(model)
    if packed:
        written.prepack()
    seen: list[list[torch.Tensor]] = [[], []]

    def recorder(log):
        def choose(logits):
            log.append(logits.clone())
            return (torch.arange(rows) + 7 * len(log) ** 2) % SMALL.vocab_size  # the same text on both paths

        return choose

    list(written.generate(prompt, 50, recorder(seen[0])))
    list(write_naively(model, prompt, 50, recorder(seen[1])))
    assert len(seen[0]) == 50
    for cached, naive in zip(*seen, strict=True):
        torch.testing.assert_close(cached, naive, atol=1e-4, rtol=0)


def test_window_slides_in_half_blocks_and_always_holds_the_end():
    model = GPT(SMALL)
    starts = [model.window_start(n) for n in range(1, 200)]
    for n, start in zip(range(1, 200), starts, strict=True):
        assert start % 8 == 0 and n - start <= 16
        assert start == 0 if n <= 16 else n - start > 8
    assert starts == sorted(starts)


def test_each_rows_tag_stands_first_in_every_window():
    model, windows = make(), []
    handle = model.register_forward_pre_hook(lambda module, args: windows.append(args[0].clone()))
    list(model.generate(ids(2, 10), 40, greedy, torch.tensor([60, 59])))
    handle.remove()
    fills = [window for window in windows if window.shape[1] > 1]
    assert len(fills) == 1 + math.ceil((10 + 39 - 16) / 8)
    assert all(window[:, 0].tolist() == [60, 59] for window in fills)


def test_a_window_is_read_once_and_then_a_token_at_a_time(monkeypatch):
    model, lengths, tokens = make(), [], []
    model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda ids, **keys: tokens.append(len(ids)) or decode(ids, **keys))
    list(model.generate(ids(1, 4), 14, greedy))
    assert lengths == [4, 9] and tokens == [1] * 12  # the window slides when the 17th token is there


@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_rows_that_are_not_kept_end_and_the_others_go_on_as_before(monkeypatch, as_on_cuda):
    model, prompt, kept = make(), ids(4, 6), torch.tensor([3, 1])
    if as_on_cuda:
        record_lengths(monkeypatch)
    tags = torch.tensor([60, 59, 58, 57])
    whole = torch.stack(list(model.generate(prompt, 30, greedy, tags)))
    writing, found = model.generate(prompt, 30, greedy, tags), []
    for step in range(30):
        found.append(writing.send(kept if step == 7 else None))
    assert [len(chosen) for chosen in found] == [4] * 7 + [2] * 23
    assert torch.equal(torch.stack(found[7:]), whole[7:, kept])


def test_a_prepacked_model_takes_no_more_memory_and_says_the_same():
    model = make(dtype=torch.float32)
    packed = copy.deepcopy(model)
    packed.prepack()
    idx = ids(2, 16)
    torch.testing.assert_close(packed(idx)[0], model(idx)[0], atol=1e-5, rtol=1e-5)
    if AVX512:
        assert all(module.weight.is_mkldnn for module in packed.modules() if isinstance(module, Linear))
    double = make()
    double.prepack()
    assert torch.equal(double(idx)[0], make()(idx)[0])
