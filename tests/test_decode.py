"""Generation with a cache beside a naive one that reads the window again for every token."""

import copy
import dataclasses
import math

import conftest
import pytest
import torch
from test_model import ROTARY, SMALL, ids, make

from robopoet.ops import HAS_AVX512, Linear
from robopoet.writing import decode as module
from robopoet.writing.decode import generate, prepack_matrices, window_start

LLAMA = dataclasses.replace(SMALL, **conftest.LLAMA | {"n_kv_head": 2}, n_inner=45, rope_theta=500.0)


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
        window = idx[:, window_start(idx.shape[1], SMALL) :].clone()
        if tag is not None:
            window[:, 0] = tag
        chosen = choose(model(window)[0][:, -1])
        idx = torch.cat([idx, chosen[:, None]], dim=1)
        yield chosen


@torch.inference_mode()
def read_with_a_sliding_window(model, idx):
    """Logits of one text with rotary positions, token by token and head by head: (n,) -> (n, V).

    Token i sees itself and the block_size - 2 tokens before it where they are; and the first one, from as far as a
    block reaches. Distances count, no absolute position does.
    """
    c, t = model.config, model.transformer
    size = c.n_embd // c.n_head
    frequencies = c.rope_theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def score(q, k, distance):
        pairs = (torch.complex(*x.view(2, -1)) for x in (q, k))
        q, k = pairs
        return (q * torch.polar(torch.ones_like(frequencies), distance * frequencies) * k.conj()).real.sum() / size**0.5

    x = t.wte.weight[idx]
    for block in t.h:
        qkv = block.attn.c_attn(block.ln_1(x)).view(len(idx), -1, size)
        q, k, v = qkv.split([c.n_head, c.kv_heads, c.kv_heads], dim=1)
        k, v = (part.repeat_interleave(c.n_head // c.kv_heads, dim=1) for part in (k, v))
        out = torch.zeros_like(q)
        for i in range(len(idx)):
            seen = [0, *range(max(i - c.block_size + 2, 1), i + 1)]
            for h in range(c.n_head):
                scores = [score(q[i, h], k[j, h], i - j if j else min(i, c.block_size - 1)) for j in seen]
                out[i, h] = torch.stack(scores).softmax(0) @ v[seen, h]
        x = x + block.attn.c_proj(out.flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return model.lm_head(t.ln_f(x))


def count_as_on_cuda(monkeypatch):
    """Let rows on the CPU have their places in a tensor, as on CUDA."""
    monkeypatch.setattr(module, "start_at", lambda n_rows, weight: torch.zeros(n_rows, dtype=torch.long))


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("tag", [None, 60])
@pytest.mark.parametrize("rows, n_prompt", [(3, 1), (1, 10), (3, 16), (1, 16), (2, 40)])
def test_cached_writing_equals_naive_below_and_beyond_the_block(monkeypatch, rows, n_prompt, tag, as_on_cuda):
    model, prompt = make(), ids(rows, n_prompt)
    if as_on_cuda:
        count_as_on_cuda(monkeypatch)
    for choose in (lambda: greedy, lambda: seeded(5)):
        tags = None if tag is None else torch.full((rows,), tag)
        cached = torch.stack(list(generate(model, prompt, 60, choose(), tags)))
        naive = torch.stack(list(write_naively(model, prompt, 60, choose(), tag)))
        assert torch.equal(cached, naive)
        assert len(set(cached[:, 0].tolist())) > 3  # the test would be idle if it wrote one word for ever


@pytest.mark.parametrize("as_on_cuda", [False, True])
@pytest.mark.parametrize("tag", [None, 60])
@pytest.mark.parametrize("n_prompt", [1, 16, 40])
@pytest.mark.parametrize("config", [ROTARY, LLAMA], ids=["rotary", "llama"])
def test_a_rotary_models_window_slides_token_by_token_behind_the_first(monkeypatch, config, n_prompt, tag, as_on_cuda):
    model, prompt, seen = make(config, scale=5.0), ids(2, n_prompt), []
    if as_on_cuda:
        count_as_on_cuda(monkeypatch)

    def choose(logits):
        seen.append(logits)
        return greedy(logits)

    tags = None if tag is None else torch.full((2,), tag)
    written = torch.stack(list(generate(model, prompt, 24, choose, tags)), dim=1)
    for row in range(2):
        window = prompt[row, -16:].clone()
        window[0] = window[0] if tag is None else tag
        text = torch.cat([window, written[row]])
        expected = read_with_a_sliding_window(model, text)[len(window) - 1 : -1]
        torch.testing.assert_close(torch.stack(seen)[:, row], expected, atol=1e-4, rtol=0)  # angles are float32
        assert torch.equal(expected.argmax(-1), written[row])
        assert len(set(written[row].tolist())) > 3


def test_a_rotary_model_reads_its_prompt_alone_whatever_follows():
    model, lengths = make(ROTARY), []
    model.transformer.wte.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    list(generate(model, ids(1, 100), 100, greedy))
    assert lengths == [16]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_cached_logits_are_within_1e_4_of_naive_in_float32(packed, rows):
    model, prompt = make(dtype=torch.float32, scale=2.0), ids(rows, 5)
    written = copy.deepcopy(model)
    if packed:
        prepack_matrices(written)
    seen: list[list[torch.Tensor]] = [[], []]

    def recorder(log):
        def choose(logits):
            log.append(logits.clone())
            return (torch.arange(rows) + 7 * len(log) ** 2) % SMALL.vocab_size  # the same text on both paths

        return choose

    list(generate(written, prompt, 50, recorder(seen[0])))
    list(write_naively(model, prompt, 50, recorder(seen[1])))
    assert len(seen[0]) == 50
    for cached, naive in zip(*seen, strict=True):
        torch.testing.assert_close(cached, naive, atol=1e-4, rtol=0)


def test_window_slides_in_half_blocks_and_always_holds_the_end():
    starts = [window_start(n, SMALL) for n in range(1, 200)]
    for n, start in zip(range(1, 200), starts, strict=True):
        assert start % 8 == 0 and n - start <= 16
        assert start == 0 if n <= 16 else n - start > 8
    assert starts == sorted(starts)


def test_each_rows_tag_stands_first_in_every_window():
    model, windows = make(), []
    handle = model.transformer.wte.register_forward_pre_hook(lambda module, args: windows.append(args[0].clone()))
    list(generate(model, ids(2, 10), 40, greedy, torch.tensor([60, 59])))
    handle.remove()
    fills = [window for window in windows if window.shape[1] > 1]
    assert len(fills) == 1 + math.ceil((10 + 39 - 16) / 8)
    assert all(window[:, 0].tolist() == [60, 59] for window in fills)


def test_a_window_is_read_once_and_then_a_token_at_a_time(monkeypatch):
    model, lengths, tokens = make(), [], []
    model.transformer.wte.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    step = module.step
    monkeypatch.setattr(module, "step", lambda *args: tokens.append(len(args[3])) or step(*args))
    list(generate(model, ids(1, 4), 14, greedy))
    assert lengths == [4, 9] and tokens == [1] * 12  # the window slides when the 17th token is there


@pytest.mark.parametrize("config", [SMALL, ROTARY])
@pytest.mark.parametrize("as_on_cuda", [False, True])
def test_rows_that_are_not_kept_end_and_the_others_go_on_as_before(monkeypatch, as_on_cuda, config):
    model, prompt, kept = make(config), ids(4, 6), torch.tensor([3, 1])
    if as_on_cuda:
        count_as_on_cuda(monkeypatch)
    tags = torch.tensor([60, 59, 58, 57])
    whole = torch.stack(list(generate(model, prompt, 30, greedy, tags)))
    writing, found = generate(model, prompt, 30, greedy, tags), []
    for step in range(30):
        found.append(writing.send(kept if step == 7 else None))
    assert [len(chosen) for chosen in found] == [4] * 7 + [2] * 23
    assert torch.equal(torch.stack(found[7:]), whole[7:, kept])


def test_a_prepacked_model_takes_no_more_memory_and_says_the_same():
    model = make(dtype=torch.float32)
    packed = copy.deepcopy(model)
    prepack_matrices(packed)
    idx = ids(2, 16)
    torch.testing.assert_close(packed(idx)[0], model(idx)[0], atol=1e-5, rtol=1e-5)
    weights = [module.weight for module in packed.modules() if isinstance(module, Linear)]
    assert all(weight.is_mkldnn if HAS_AVX512 else weight.t().is_contiguous() for weight in weights)
    double = make()
    prepack_matrices(double)
    assert torch.equal(double(idx)[0], make()(idx)[0])
