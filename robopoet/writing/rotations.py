"""How rotary positions rotate the queries and keys of one token in each row, looked up where model.py computes it."""

import functools

import torch

from model import GPTConfig, rotary_table

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines for queries and keys: (1, hs), or (B, 1, 1, hs)
STRETCH = 256  # positions whose rotations are computed together
TABLED = 2**14  # rows before this position look their rotations up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """model.rotary at one position, in three calls: x (..., hs)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rotation_at(at: int | torch.Tensor, config: GPTConfig, keys: torch.Tensor, furthest: int | None = None) -> Rotation:
    """How queries and such keys are rotated at a position, or at each of (B,) int64 positions, at most `furthest`."""
    if isinstance(at, int):
        return _stretch(config, keys.dtype, keys.device, at // STRETCH)[at % STRETCH]
    if furthest is None or furthest >= TABLED:
        return _expand(rotary_table(at, config).to(keys.dtype))
    cos, sin = _rotations(config, keys.dtype, keys.device, max(STRETCH, 1 << furthest.bit_length()))
    return cos[at], sin[at]


@functools.lru_cache(maxsize=16)
def _stretch(config: GPTConfig, dtype: torch.dtype, device: torch.device, number: int) -> list[Rotation]:
    """The rotations at STRETCH positions: one by one, each would take a dozen calls."""
    positions = torch.arange(STRETCH, device=device) + number * STRETCH
    return list(zip(*_expand(rotary_table(positions, config).to(dtype)), strict=True))


@functools.lru_cache(maxsize=16)
def _rotations(config: GPTConfig, dtype: torch.dtype, device: torch.device, n: int) -> Rotation:
    """The rotations at the first n positions: (n, 1, 1, hs) each."""
    return _expand(rotary_table(torch.arange(n, device=device), config).to(dtype))


def _expand(table: torch.Tensor) -> Rotation:
    """The cosines and sines in a rotary_table() for rotate(): (T, 1, 1, hs) each."""
    cos, sin = table[:, :, None, None]  # (T, 1, 1, hs / 2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
