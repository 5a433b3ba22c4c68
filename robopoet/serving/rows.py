"""Rows at different places of different texts, which share each step of the model.

A row's logits are the same bits however many rows share the step and whichever place it has among them. On a CPU that
holds because every shape that could change a product's rounding is rounded up: rows to a multiple of 4, keys and values
to a multiple of 64. A prompt is read alone, so its shapes are its own.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import torch

from model import GPT, KVCache, rotary_table
from robopoet.ops import add_linear, gelu_linear, linear, single_query_attention
from robopoet.writing.generate import block_weights, rotate, window_start
from robopoet.writing.sampler import blend

ROWS, PLACES = 4, 64  # a step's rows and the places it attends to are multiples of these
SCORED = 64  # tokens of a prompt whose logits exist at a time


def round_up(n: int, step: int) -> int:
    """The smallest multiple of `step` that is at least n."""
    return -(-n // step) * step


@dataclasses.dataclass(eq=False)
class Row:
    """One text in the model. window: its ids, of which all but the last are cached. n: how many those are.

    With rotary positions the window is not kept: `n` counts on, beyond block_size too. tag: of its style. kept: its
    part of the cache while it is paused.
    """

    window: list[int]
    tag: int | None
    place: int
    n: int = 0
    kept: tuple[torch.Tensor, ...] = ()


class Slot(KVCache):
    """The part of a cache that belongs to one row."""

    def __init__(self, cache: KVCache, place: int):
        self.keys, self.values, self.first = (
            part[:, place : place + 1] for part in (cache.keys, cache.values, cache.first)
        )
        self.length = 0


class Rows:
    """Up to max_rows rows; those in use stand first, so that a step reads no others.

    furthest: the most tokens that a row's window and text may have together.
    """

    def __init__(self, model: GPT, max_rows: int, furthest: int):
        c, weight = model.config, model.transformer.wte.weight
        wide = dataclasses.replace(c, block_size=round_up(c.block_size, PLACES))
        self.model, self.max_rows, self.rows, self.device = model, max_rows, [], weight.device
        self.cache = KVCache(wide, round_up(max_rows, ROWS), weight.device, weight.dtype)
        self.blocks = block_weights(model)
        if c.positions == "rotary":
            table = rotary_table(torch.arange(furthest + 1, device=self.device), c.n_embd // c.n_head).to(weight.dtype)
            cos, sin = table[:, :, None, None, None]  # (positions, 1, 1, 1, hs / 2), for q and k
            self.cos, self.sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

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
        row.kept = tuple(part[:, row.place, :, : max(row.n, 1)].to("cpu", copy=True) for part in self._parts)
        self.drop(row)

    def resume(self, row: Row) -> None:
        """Add a paused row again."""
        row.place = len(self.rows)
        for part, kept in zip(self._parts, row.kept, strict=True):
            part[:, row.place, :, : kept.shape[2]] = kept
        row.kept = ()
        self.rows.append(row)

    @property
    def _parts(self) -> tuple[torch.Tensor, ...]:
        return self.cache.keys, self.cache.values, self.cache.first

    def _move(self, source: int, target: int) -> None:
        for part in self._parts:
            part[:, target] = part[:, source]

    def _read(self, row: Row) -> torch.Tensor:
        """Fill a row's cache with its window but for the last id, and with a first one always; (T, C)."""
        model, t = self.model, self.model.transformer
        if row.tag is not None:
            row.window[0] = row.tag
        row.n = len(row.window) - 1
        idx = torch.tensor([row.window[: max(row.n, 1)]], device=self.device)
        x, rotation, slot = t.wte(idx), None, Slot(self.cache, row.place)
        if model.config.positions == "rotary":
            positions = torch.arange(idx.shape[1], device=self.device)
            rotation = rotary_table(positions, model.config.n_embd // model.config.n_head)
        else:
            x = x + t.wpe.weight[: idx.shape[1]]
        for block in t.h:
            x = block(x, rotation, slot)
        return t.ln_f(x)[0]

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
        """Logits (rows, V) of the token after each row's last id, whose keys and values join the cache.

        The arithmetic of writing.generate.decode, for rows at different places.
        """
        c, t, cache, n_rows = self.model.config, self.model.transformer, self.cache, len(self.rows)
        M, last, hs = round_up(n_rows, ROWS), c.block_size - 1, c.n_embd // c.n_head
        at, ids = np.zeros(M, np.int64), np.zeros(M, np.int64)
        at[:n_rows], ids[:n_rows] = [row.n for row in self.rows], [row.window[-1] for row in self.rows]
        place = np.where(at <= last, at, 1 + (at - 1) % max(last, 1))  # a full cache is a ring behind the first token
        filled = np.minimum(at, last)
        S = round_up(int(filled.max()) + 1, PLACES)
        lines = (np.arange(M)[:, None] * c.n_head + np.arange(c.n_head)) * cache.keys.shape[3] + place[:, None]
        hidden = np.where(np.arange(S) <= filled[:, None], np.float32(0), np.float32(-math.inf))
        positions, ids, lines, mask = (torch.from_numpy(a).to(self.device) for a in (at, ids, lines.ravel(), hidden))
        mask = mask.view(M, 1, 1, S).to(cache.keys.dtype)
        x, rotary = t.wte.weight[ids], c.positions == "rotary"  # (M, C)
        if rotary:
            cos, sin = self.cos[positions], self.sin[positions]  # (M, 1, 1, 1, hs)
            self._turn_first(at - last)
        else:
            x = x + t.wpe.weight[positions]
        for weights, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj = weights
            qkv = linear(torch.layer_norm(x, (c.n_embd,), *ln_1), *c_attn).view(M, 3, c.n_head, 1, hs)
            if rotary:
                q, k = rotate(qkv[:, :2], cos, sin).unbind(1)
            else:
                q, k = qkv[:, 0], qkv[:, 1]
            keys.view(-1, hs).index_copy_(0, lines, k.reshape(-1, hs))
            values.view(-1, hs).index_copy_(0, lines, qkv[:, 2].reshape(-1, hs))
            y = single_query_attention(q, keys[:M, :, :S], values[:M, :, :S], mask)  # (M, nh, 1, hs)
            x = add_linear(x, y.reshape(M, -1), *attn_c_proj)
            x = add_linear(x, gelu_linear(torch.layer_norm(x, (c.n_embd,), *ln_2), *c_fc, c.gelu), *mlp_c_proj)
        return self.model.lm_head(t.ln_f(x))[:n_rows]

    def _turn_first(self, slid: np.ndarray) -> None:
        """Rotate the first token's keys of rows whose window has slid by so many tokens, as generate._slide does."""
        rows = np.flatnonzero(slid > 0)
        if len(rows):
            places, angles = (torch.from_numpy(a).to(self.device) for a in (rows, slid[rows]))
            cos, sin = self.cos[angles][:, 0], self.sin[angles][:, 0]  # (k, 1, 1, hs)
            self.cache.keys[:, places, :, :1] = rotate(self.cache.first[:, places], cos, sin)


def blended(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Logits of S styles, (S, V), to those of their blend, (1, V), in float32 or better. weights: (S,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return blend(logits, weights) if len(weights) > 1 else logits


@torch.inference_mode()
def prompt_logprobs(model: GPT, hidden: list[torch.Tensor], weights: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities of what follows each token of a prompt, at most (64, V) at a time, nats.

    hidden: (T, C) for each of the S styles. weights: (S,).
    """
    for parts in zip(*(states.split(SCORED) for states in hidden), strict=True):
        logits = torch.stack([model.lm_head(part) for part in parts], dim=1)  # (64, S, V)
        yield blended(logits.flatten(0, 1), weights).log_softmax(-1)
