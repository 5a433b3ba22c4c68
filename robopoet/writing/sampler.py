"""Sampling the next token: penalties, temperature and filters, then a draw from what they leave.

B: passages, S: styles in a blend (1 without one), V: vocab_size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from robopoet.errors import CheckpointError
from robopoet.ops import in_float64
from robopoet.writing.characters import Characters
from robopoet.writing.copies import Copied
from robopoet.writing.passage import Settings

Uniforms = Callable[[list[int]], torch.Tensor]  # the next number of each of these rows' streams, float64 in [0, 1)


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide the positive logits of `seen` tokens, (B, V) bool, by `penalty` and multiply the negative ones by it.

    Keskar et al. 2019, CTRL (arXiv:1909.05858).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class NGrams:
    """The n-grams of a growing text: which ids would repeat one.

    prompt: the n-grams of the prompt, shared by all passages that continue it.
    """

    def __init__(self, n: int, prompt: "NGrams | None" = None):
        self.n = n
        self.followers: dict[bytes, bytes] = {}  # n - 1 ids -> every id that has followed them; int32
        self.prompt_followers = prompt.followers if prompt else {}
        self.tail = prompt.tail if prompt else b""  # the last n - 1 ids

    def repeats(self) -> np.ndarray:
        """The ids that would repeat an n-gram, (k,) int32."""
        followers = self.prompt_followers.get(self.tail, b"") + self.followers.get(self.tail, b"")
        return np.frombuffer(followers, np.int32)

    def push(self, id: int) -> None:
        """Append an id to the text."""
        size = 4 * (self.n - 1)
        if len(self.tail) == size and id not in self.repeats():
            self.followers[self.tail] = self.followers.get(self.tail, b"") + np.int32(id).tobytes()
        self.tail = (self.tail + np.int32(id).tobytes())[-size:] if size else b""


def forbid(
    logits: torch.Tensor, ids: Sequence[Sequence[int] | np.ndarray], characters: Characters | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Set the logits of each row's `ids` to -inf, except in a row where no token would be left; (B, V), and (B,) those.

    Paulus et al. 2017 (arXiv:1705.04304).
    """
    masked = mask(logits, ids)
    none = (characters.mask(masked) if characters else masked).amax(-1) == -torch.inf
    return torch.where(none[:, None], logits, masked), none


def mask(logits: torch.Tensor, ids: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
    """Set the logits of each row's `ids` to -inf."""
    if not any(map(len, ids)):
        return logits
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    columns = np.concatenate([np.asarray(row, np.int64) for row in ids])
    index = tuple(torch.from_numpy(part).to(logits.device) for part in (rows, columns))
    return logits.index_put(index, logits.new_tensor(-torch.inf))


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest logits of each row and set the rest to -inf (Fan et al. 2018, arXiv:1805.04833)."""
    smallest = logits.topk(min(k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep each row's likeliest tokens until their probabilities add up to p (Holtzman et al. 2020, arXiv:1904.09751).

    The rest is set to -inf.
    """
    ordered, indices = logits.sort(descending=True)
    probs = ordered.softmax(-1)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= p, -torch.inf)
    return torch.empty_like(logits).scatter_(1, indices, ordered)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep tokens at least p times as probable as their row's likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)


