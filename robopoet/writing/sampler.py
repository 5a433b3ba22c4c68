"""The choice of the next token: penalties, temperature, filters, and a draw from what they leave.

Logits and probabilities are (B, V). Of a text so far a penalty keeps only what it asks for.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from robopoet.writing.passage import Settings


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide the positive logits of tokens `seen`, (B, V) bool, by `penalty`, multiply the negative ones.

    Keskar et al. 2019, CTRL (arXiv:1909.05858).
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


class Grams:
    """The runs of n tokens in a text that grows: which ids would make one come a second time.

    prompt: grams that the text begins with, shared among texts.
    """

    def __init__(self, n: int, prompt: "Grams | None" = None):
        self.n = n
        self.followers: dict[bytes, bytes] = {}  # n - 1 ids -> the ids that have come behind them, int32
        self.prompts = prompt.followers if prompt else {}
        self.tail = prompt.tail if prompt else b""  # the last n - 1 ids

    def repeats(self) -> np.ndarray:
        """The ids that would repeat a gram, (k,) int32."""
        return np.frombuffer(self.prompts.get(self.tail, b"") + self.followers.get(self.tail, b""), np.int32)

    def push(self, ids: Iterable[int]) -> None:
        """Take the text's next tokens."""
        size = 4 * (self.n - 1)
        for id in ids:
            if len(self.tail) == size and id not in self.repeats():
                self.followers[self.tail] = self.followers.get(self.tail, b"") + np.int32(id).tobytes()
            self.tail = (self.tail + np.int32(id).tobytes())[-size:] if size else b""


def forbid(logits: torch.Tensor, ids: Sequence[np.ndarray]) -> torch.Tensor:
    """Leave out each row's `ids`, (k,) int32, unless nothing else is left (Paulus et al. 2017, arXiv:1705.04304)."""
    rows = np.repeat(np.arange(len(ids)), [len(row) for row in ids])
    if not len(rows):
        return logits
    places = tuple(torch.from_numpy(index).long().to(logits.device) for index in (rows, np.concatenate(ids)))
    left = logits.index_put(places, logits.new_tensor(-torch.inf))
    return torch.where(left.amax(-1, keepdim=True) > -torch.inf, left, logits)


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Leave the k largest logits of each row, the rest -inf (Fan et al. 2018, arXiv:1805.04833)."""
    smallest = logits.topk(min(k, logits.shape[1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Leave each row's likeliest tokens until their probability reaches p (Holtzman et al. 2020, arXiv:1904.09751)."""
    ordered, places = logits.sort(descending=True)
    probs = ordered.softmax(-1)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= p, -torch.inf)
    return torch.empty_like(logits).scatter_(1, places, ordered)


def keep_min_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Leave tokens at least p times as probable as their row's likeliest (Nguyen et al. 2024, arXiv:2407.01082)."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -torch.inf)


