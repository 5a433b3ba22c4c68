"""The decoder: a window is read into a KV cache in one forward pass, and then each step adds one token to each row.

`generate` continues a batch whose rows are all at the same place of their texts; a server's `Rows` are at places that
differ. Both decode by `step`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch
from torch.nn import functional as F

from model import GPT, GPTConfig, KVCache, swiglu
from robopoet import ops
from robopoet.machine import Graphed
from robopoet.ops import Linear, add_linear, gelu_linear, linear, scaled_dot_product_attention
from robopoet.writing.rotations import rotate, rotation_at
from robopoet.writing.sampler import blended

Choose = Callable[[torch.Tensor], torch.Tensor]  # the next token of each row: logits (B, V) -> ids (B,) int64
BlockWeights = tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
SCORED = 64  # tokens of a prompt whose logits exist at a time
ALIKE = 2**11  # a window of more tokens, in all rows, is read once for those that are alike
ROWS, PLACES = 4, 64  # the rows of a server's step and the places it attends to are multiples of these


# ---------------------------------------------------------------------------------------------------------------------
# a step


def step(
    model: GPT,
    blocks: list[BlockWeights],
    cache: KVCache,
    ids: torch.Tensor,
    at: int | torch.Tensor,
    furthest: int | None = None,
) -> torch.Tensor:
    """Logits (B, V) after one more token in each of the cache's first B rows; its keys and values join the cache.

    The arithmetic of GPT.forward for the last token of a window, without its modules, whose calls would take a tenth of
    the time. ids: (B,) int64. at: how many tokens stand before it, an int for all rows, or int64 (B,) on the device.
    furthest: the largest of these, or None in a CUDA graph, which can't know it. blocks: from block_weights().
    """
    c, t, B = model.config, model.transformer, len(ids)
    hs, last, is_rotary = c.head_size, c.block_size - 1, c.positions == "rotary"
    normalize = rms_norm if c.norm == "rmsnorm" else layer_norm
    rotation = lines = None
    if isinstance(at, int):  # views, and no mask
        furthest, seen, mask = at, min(at, last) + 1, None
        place = at if at <= last else 1 + (at - 1) % last  # a full cache is a ring behind the first token
    else:
        width, place = cache.keys.shape[3], at
        seen = width if furthest is None else round_up(min(furthest, last) + 1, PLACES)
        mask = masks(width, seen, cache.keys.dtype, at.device)[width - 1 - at.clamp(max=last)].view(B, 1, 1, seen)
        if furthest is None or furthest > last:
            place = torch.where(at <= last, at, 1 + (at - 1) % max(last, 1))
        lines = (first_lines(B, c.kv_heads, width, at.device) + place[:, None]).flatten()
    x = t.wte.weight[ids]  # (B, C)
    if is_rotary:
        rotation = rotation_at(at, c, cache.keys, furthest)
        if furthest is None or furthest > last:
            slide(cache, c, B, at - last, furthest)
    else:
        x = x + t.wpe.weight[at]
    for weights, keys, values in zip(blocks, cache.keys[:, :B], cache.values[:, :B], strict=True):
        ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj = weights
        qkv = linear(normalize(x, *ln_1), *c_attn).view(B, -1, 1, hs)
        qk, v = qkv.split([c.n_head + c.kv_heads, c.kv_heads], dim=1)
        if rotation is not None:
            qk = rotate(qk, *rotation)
        q, k = qk.split([c.n_head, c.kv_heads], dim=1)  # (B, nh, 1, hs), (B, nkv, 1, hs)
        if lines is None:
            keys[:, :, place : place + 1], values[:, :, place : place + 1] = k, v
        else:
            keys.view(-1, hs).index_copy_(0, lines, k.reshape(-1, hs))
            values.view(-1, hs).index_copy_(0, lines, v.reshape(-1, hs))
        y = scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen], mask, enable_gqa=True)
        x = add_linear(x, y.reshape(B, -1), *attn_c_proj)
        y = normalize(x, *ln_2)
        y = gelu_linear(y, *c_fc, c.gelu) if c.mlp == "gelu" else swiglu(linear(y, *c_fc))
        x = add_linear(x, y, *mlp_c_proj)
    return model.lm_head(t.ln_f(x))


@functools.lru_cache(maxsize=256)
def first_lines(n_rows: int, n_head: int, width: int, device: torch.device) -> torch.Tensor:
    """Where each row's and head's first key stands in a cache as (B * nh * width, hs): (n_rows, n_head) int64."""
    return torch.arange(0, n_rows * n_head * width, width, device=device).view(n_rows, n_head)


@functools.lru_cache(maxsize=256)
def masks(width: int, seen: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Row i hides all but the first width - i of `seen` places: (2 width - seen + 1, seen), of 2 width numbers."""
    line = torch.zeros(2 * width, dtype=dtype, device=device)
    line[width:] = -math.inf
    return line.unfold(0, seen, 1)


