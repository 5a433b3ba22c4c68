import ast
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KINDS
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
from model import GPT, GPTConfig

SMALL = GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32)
ROTARY = dataclasses.replace(SMALL, positions="rotary")


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

    def turn(x, position):
        """Pairs as complex numbers, each turned by its angle."""
        half = len(x) // 2
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
        return np.concatenate([z.real, z.imag]) if c.positions == "rotary" else x

    x = w["transformer.wte.weight"][idx]
    if c.positions == "learned":
        x = x + w["transformer.wpe.weight"][: len(idx)]
    size = c.n_embd // c.n_head
    for layer in range(c.n_layer):
        at = f"transformer.h.{layer}."
        qkv = linear(norm(x, at + "ln_1"), at + "attn.c_attn")
        out = np.zeros_like(x)
        for head in range(c.n_head):
            q, k, v = (qkv[:, part * c.n_embd + head * size :][:, :size] for part in range(3))
            for t in range(len(idx)):
                scores = np.array([turn(q[t], t) @ turn(k[s], s) for s in range(t + 1)]) / math.sqrt(size)
                weights = np.exp(scores - scores.max())
                out[t, head * size : (head + 1) * size] = (weights / weights.sum()) @ v[: t + 1]
        x = x + linear(out, at + "attn.c_proj")
        x = x + linear(gelu(linear(norm(x, at + "ln_2"), at + "mlp.c_fc")), at + "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
@pytest.mark.parametrize("positions, precision", [("learned", 1e-9), ("rotary", 2e-6)])  # its angles are float32
def test_forward_equals_a_float64_reimplementation(bias, gelu, positions, precision):
    model = make(dataclasses.replace(SMALL, bias=bias, gelu=gelu, positions=positions))
    idx = ids(3, 16)
    logits, _ = model(idx, targets=idx)
    for row in range(3):
        expected = forward_by_hand(model, idx[row].numpy())
        np.testing.assert_allclose(logits[row].detach().numpy(), expected, atol=precision)


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


@pytest.mark.parametrize("config", [SMALL, ROTARY])
def test_a_token_changes_no_logit_before_it(config):
    model = make(config)
    idx = ids(1, 16)
    before, _ = model(idx, targets=idx)
    for t in range(16):
        changed = idx.clone()
        changed[0, t] = (changed[0, t] + 1) % SMALL.vocab_size
        after, _ = model(changed, targets=idx)
        assert torch.equal(after[0, :t], before[0, :t])
        assert not torch.equal(after[0, t], before[0, t])


def test_long_rows_take_flash_and_agree_with_the_hand_written_forward():
    config = GPTConfig(block_size=300, vocab_size=61, n_layer=1, n_head=2, n_embd=16)
    model, idx = make(config), ids(1, 300)
    logits, _ = model(idx, targets=idx)
    np.testing.assert_allclose(logits[0].detach().numpy(), forward_by_hand(model, idx[0].numpy()), atol=1e-9)


@pytest.mark.parametrize("config", [SMALL, ROTARY])
def test_gradients_reach_no_later_token(config):
    model, idx = make(config), ids(1, 16)
    for t in range(16):
        inputs = []
        handle = model.transformer.wte.register_forward_hook(
            lambda module, args, out, inputs=inputs: inputs.append(out.requires_grad_()) or out
        )
        loss = model(idx, targets=idx, reduction="none")[1][0, t]
        handle.remove()
        (grad,) = torch.autograd.grad(loss, inputs[0])
        assert torch.all(grad[0, t + 1 :] == 0) and torch.all(grad[0, : t + 1].abs().amax(1) > 0)


def test_rotated_queries_and_keys_meet_by_their_distance_alone():
    q, k = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    places = torch.arange(100)
    table = model.rotary_table(places, GPTConfig(n_embd=24, n_head=1))
    q, k = (model.rotary(x.expand(100, 24), table) for x in (q, k))
    torch.testing.assert_close(q.norm(dim=1), q[0].norm().expand(100), rtol=1e-6, atol=0)
    products = q @ k.T
    for distance in range(-60, 60):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-4)
    assert products[0].std() > 0.1


def test_a_model_with_rotary_positions_has_all_of_a_learned_ones_parameters_but_the_positions():
    learned, rotary = (GPT(config).state_dict() for config in (SMALL, ROTARY))
    assert {name: p.shape for name, p in learned.items() if "wpe" not in name} == {
        n: p.shape for n, p in rotary.items()
    }
    assert GPT(ROTARY).num_params() == GPT(SMALL).num_params() - 16 * 32


