"""Generation with a KV cache: one forward pass over the prompt, then one fast step for each token."""

import functools
import math
from collections.abc import Callable, Generator

import torch
from torch.nn import functional as F

from model import GPT, KVCache
from robopoet import ops
from robopoet.machine import Machine
from robopoet.ops import Linear, add_linear, gelu_linear, linear, scaled_dot_product_attention
from robopoet.recording import Graphed
from robopoet.text.tokenizer import Tokenizer

Sample = Callable[[torch.Tensor], torch.Tensor]  # the next token of each row: logits (B, V) -> ids (B,) int64
BlockWeights = tuple[tuple[torch.Tensor, torch.Tensor | None], ...]


def window_start(n: int, block_size: int) -> int:
    """Where the window of a text of n tokens starts: 0 while it fits, then it slides by half a block at a time.

    Learned positions tie a cached key to its position, so when the window slides, the cache is recomputed.
    """
    step = max(block_size // 2, 1)
    return 0 if n <= block_size else math.ceil((n - block_size) / step) * step


@torch.inference_mode()
def generate(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    sample: Sample,
    tags: torch.Tensor | None = None,
    record: bool = False,
) -> Generator[torch.Tensor, torch.Tensor | None, None]:
    """Continue `idx`, yielding the next id of each row, (B,) int64, as soon as it is sampled.

    idx: (B, n) int64, n >= 1. tags: (B,) int64, ids that replace the first of every window, as in training. The caller
    may send() the rows to keep, (n,) int64; the others are dropped. record: replay a token's step as a CUDA graph. Only
    the window is kept, so memory does not grow with the text.
    """
    block_size = model.config.block_size
    idx = idx[:, window_start(idx.shape[1], block_size) :]
    B, n = idx.shape
    idx = F.pad(idx, (0, block_size - n))
    cache = KVCache(model.config, B, idx.device, model.transformer.wte.weight.dtype)
    step = _step(model, cache, record)
    is_cached = False
    for _ in range(max_new_tokens):
        logits = step(idx[:, n - 1]) if is_cached else model(_tagged(idx[:, :n], tags), cache=cache)[0][:, 0]
        ids = sample(logits)
        start = window_start(n + 1, block_size)  # counted from the start of the window, it moves as in the full text
        if start:
            idx = idx.roll(-start, 1)
        is_cached, n = not start, n + 1 - start
        idx[:, n - 1] = ids
        rows = yield ids
        if rows is not None:
            idx, tags = idx[rows], None if tags is None else tags[rows]
            cache.keep(rows)
            step = _step(model, cache, record)


def _tagged(window: torch.Tensor, tags: torch.Tensor | None) -> torch.Tensor:
    return window if tags is None else torch.cat([tags[:, None], window[:, 1:]], dim=1)


def _step(model: GPT, cache: KVCache, record: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """`decode` with this cache, if asked for as a CUDA graph: its kernel launches take longer than its work."""
    step = functools.partial(decode, model, cache=cache, blocks=block_weights(model))
    return Graphed(step) if record and cache.keys.device.type == "cuda" else step


def decode(model: GPT, ids: torch.Tensor, cache: KVCache, blocks: list[BlockWeights]) -> torch.Tensor:
    """Logits (B, V) after one more token in each row, ids (B,) int64; its keys and values join the cache.

    The arithmetic of GPT.forward for the last token of a window, without calling its modules, which would take a tenth
    of the time. A query attends to the filled positions; on CUDA, where a captured step can't change shape, to all
    positions, the empty ones masked. blocks: from block_weights().
    """
    c, t, B = model.config, model.transformer, len(ids)
    position: slice | torch.Tensor = slice(cache.length, cache.length + 1)
    filled, mask = slice(0, cache.length + 1), None
    if isinstance(cache.length, torch.Tensor):
        position, filled = cache.length.clone(), slice(None)
        mask = torch.full((1, c.block_size), -math.inf, device=ids.device, dtype=cache.keys.dtype)
        mask = mask.masked_fill(torch.arange(c.block_size, device=ids.device) <= position, 0)
    x = t.wte.weight[ids] + t.wpe.weight[position]  # (B, C)
    for weights, keys, values in zip(blocks, cache.keys, cache.values, strict=True):
        ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj = weights
        q, k, v = linear(_layer_norm(x, *ln_1), *c_attn).view(B, 3, c.n_head, 1, -1).unbind(1)  # (B, nh, 1, hs)
        keys[:, :, position], values[:, :, position] = k, v
        y = scaled_dot_product_attention(q, keys[:, :, filled], values[:, :, filled], mask)
        x = add_linear(x, y.reshape(B, -1), *attn_c_proj)
        x = add_linear(x, gelu_linear(_layer_norm(x, *ln_2), *c_fc, c.gelu), *mlp_c_proj)
    cache.length += 1
    return model.lm_head(t.ln_f(x))


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def block_weights(model: GPT) -> list[BlockWeights]:
    """For each block, weight and bias of ln_1, c_attn, attention's c_proj, ln_2, c_fc and the MLP's c_proj."""
    layers = [(b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj) for b in model.transformer.h]
    return [tuple((layer.weight, layer.bias) for layer in block) for block in layers]


def prepack(model: GPT) -> None:
    """Repack each matrix into oneDNN's layout, where that generates faster; the model can't be trained afterwards."""
    weight = model.lm_head.weight
    if ops.HAS_AVX512 and weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16):
        for module in model.modules():
            if isinstance(module, Linear):
                ops.prepack(module)


def preview(model: GPT, tok: Tokenizer, machine: Machine) -> str:
    """A hundred tokens after a line end, for the loggers of a run; draws from a random stream of its own."""
    random = torch.Generator(machine.device).manual_seed(0)

    def sample(logits: torch.Tensor) -> torch.Tensor:
        probs = (logits[:, : len(tok.tokens)].float() / 0.8).softmax(-1)  # no special token
        return torch.multinomial(probs, 1, generator=random)[:, 0]

    model.eval()
    start = torch.tensor([tok.encode("\n") or [0]], device=machine.device)
    ids = [id.item() for id in generate(model, start, 100, sample)]
    return tok.decode_bytes(ids).decode(errors="replace")