def slide(
    cache: KVCache, config: GPTConfig, n_rows: int, beyond: int | torch.Tensor, furthest: int | None = None
) -> None:
    """Rotate the first token's keys of rows with rotary positions that are `beyond` their window, if above 0.

    So the first token stays block_size - 1 before the last one. The other keys keep their angles: only differences
    count.
    """
    beyond = beyond.clamp(min=0) if isinstance(beyond, torch.Tensor) else beyond
    rotation = rotation_at(beyond, config, cache.keys, furthest)
    cache.keys[:, :n_rows, :, :1] = rotate(cache.first[:, :n_rows], *rotation)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """nn.LayerNorm with these weights."""
    return torch.layer_norm(x, weight.shape, weight, bias, 1e-5)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """nn.RMSNorm with this weight; it has no bias."""
    return torch.rms_norm(x, weight.shape, weight, 1e-5)


def block_weights(model: GPT) -> list[BlockWeights]:
    """For each block, weight and bias of ln_1, c_attn, attention's c_proj, ln_2, c_fc and the MLP's c_proj."""
    layers = [(b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj) for b in model.transformer.h]
    return [tuple((layer.weight, getattr(layer, "bias", None)) for layer in block) for block in layers]


def prepack_matrices(model: GPT) -> None:
    """Repack each matrix into the layout that generates fastest; the model can't be trained afterwards."""
    weight = model.lm_head.weight
    dtypes = (torch.float32, torch.bfloat16) if ops.HAS_AVX512 else (torch.float32,)
    if weight.device.type == "cpu" and weight.dtype in dtypes:
        for module in model.modules():
            if isinstance(module, Linear):
                ops.prepack(module)


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------------------------------------------------------------
# rows at the same place