def is_kept(probs: torch.Tensor, ids: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """Whether keep_top_k, if k, and then keep_top_p, if p < 1, would leave each row's token, (B,) bool.

    probs: (B, V). ids: (B,) int64. Asks how many tokens are likelier than it, and what they add up to: no sorting.
    """
    likelier = probs > probs.gather(1, ids[:, None])
    kept = likelier.sum(-1) < (k or probs.shape[1])
    if p < 1:
        kept &= (probs * likelier).sum(-1) < (p * probs.topk(min(k, probs.shape[1])).values.sum(-1) if k else p)
    return kept


def blend(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of log-probabilities: (B * S, V), the S rows of a text one after another, and (S,) -> (B, V)."""
    return (logits.log_softmax(-1).unflatten(0, (-1, len(weights))) * weights[:, None]).sum(1)


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """One token a row, (B,) int64: the inverse of the cumulative distribution at `uniforms` (B,) float64 in [0, 1)."""
    cumulative = probs.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, (uniforms * cumulative[:, -1])[:, None], right=True)[:, 0]


class Sampler:
    """Picks each row's next token by `settings`, never one of `forbidden` (ids, int64).

    Row i draws from a random stream of its own, made from (seed, passages[i]), so that a passage is the same whatever
    is written beside it. weights: of the styles in which each text is read, (S,); S rows of logits make one of choices.
    prompt: the ids that every text begins with. logprobs: (B,) of the tokens chosen last, under the model alone, if
    `keeps_logprobs`.
    """

    def __init__(
        self,
        settings: Settings,
        forbidden: torch.Tensor,
        passages: Sequence[int],
        weights: list[float],
        prompt: list[int],
        keeps_logprobs: bool = False,
    ):
        self.settings, self.forbidden, self.keeps_logprobs = settings, forbidden, keeps_logprobs
        self.weights = torch.tensor(weights, device=forbidden.device)
        self.streams = [np.random.default_rng((settings.seed, passage)) for passage in passages]
        self.prompt = torch.tensor(prompt, device=forbidden.device)
        self.logprobs: torch.Tensor | None = None
        self.seen: torch.Tensor | None = None  # (B, V) bool: what stands in each text, if repetition_penalty asks
        self.grams: list[Grams] = []  # of each text, if no_repeat_ngram asks
        if settings.no_repeat_ngram:
            shared = Grams(settings.no_repeat_ngram)
            shared.push(prompt)
            self.grams = [Grams(settings.no_repeat_ngram, shared) for _ in passages]

    def keep(self, rows: list[int]) -> None:
        """Go on with these passages alone."""
        self.streams = [self.streams[row] for row in rows]
        self.grams = [self.grams[row] for row in rows] if self.grams else []
        self.seen = None if self.seen is None else self.seen[rows]

    def uniforms(self, rows: list[int]) -> torch.Tensor:
        """The next number of each of these rows' streams, float64 in [0, 1)."""
        numbers = [self.streams[row].random() for row in rows]
        return torch.tensor(numbers, dtype=torch.float64, device=self.forbidden.device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B * S, V) -> ids (B * S,) int64, S alike in a row; B * S only falls, by keep()."""
        styles = len(self.weights)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill(1, self.forbidden, -torch.inf)
        if styles > 1:
            logits = blend(logits, self.weights)
        ids = self.choose(self.penalize(logits))
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)
        if self.grams:
            for grams, id in zip(self.grams, ids.tolist(), strict=True):
                grams.push([id])
        if self.keeps_logprobs:
            self.logprobs = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
        return ids.repeat_interleave(styles) if styles > 1 else ids

    def penalize(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V), less of what stands in the texts already."""
        s = self.settings
        if s.repetition_penalty != 1:
            if self.seen is None:
                self.seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(1, self.prompt, True)
            logits = penalize_repetition(logits, self.seen, s.repetition_penalty)
        return forbid(logits, [grams.repeats() for grams in self.grams]) if self.grams else logits

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) -> ids (B,) int64, by temperature and filters."""
        s = self.settings
        if s.temperature == 0:
            return logits.argmax(-1)
        logits = logits / s.temperature
        probs = logits.softmax(-1)
        drawn = probs if not s.min_p else probs * (probs >= s.min_p * probs.amax(-1, keepdim=True))
        ids = draw(drawn, self.uniforms(list(range(len(drawn)))))
        if not s.top_k and s.top_p == 1:
            return ids
        # A token drawn from all and thrown back unless top_k and top_p leave it has the distribution that they leave,
        # and to ask whether they do takes a tenth of their sorting. Most are left; after three throws they are applied.
        rows = (~is_kept(probs, ids, s.top_k, s.top_p)).nonzero()[:, 0]
        for _ in range(2):
            if not len(rows):
                return ids
            again = draw(drawn[rows], self.uniforms(rows.tolist()))
            ids[rows] = again
            rows = rows[~is_kept(probs[rows], again, s.top_k, s.top_p)]
        if len(rows):
            left = keep_top_p(keep_top_k(logits[rows], s.top_k or logits.shape[1]), s.top_p)
            ids[rows] = draw(keep_min_p(left, s.min_p).softmax(-1), self.uniforms(rows.tolist()))
        return ids