def is_kept(probs: torch.Tensor, ids: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """Whether keep_top_k (if k > 0) and then keep_top_p (if p < 1) would keep each row's token, (B,) bool.

    probs: (B, V). ids: (B,) int64. Needs no sort: it counts the tokens that are likelier and adds up their probability.
    """
    likelier = probs > probs.gather(1, ids[:, None])
    kept = likelier.sum(-1, dtype=torch.int32) < k if k else torch.ones_like(ids, dtype=torch.bool)
    if p < 1:
        kept &= (probs * likelier).sum(-1) < (p * probs.topk(min(k, probs.shape[1])).values.sum(-1) if k else p)
    return kept


def blend(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of log-probabilities: logits (B * S, V), the S styles of a passage in successive rows -> (B, V).

    weights: (S,).
    """
    return (logits.log_softmax(-1).unflatten(0, (-1, len(weights))) * weights[:, None]).sum(1)


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One id per row, (B,) int64: the inverse of the cumulative distribution at `uniforms`, (B,) float64 in [0, 1).

    Raises CheckpointError if a probability is not a number.
    """
    cumulative = in_float64(probs).cumsum_(-1)  # cumsum with a dtype takes a quarter longer
    if cumulative[:, -1].isnan().any():
        raise CheckpointError("the model's logits are not finite: its weights are damaged, or too large for its dtype")
    points = uniforms.to(cumulative.device) * cumulative[:, -1]
    return torch.searchsorted(cumulative, points[:, None], right=True)[:, 0].to(probs.device)


def likeliest(logits: torch.Tensor, characters: Characters | None) -> torch.Tensor:
    """The likeliest id of each row, (B,) int64, of those that `characters` allow."""
    ids = logits.argmax(-1)
    return ids if characters is None or characters.allow(ids).all() else characters.mask(logits).argmax(-1)


def draw_filtered(
    logits: torch.Tensor,
    filters: tuple[int, float, float],
    rows: list[int],
    uniforms: Uniforms,
    characters: Characters | None,
) -> torch.Tensor:
    """One id per row, (B,) int64, of those that the filters leave and `characters` allow.

    Where there is none, the filters are applied to what `characters` allow. filters: top_k, top_p and min_p. rows: the
    rows that the logits, (B, V), are of.
    """
    k, p, min_p = filters

    def leave(logits: torch.Tensor) -> torch.Tensor:
        return keep_min_p(keep_top_p(keep_top_k(logits, k), p), min_p)

    filtered = leave(logits)
    ids = draw(filtered.softmax(-1), uniforms(rows))
    if characters and not (allowed := characters.allow(ids)).all():
        left = characters.mask(filtered)
        left = torch.where(left.amax(-1, keepdim=True) > -torch.inf, left, leave(characters.mask(logits)))
        wrong = (~allowed).nonzero()[:, 0]
        ids[wrong] = draw(left[wrong].softmax(-1), uniforms([rows[i] for i in wrong.tolist()]))
    return ids


class Sampler:
    """Samples the next token of each passage according to `settings`; never one of `forbidden` (ids, int64).

    passages: their numbers; each draws from its own random stream, seeded by (settings.seed, number), so that its text
    does not depend on the passages beside it. weights: of the styles in the blend, (S,). prompt: the ids that every
    passage continues, for the penalties. copied: what the prompt's text would copy, with max_copy. characters: no token
    is sampled that would break one; None if none can. stuck: for each row of the last step, whether every token would
    have completed a copy, so that its id means nothing.
    """

    def __init__(
        self,
        settings: Settings,
        forbidden: torch.Tensor,
        passages: Sequence[int],
        weights: list[float],
        prompt: list[int],
        copied: Copied | None = None,
        characters: Characters | None = None,
    ):
        self.settings, self.forbidden = settings, forbidden
        self.weights = torch.tensor(weights, device=forbidden.device)
        self.streams = [np.random.default_rng((settings.seed, number)) for number in passages]
        self.prompt = torch.tensor(prompt, device=forbidden.device)
        self.logits = self.ids = torch.empty(0)  # of the last step: (B, V) before penalties, and what was sampled, (B,)
        self.seen: torch.Tensor | None = None  # (B, V) bool: the ids in each text; only with repetition_penalty
        self.ngrams: list[NGrams] = []  # of each text; only with no_repeat_ngram
        if settings.no_repeat_ngram:
            shared = NGrams(settings.no_repeat_ngram)
            for id in prompt:
                shared.push(id)
            self.ngrams = [NGrams(settings.no_repeat_ngram, shared) for _ in passages]
        self.copied = [copied.fork() for _ in passages] if copied else []  # of each text
        self.characters = characters and characters.at(np.zeros(len(passages), np.int64))
        self.stuck = [False] * len(passages)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B * S, V) -> ids (B * S,) int64, the same for all styles of a passage. May overwrite the logits."""
        styles = len(self.weights)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill_(1, self.forbidden, -torch.inf)
        if styles > 1:
            logits = blend(logits, self.weights)
        ids = self.sample(self.penalize(logits))
        self.note(ids)
        self.logits, self.ids = logits, ids
        return ids.repeat_interleave(styles) if styles > 1 else ids

    @property
    def logprobs(self) -> torch.Tensor:
        """Log-probabilities of the ids sampled last, (B,), nats: the model's own, before penalties and filters."""
        return self.logits.log_softmax(-1).gather(1, self.ids[:, None])[:, 0]

    def keep(self, rows: list[int]) -> None:
        """Drop all passages but these, given by their rows."""
        self.streams = [self.streams[row] for row in rows]
        self.ngrams = [self.ngrams[row] for row in rows] if self.ngrams else []
        self.copied = [self.copied[row] for row in rows] if self.copied else []
        self.characters = self.characters and self.characters.at(self.characters.states[rows])
        self.seen = None if self.seen is None else self.seen[rows]
        self.stuck = [False] * len(rows)

    def uniforms(self, rows: list[int]) -> torch.Tensor:
        """The next number of each of these rows' streams, float64 in [0, 1), on the CPU."""
        return torch.from_numpy(np.array([self.streams[row].random() for row in rows]))

    @property
    def penalizes(self) -> bool:
        """Whether penalize() changes anything: whether the next token depends on more than the logits."""
        return self.settings.repetition_penalty != 1 or bool(self.ngrams or self.copied)

    def penalize(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) -> the same after repetition_penalty, no_repeat_ngram and max_copy."""
        s = self.settings
        if s.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(1, self.prompt, True)
            logits = penalize_repetition(logits, self.seen, s.repetition_penalty)
        if self.ngrams:
            logits, _ = forbid(logits, [ngrams.repeats() for ngrams in self.ngrams], self.characters)
        if self.copied:
            logits, stuck = forbid(logits, [copied.ids() for copied in self.copied], self.characters)
            self.stuck = stuck.tolist()
        return logits

    def note(self, ids: torch.Tensor) -> None:
        """Remember the ids that were sampled, (B,), for the next step."""
        if self.characters:
            self.characters.push(ids)
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        for texts in (self.ngrams, self.copied):
            for text, id in zip(texts, ids.tolist() if texts else (), strict=True):
                text.push(id)

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) -> ids (B,) int64, by temperature, top_k, top_p and min_p."""
        s = self.settings
        if s.temperature == 0:
            return likeliest(logits, self.characters)
        logits = logits / s.temperature
        probs = logits.softmax(-1)
        min_p_probs = probs if not s.min_p else probs * (probs >= s.min_p * probs.amax(-1, keepdim=True))
        ids = draw(min_p_probs, self.uniforms(list(range(len(probs)))))
        if not s.top_k and s.top_p == 1 and not self.characters:
            return ids
        # Rejection sampling: draw from all tokens, and draw again where top_k or top_p would drop the token, or it
        # would break a character. That gives the filtered distribution, and is_kept takes 0.15 ms where sorting
        # 32 x 6,725 logits takes 6.5 ms. 95% of draws pass; a row rejected three times is filtered.
        kept = self.keeps(probs, ids, slice(None))
        if kept.all():
            return ids
        rows = (~kept).nonzero()[:, 0]
        for _ in range(2):
            if not len(rows):
                return ids
            redrawn = draw(min_p_probs[rows], self.uniforms(rows.tolist()))
            ids[rows] = redrawn
            rows = rows[~self.keeps(probs[rows], redrawn, rows.tolist())]
        if len(rows):
            numbers, filters = rows.tolist(), (s.top_k or logits.shape[1], s.top_p, s.min_p)
            characters = self.characters and self.characters.at(self.characters.states[numbers])
            ids[rows] = draw_filtered(logits[rows], filters, numbers, self.uniforms, characters)
        return ids

    def keeps(self, probs: torch.Tensor, ids: torch.Tensor, rows: slice | list[int]) -> torch.Tensor:
        """Whether top_k, top_p and the characters leave each of these rows its id, (B,) bool."""
        s = self.settings
        kept = torch.ones_like(ids, dtype=torch.bool)
        if s.top_k or s.top_p < 1:
            kept = is_kept(probs, ids, s.top_k, s.top_p)
        return kept & self.characters.at(self.characters.states[rows]).allow(ids) if self.characters else kept