def test_dropout_acts_in_training_only():
    model = make(GPTConfig(block_size=16, vocab_size=61, n_layer=2, n_head=4, n_embd=32, dropout=0.5))
    idx = ids(1, 16)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_dropout_acts_on_the_embeddings_too():
    model, seen = make(dataclasses.replace(SMALL, dropout=0.5)), []
    with torch.no_grad():  # the blocks add nothing
        for p in model.transformer.h.parameters():
            p.zero_()
    model.transformer.ln_f.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.train()(ids(4, 16))
    assert 0.4 < (seen[0] == 0).double().mean() < 0.6


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


@pytest.mark.parametrize("kind", KINDS)
def test_flops_per_token_agrees_with_counting_the_matrix_products(kind):
    model = GPT(GPTConfig(vocab_size=1000, **KINDS[kind]))
    model.double()  # the counter doesn't know oneDNN's products in float32
    idx = ids(2, 128, vocab_size=1000)
    with FlopCounterMode(display=False) as counter:
        model(idx, targets=idx)[1].backward()
    assert counter.get_total_flops() / idx.numel() == pytest.approx(model.flops_per_token(), rel=0.01)


TORCHS_OWN = {
    "Dropout": nn.Dropout,
    "Linear": nn.Linear,
    "cross_entropy": F.cross_entropy,
    "linear": F.linear,
    "scaled_dot_product_attention": F.scaled_dot_product_attention,
}


@pytest.mark.parametrize("T", [16, 300])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, precision", [(torch.float64, 1e-12), (torch.float32, 4e-6), (torch.bfloat16, 3e-2)])
def test_torchs_own_functions_in_place_of_ops_give_the_same_loss_and_gradients(monkeypatch, dtype, precision, T, kind):
    """precision: of a loss, and of the largest number of each gradient."""
    config = dataclasses.replace(SMALL, block_size=T, **KINDS[kind])
    config = dataclasses.replace(config, n_kv_head=config.n_kv_head and 2)
    imports = [node for node in ast.parse(Path(model.__file__).read_text()).body if isinstance(node, ast.ImportFrom)]
    assert {a.name for node in imports if node.module == "robopoet.ops" for a in node.names} == TORCHS_OWN.keys()
    stored = torch.float64 if dtype is torch.float64 else torch.float32
    idx, targets = ids(4, T), ids(4, T, seed=2)
    targets[:, ::5] = -1
    ours = make(config, stored, scale=1.0).train()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
        _, loss = ours(idx, targets)
        losses = ours(idx, targets, reduction="none")[1]
    loss.backward()
    for name, function in TORCHS_OWN.items():
        monkeypatch.setattr(model, name, function)
    torchs = make(config, torch.float64, scale=1.0).train()
    torchs.load_state_dict(ours.state_dict())
    assert type(torchs.lm_head) is nn.Linear
    _, expected = torchs(idx, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=precision)
    torch.testing.assert_close(losses.double(), torchs(idx, targets, reduction="none")[1], rtol=precision * 4, atol=0)
    for (name, p), q in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= precision * q.grad.abs().max(), name


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"n_layer": 0}, "n_layer: found 0, must be at least 1 and at most 1,048,576"),
        ({"vocab_size": 2**21}, "vocab_size: found 2097152, must be at least 1 and at most 1,048,576"),
        ({"n_head": 0}, "n_head: found 0, must be at least 1 and at most 1,048,576"),
        ({"n_embd": 10, "n_head": 4}, "n_embd: found 10, must be divisible by n_head, 4"),
        (
            {"n_embd": 12, "n_head": 4, "positions": "rotary"},
            "n_embd: found 12, must be divisible by twice n_head, 8",
        ),
        ({"block_size": 1, "positions": "rotary"}, "block_size: found 1, must be at least 2 with rotary positions"),
        ({"positions": "alibi"}, "positions: found 'alibi', must be learned or rotary"),
        ({"gelu": "sigmoid"}, "gelu: found 'sigmoid', must be none or tanh"),
        ({"dropout": 1.5}, "dropout: found 1.5, must be from 0 to 1"),
    ],
)
def test_a_shape_that_can_not_be_is_refused_in_a_line_for_each_value(values, problem):
    with pytest.raises(ValueError) as raised:
        GPTConfig(**values)
    assert str(raised.value) == problem
    with pytest.raises(ValueError) as raised:
        GPTConfig(**values | {"dropout": -1.0})
    assert str(raised.value).splitlines()[-1] == "dropout: found -1.0, must be from 0 to 1"