def window_start(n: int, config: GPTConfig) -> int:
    """Where the window that a model reads starts in a text of n tokens: at 0 while it fits.

    Learned positions tie a cached key to its position, so the cache is recomputed whenever the window slides: by half a
    block at a time. With rotary positions only a prompt is cut, to its last block_size tokens.
    """
    beyond, half = n - config.block_size, max(config.block_size // 2, 1)
    if config.positions == "rotary":
        return max(beyond, 0)
    return max(math.ceil(beyond / half) * half, 0)


class EvenRows:
    """The rows of a batch, all at the same place of their texts.

    record: replay a step as a CUDA graph. places: how many tokens of a row the cache has room for (None: a block).
    """

    def __init__(self, model: GPT, n_rows: int, record: bool = False, places: int | None = None):
        weight = model.transformer.wte.weight
        self.model, self.blocks, self.record = model, block_weights(model), record and weight.is_cuda
        wide = dataclasses.replace(model.config, block_size=places or model.config.block_size)
        self._take(KVCache.empty(wide, n_rows, weight.device, weight.dtype), start_at(n_rows, weight))

    def _take(self, cache: KVCache, at: int | torch.Tensor) -> None:
        """Go on with the rows in `cache`, all at the place `at`: a CUDA graph is recorded anew."""
        self.cache, self.at = cache, at
        self.step = Graphed(self._step) if self.record else self._step

    def read(self, window: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the token after a window, (B, T) int64, which fills the cache."""
        x = self._read(window)
        self.at *= 0  # in place: on CUDA it is a tensor
        self.at += window.shape[1]
        return self.model.lm_head(x[:, -1:])[:, 0]

    def _read(self, window: torch.Tensor) -> torch.Tensor:
        """A window's hidden states, (B, T, C); it fills the cache. Of a long one, rows that are alike are read once."""
        if window.numel() > ALIKE:
            distinct, places = window.unique(dim=0, return_inverse=True)
            if len(distinct) < len(window):
                x, T = self.model.hidden_states(distinct, self.cache.rows(slice(len(distinct)))), window.shape[1]
                for part in self.cache:
                    part[:, :, :, :T] = part[:, places, :, :T]
                return x[places]
        return self.model.hidden_states(window, self.cache)

    def _step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of the token after these, (B,) int64."""
        logits = step(self.model, self.blocks, self.cache, ids, self.at)
        self.at += 1
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but these, (n,) int64."""
        self._take(self.cache.rows(rows), self.at if isinstance(self.at, int) else self.at[rows])


def start_at(n_rows: int, weight: torch.Tensor) -> int | torch.Tensor:
    """The place of all rows, 0: on CUDA a tensor, (n_rows,) int64, which a CUDA graph can advance."""
    return torch.zeros(n_rows, device=weight.device, dtype=torch.long) if weight.is_cuda else 0


@torch.inference_mode()
def generate(
    model: GPT,
    idx: torch.Tensor,
    max_new_tokens: int,
    choose: Choose,
    tags: torch.Tensor | None = None,
    record: bool = False,
) -> Generator[torch.Tensor, torch.Tensor | None, None]:
    """Continue `idx`, yielding the next id of each row, (B,) int64, as soon as it is chosen.

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
    rows = EvenRows(model, B, record, min(c.block_size, n + max_new_tokens + 1))
    ids, is_read = idx[:, n - 1], False
    for _ in range(max_new_tokens):
        if is_read:
            logits = rows.step(ids)
        else:
            logits = rows.read(idx[:, :n] if tags is None else torch.cat([tags[:, None], idx[:, 1:n]], dim=1))
        ids, is_read = choose(logits), True
        if c.positions == "learned":
            start = window_start(n + 1, c)  # counted from the start of the window, it moves as in the full text
            if start:
                idx = idx.roll(-start, 1)
            is_read, n = not start, n + 1 - start
            idx[:, n - 1] = ids
        kept = yield ids
        if kept is not None:
            ids, idx, tags = ids[kept], idx[kept], None if tags is None else tags[kept]
            rows.keep(kept)


# ---------------------------------------------------------------------------------------------------------------------
# rows at places of their own


@dataclasses.dataclass(eq=False)
class Row:
    """One text in the model. window: its ids, of which all but the last are cached. n: how many those are.

    With rotary positions the window is not kept: `n` counts on, beyond block_size too. tag: of its style. place: its
    row in the cache. kept: its part of the cache while it is paused.
    """

    window: list[int]
    tag: int | None
    place: int
    n: int = 0
    kept: tuple[torch.Tensor, ...] = ()


class Rows:
    """Up to max_rows rows, each at its own place; those in use stand first, so that a step reads no others.

    A row's logits are the same bits however many rows share the step and whichever place it has among them. On a CPU
    that holds because every shape that could change a product's rounding is rounded up: rows to a multiple of 4, of 2
    with oneDNN, keys and values to a multiple of 64. A prompt is read alone, so its shapes are its own.
    """

    def __init__(self, model: GPT, max_rows: int):
        weight, places = model.transformer.wte.weight, round_up(model.config.block_size, PLACES)
        self.model, self.max_rows, self.device = model, max_rows, weight.device
        self.rows: list[Row] = []
        wide = dataclasses.replace(model.config, block_size=places)
        self.cache = KVCache.empty(wide, round_up(max_rows, ROWS), weight.device, weight.dtype)
        self.blocks = block_weights(model)
        self.multiple = 2 if model.lm_head.weight.is_mkldnn else ROWS

    @property
    def free(self) -> int:
        """How many rows may be added."""
        return self.max_rows - len(self.rows)

    @torch.inference_mode()
    def add(self, ids: list[int], tag: int | None) -> tuple[Row, torch.Tensor]:
        """Add a row and read its prompt but for the last id, of which the next step makes logits.

        ids: the prompt; the end that fits a window is read. tag: its style's, put before it. Returns the row and the
        hidden states of what was read, (T, C).
        """
        ids = ids if tag is None else [tag, *ids]
        row = Row(ids[window_start(len(ids), self.model.config) :], tag, len(self.rows))
        hidden = self._read(row)
        self.rows.append(row)
        return row, hidden

    def copy(self, row: Row) -> Row:
        """Add a row with the same text."""
        added = dataclasses.replace(row, window=list(row.window), place=len(self.rows))
        self._move(row.place, added.place)
        self.rows.append(added)
        return added

    def drop(self, row: Row) -> None:
        """Remove a row; the last one takes its place."""
        last = self.rows.pop()
        if last is not row:
            self._move(last.place, row.place)
            self.rows[row.place], last.place = last, row.place

    def pause(self, row: Row) -> None:
        """Remove a row and keep its part of the cache in main memory: reading the text again would round otherwise."""
        row.kept = tuple(part[:, row.place, :, : max(row.n, 1)].to("cpu", copy=True) for part in self.cache)
        self.drop(row)

    def resume(self, row: Row) -> None:
        """Add a paused row again."""
        row.place = len(self.rows)
        for part, kept in zip(self.cache, row.kept, strict=True):
            part[:, row.place, :, : kept.shape[2]] = kept
        row.kept = ()
        self.rows.append(row)

    def _move(self, source: int, target: int) -> None:
        for part in self.cache:
            part[:, target] = part[:, source]

    def _read(self, row: Row) -> torch.Tensor:
        """Fill a row's cache with its window but for the last id, and with a first one always; (T, C)."""
        if row.tag is not None:
            row.window[0] = row.tag
        row.n = len(row.window) - 1
        idx = torch.tensor([row.window[: max(row.n, 1)]], device=self.device)
        return self.model.hidden_states(idx, self.cache.rows(slice(row.place, row.place + 1)))[0]

    @torch.inference_mode()
    def push(self, row: Row, id: int) -> None:
        """Append an id, which the next step reads. A window of learned positions may slide: it is read again."""
        row.n += 1
        if self.model.config.positions == "rotary":
            row.window[-1:] = [id]
            return
        row.window.append(id)
        if start := window_start(len(row.window), self.model.config):
            row.window = row.window[start:]
            self._read(row)

    @torch.inference_mode()
    def step(self) -> torch.Tensor:
        """Logits (rows, V) of the token after each row's last id, whose keys and values join the cache."""
        n_rows = len(self.rows)
        given = np.zeros((2, round_up(n_rows, self.multiple)), np.int64)
        given[:, :n_rows] = [row.n for row in self.rows], [row.window[-1] for row in self.rows]
        at, ids = torch.from_numpy(given).to(self.device)
        return step(self.model, self.blocks, self.cache, ids, at, int(given[0].max()))[:n_rows]


@torch.inference_mode()
def prompt_logprobs(model: GPT, hidden: list[torch.Tensor], weights: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities of what follows each token of a prompt, at most (64, V) at a time, nats.

    hidden: (T, C) for each of the S styles. weights: (S,).
    """
    for parts in zip(*(states.split(SCORED) for states in hidden), strict=True):
        logits = torch.stack([model.lm_head(part) for part in parts], dim=1)  # (64, S, V)
        yield blended(logits.flatten(0, 1), weights).log_softmax(-1)
