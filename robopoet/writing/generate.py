"""Generation with a KV cache: one forward pass over the prompt, then one fast step for each token."""

import functools
import math
from collections.abc import Callable, Generator

import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, KVCache, rotary_table
from robopoet import ops
from robopoet.ops import Linear, add_linear, gelu_linear, linear, scaled_dot_product_attention
from robopoet.recording import Graphed

Sample = Callable[[torch.Tensor], torch.Tensor]  # the next token of each row: logits (B, V) -> ids (B,) int64
BlockWeights = tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
STRETCH = 256  # positions whose rotations are computed together
Rotation = tuple[torch.Tensor, torch.Tensor]  # of q, k and v at one position, (3, 1, 1, hs) each: see rotate


def window_start(n: int, config: GPTConfig) -> int:
    """Where the window that a model reads starts in a text of n tokens: at 0 while it fits.

    Learned positions tie a cached key to its position, so the cache is recomputed whenever the window slides: by half a
    block at a time. With rotary positions only a prompt is cut, to its last block_size tokens.
    """
    beyond, step = n - config.block_size, max(config.block_size // 2, 1)
    if config.positions == "rotary":
        return max(beyond, 0)
    return max(math.ceil(beyond / step) * step, 0)


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

    With rotary positions each token attends to itself, the block_size - 2 before it and the first of the text, which
    stays at most block_size - 1 away (an attention sink: Xiao et al. 2023, arXiv:2309.17453). So nothing is recomputed.
    """
    c = model.config
    idx = idx[:, window_start(idx.shape[1], c) :]
    B, n = idx.shape
    idx = F.pad(idx, (0, c.block_size - n))
    ids = idx[:, n - 1]
    cache = KVCache(c, B, idx.device, model.transformer.wte.weight.dtype)
    step = _step(model, cache, record)
    is_cached = False
    for _ in range(max_new_tokens):
        logits = step(ids) if is_cached else model(_tagged(idx[:, :n], tags), cache=cache)[0][:, 0]
        ids = sample(logits)
        is_cached = True
        if c.positions == "learned":
            start = window_start(n + 1, c)  # counted from the start of the window, it moves as in the full text
            if start:
                idx = idx.roll(-start, 1)
            is_cached, n = not start, n + 1 - start
            idx[:, n - 1] = ids
        rows = yield ids
        if rows is not None:
            ids, idx, tags = ids[rows], idx[rows], None if tags is None else tags[rows]
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
    of the time. A query attends to the filled places; on CUDA, where a captured step can't change shape, to all places,
    the empty ones masked. blocks: from block_weights().
    """
    c, t, B = model.config, model.transformer, len(ids)
    n, filled, mask, rotation = cache.length, slice(0, cache.length + 1), None, None
    if isinstance(n, torch.Tensor):
        n, filled = n.clone(), slice(None)
        mask = torch.full((1, c.block_size), -math.inf, device=ids.device, dtype=cache.keys.dtype)
        mask = mask.masked_fill(torch.arange(c.block_size, device=ids.device) <= n, 0)
    place: slice | torch.Tensor = n if mask is not None else slice(n, n + 1)
    x = t.wte.weight[ids]  # (B, C)
    if c.positions == "learned":
        x = x + t.wpe.weight[place]
    else:
        place, rotation = _slide(cache, n, c)
    for weights, keys, values in zip(blocks, cache.keys, cache.values, strict=True):
        ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj = weights
        qkv = linear(_layer_norm(x, *ln_1), *c_attn).view(B, 3, c.n_head, 1, -1)
        if rotation is not None:
            qkv = rotate(qkv, *rotation)
        q, k, v = qkv.unbind(1)  # (B, nh, 1, hs)
        keys[:, :, place], values[:, :, place] = k, v
        y = scaled_dot_product_attention(q, keys[:, :, filled], values[:, :, filled], mask)
        x = add_linear(x, y.reshape(B, -1), *attn_c_proj)
        x = add_linear(x, gelu_linear(_layer_norm(x, *ln_2), *c_fc, c.gelu), *mlp_c_proj)
    cache.length += 1
    return model.lm_head(t.ln_f(x))


def _slide(cache: KVCache, n: int | torch.Tensor, config: GPTConfig) -> tuple[slice | torch.Tensor, Rotation]:
    """Where token n goes in the cache of a model with rotary positions, and its rotation.

    A full cache is a ring behind the first token. Its keys keep their angles, for only differences count; those of the
    first token are rotated to stay block_size - 1 before token n.
    """
    last, is_tensor = config.block_size - 1, isinstance(n, torch.Tensor)
    rotation_of = functools.partial(_rotation, config.n_embd // config.n_head, cache.keys)
    slid, ring = (n - last).clamp(min=0) if is_tensor else max(n - last, 0), 1 + (n - 1) % last
    if is_tensor or slid:
        cache.keys[:, :, :, :1] = rotate(cache.first, *(part[1] for part in rotation_of(slid)))
    if is_tensor:
        return torch.where(n <= last, n, ring), rotation_of(n)
    place = ring if slid else n
    return slice(place, place + 1), rotation_of(n)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """model.rotary at one position, in three calls: x (..., hs)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def _rotation(head_size: int, keys: torch.Tensor, n: int | torch.Tensor) -> Rotation:
    """Position n's cosines and sines for rotating such keys; n is an int or, on CUDA, int64 (1,)."""
    if isinstance(n, int):
        return _rotations(head_size, keys.dtype, keys.device, n // STRETCH)[n % STRETCH]
    return _expand(rotary_table(n, head_size).to(keys.dtype))[0]


@functools.lru_cache(maxsize=16)
def _rotations(head_size: int, dtype: torch.dtype, device: torch.device, stretch: int) -> list[Rotation]:
    """_rotation() of STRETCH positions at a time: one by one, each would take a dozen calls."""
    return _expand(rotary_table(torch.arange(STRETCH, device=device) + stretch * STRETCH, head_size).to(dtype))


def _expand(table: torch.Tensor) -> list[Rotation]:
    """Each position's cosines and sines in a rotary_table(), as they rotate q and k and leave v alone."""
    cos, sin = table  # (T, hs / 2)
    one, zero = torch.ones_like(cos), torch.zeros_like(cos)
    factors = [cos, cos, cos, cos, one, one], [-sin, sin, -sin, sin, zero, zero]
    cosines, sines = (torch.stack(halves, dim=1).view(len(cos), 3, 1, 1, -1) for halves in factors)
    return list(zip(cosines, sines, strict=True))


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.layer_norm(x, weight.shape, weight, bias, 1e-5)


def block_weights(model: GPT) -> list[BlockWeights]:
    """For each block, weight and bias of ln_1, c_attn, attention's c_proj, ln_2, c_fc and the MLP's c_proj."""
    layers = [(b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj) for b in model.transformer.h]
    return [tuple((layer.weight, layer.bias) for layer in block) for block in layers]


def prepack(model: GPT) -> None:
    """Repack each matrix into the layout that generates fastest; the model can't be trained afterwards."""
    weight = model.lm_head.weight
    dtypes = (torch.float32, torch.bfloat16) if ops.HAS_AVX512 else (torch.float32,)
    if weight.device.type == "cpu" and weight.dtype in dtypes:
        for module in model.modules():
            if isinstance(module, Linear):
                ops.prepack(module)
