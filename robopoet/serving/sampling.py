"""Sampling for rows whose settings differ: temperature, top_k, top_p and min_p, each a tensor with a value for a row.

The same draws as writing.sampler.Sampler makes for one text: with its seed a text is the same as `Poet` writes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from robopoet.writing.characters import Characters
from robopoet.writing.passage import Settings
from robopoet.writing.sampler import Uniforms, draw, draw_filtered, likeliest


class Filters(NamedTuple):
    """The settings of B rows, (B,) each; top_k is V where it is off. A flag tells whether any row needs a filter."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    cuts: bool  # by top_k or top_p
    floors: bool  # by min_p

    @classmethod
    def of(cls, settings: Sequence[Settings], logits: torch.Tensor) -> "Filters":
        """The filters of these rows, for their logits, (B, V)."""
        vocab_size, dtype = logits.shape[1], logits.dtype
        values = zip(
            *((s.temperature, min(s.top_k or vocab_size, vocab_size), s.top_p, s.min_p) for s in settings), strict=True
        )
        kinds = dtype, torch.int64, dtype, dtype
        temperature, top_k, top_p, min_p = (
            torch.tensor(column, dtype=kind, device=logits.device) for column, kind in zip(values, kinds, strict=True)
        )
        cuts = bool(((top_k < vocab_size) | (top_p < 1)).any())
        return cls(temperature, top_k, top_p, min_p, cuts, bool((min_p > 0).any()))


def sample(
    logits: torch.Tensor, filters: Filters, uniforms: Uniforms, characters: Characters | None = None
) -> torch.Tensor:
    """Logits (B, V), in float32 or better, to ids (B,) int64 that `characters` allow; temperature 0: the likeliest."""
    warm = filters.temperature > 0
    best = likeliest(logits, characters)
    if not warm.any():
        return best
    logits = logits / torch.where(warm, filters.temperature, 1)[:, None]
    probs = logits.softmax(-1)
    pool = probs
    if filters.floors:
        pool = probs * (probs >= filters.min_p[:, None] * probs.amax(-1, keepdim=True))
    rows = warm.nonzero()[:, 0]
    ids = torch.where(warm, draw(pool, uniforms(list(range(len(probs))))), best)
    if not filters.cuts and not characters:
        return ids

    def keeps(probs: torch.Tensor, ids: torch.Tensor, filters: Filters, rows: slice | list[int]) -> torch.Tensor:
        kept = _kept(probs, ids, filters) if filters.cuts else torch.ones_like(ids, dtype=torch.bool)
        return kept & characters.at(characters.states[rows]).allow(ids) if characters else kept

    rows = rows[~keeps(probs, ids, filters, slice(None))[rows]]
    for _ in range(2):
        if not len(rows):
            return ids
        redrawn = draw(pool[rows], uniforms(rows.tolist()))
        ids[rows] = redrawn
        theirs = Filters(*(f[rows] for f in filters[:4]), *filters[4:])
        rows = rows[~keeps(probs[rows], redrawn, theirs, rows.tolist())]
    for row in rows.tolist():
        one, theirs = slice(row, row + 1), tuple(f[row].item() for f in filters[1:4])
        character = characters and characters.at(characters.states[one])
        ids[row] = draw_filtered(logits[one], theirs, [row], uniforms, character)
    return ids


def _kept(probs: torch.Tensor, ids: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Whether each row's top_k and then top_p keep its token, (B,) bool: writing.sampler.is_kept, row by row."""
    likelier = probs > probs.gather(1, ids[:, None])
    kept = likelier.sum(-1, dtype=torch.int32) < filters.top_k
    # of one row alone torch would add up the parts on several threads, and round otherwise
    mass = F.pad(probs * likelier, (0, 0, 0, int(len(probs) == 1))).sum(-1)[: len(probs)]
    limit = filters.top_p.clone()
    both = ((filters.top_k < probs.shape[1]) & (limit < 1)).nonzero()[:, 0]
    if len(both):
        top_k = filters.top_k[both]
        largest = probs[both].topk(int(top_k.max())).values.cumsum(-1)
        limit[both] *= largest.gather(1, top_k[:, None] - 1)[:, 0]
    return kept & ((filters.top_p >= 1) | (mass < limit))
