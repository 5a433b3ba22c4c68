"""Sampling a token: each rule against transformers' own, the draw against its distribution."""

import collections
import math
import random

import pytest
import torch
import transformers

from robopoet.errors import CheckpointError
from robopoet.text.tokenizer import END
from robopoet.writing import sampler
from robopoet.writing.passage import Settings, make_settings
from robopoet.writing.sampler import SampledText, Sampler

NONE = torch.tensor([], dtype=torch.long)


def make_sampler(settings, forbidden, n, weights=(1.0,), prompt=(0,), dtype=torch.float64) -> Sampler:
    """A sampler of n texts that continue one prompt."""
    first = SampledText(settings, 0, prompt, weights)
    return Sampler([first.fork(number) for number in range(n)], forbidden, None, dtype)


def column(value) -> torch.Tensor | None:
    """A setting of every text, None where it is off."""
    return None if value in (0, 1.0) else torch.tensor([[value]])


def test_repetition_penalty_is_that_of_ctrl():
    logits, seen = torch.tensor([[2.0, -2.0, 1.0, 0.5]]), torch.tensor([[True, True, False, False]])
    assert sampler.penalize_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, 0.5]]


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_keeps_the_k_largest(k):
    logits = torch.randn(4, 20)
    kept = sampler.keep_top_k(logits, torch.tensor([[k]]))
    for row, row_kept in zip(logits.tolist(), kept.tolist(), strict=True):
        best = sorted(row, reverse=True)[:k]
        assert [x if x in best else -math.inf for x in row] == row_kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_fewest_likeliest_tokens_that_reach_p(p):
    logits = torch.randn(4, 20, dtype=torch.float64)
    kept = sampler.keep_top_p(logits, p)
    for row, row_kept in zip(logits.softmax(-1).tolist(), kept.tolist(), strict=True):
        total, expected = 0.0, set()
        for i in sorted(range(20), key=lambda i: -row[i]):
            expected.add(i)
            total += row[i]
            if total >= p:
                break
        assert {i for i in range(20) if row_kept[i] > -math.inf} == expected


def test_logits_that_are_not_finite_are_no_text():
    probs = torch.tensor([[0.5, 0.5], [torch.nan, 0.5]])
    with pytest.raises(CheckpointError, match="logits are not finite"):
        sampler.draw(probs, torch.tensor([0.1, 0.1]))


def test_draw_inverts_the_cumulative_distribution():
    probs = torch.tensor([[1 / 8, 2 / 8, 0.0, 5 / 8]]).expand(800, 4)
    uniforms = (torch.arange(800).double() + 0.5) / 800
    assert collections.Counter(sampler.draw(probs, uniforms).tolist()) == {0: 100, 1: 200, 3: 500}
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampler.draw(probs[:2], ends).tolist() == [0, 3]
    assert sampler.draw(torch.tensor([[0.0, 1.0]] * 2), ends).tolist() == [1, 1]


@pytest.mark.parametrize("k, p", [(3, 1.0), (0, 0.5), (0, 0.9), (4, 0.7), (50, 0.999)])
def test_is_kept_agrees_with_the_filters(k, p):
    logits = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left = sampler.keep_top_p(sampler.keep_top_k(logits, torch.tensor([[k or 20]])), p) > -math.inf
    for id in range(20):
        ids = torch.full((30,), id)
        assert torch.equal(sampler.is_kept(logits.softmax(-1), ids, column(k), column(p)), left[:, id])


def without_repeats(logits, ids, n):
    """Logits after ids (B, T) int64, less the ids that would repeat an n-gram."""
    texts = [SampledText(Settings(no_repeat_ngram=n), 0, row) for row in ids.tolist()]
    return Sampler(texts, NONE).penalize(logits)


def test_each_rule_equals_transformers():
    torch.manual_seed(0)
    logits, ids = torch.randn(5, 40, dtype=torch.float64) * 3, torch.randint(12, (5, 60))
    seen = torch.zeros(5, 40, dtype=torch.bool).scatter(1, ids, True)
    for ours, theirs in (
        (sampler.penalize_repetition(logits, seen, 1.7), transformers.RepetitionPenaltyLogitsProcessor(1.7)),
        (without_repeats(logits, ids, 1), transformers.NoRepeatNGramLogitsProcessor(1)),
        (without_repeats(logits, ids, 2), transformers.NoRepeatNGramLogitsProcessor(2)),
        (without_repeats(logits, ids, 3), transformers.NoRepeatNGramLogitsProcessor(3)),
        (sampler.keep_top_k(logits, torch.tensor([[7]])), transformers.TopKLogitsWarper(7)),
        (sampler.keep_top_p(logits, 0.8), transformers.TopPLogitsWarper(0.8)),
        (sampler.keep_min_p(logits, 0.05), transformers.MinPLogitsWarper(0.05)),
    ):
        expected = theirs(ids, logits)
        assert torch.equal(ours, expected) and not torch.equal(ours, logits), type(theirs).__name__


def test_where_every_token_would_repeat_an_ngram_none_is_forbidden():
    logits, ids = torch.randn(2, 3), torch.tensor([[0, 1, 2], [0, 1, 1]])
    left = without_repeats(logits, ids, 1)
    assert torch.equal(left[0], logits[0]) and left[1].isinf().tolist() == [True, True, False]
    assert torch.equal(without_repeats(logits, ids[:, :1], 2), logits)  # shorter than n


def test_a_blend_is_the_weighted_mean_of_log_probabilities():
    logits, shares = torch.randn(6, 9, dtype=torch.float64), [0.7, 0.3]
    mean = sampler.blended(logits, torch.tensor(shares, dtype=torch.float64)).softmax(-1)
    for i in range(3):
        probs = logits[2 * i].softmax(-1) ** 0.7 * logits[2 * i + 1].softmax(-1) ** 0.3
        torch.testing.assert_close(mean[i], probs / probs.sum())


@pytest.mark.parametrize("shares", [[1.0], [0.25, 0.75]])
def test_log_probabilities_are_the_models_whatever_the_filters(shares):
    logits = torch.randn(3 * len(shares), 9, dtype=torch.float64)
    settings = Settings(temperature=0.3, top_k=2, repetition_penalty=1.5, no_repeat_ngram=1)
    sample = make_sampler(settings, torch.tensor([8]), 3, shares)
    ids = sample(logits).view(3, -1)
    assert (ids == ids[:, :1]).all()
    for i in range(3):
        kept = logits[len(shares) * i : len(shares) * (i + 1)].clone()
        kept[:, 8] = -math.inf
        mean = sum(share * row.log_softmax(-1) for share, row in zip(shares, kept, strict=True))
        torch.testing.assert_close(sample.logprobs[i], mean.log_softmax(-1)[ids[i, 0]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "k, p, min_p",
    [(0, 1.0, 0), (0, 0.9, 0), (0, 0.1, 0), (3, 1.0, 0), (1, 1.0, 0), (6, 0.6, 0), (0, 1.0, 0.3), (5, 0.9, 0.2)],
)
def test_sampled_tokens_have_the_filtered_distribution(k, p, min_p):
    n, logits = 20_000, torch.randn(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    settings = Settings(temperature=0.7, top_k=k, top_p=p, min_p=min_p)
    sample = make_sampler(settings, torch.tensor([5]), n)
    counts = torch.bincount(sample(logits.repeat(n, 1)), minlength=12)
    expected = logits[0] / 0.7
    expected[5] = -math.inf
    for i, order in enumerate(expected.argsort(descending=True).tolist()):
        if k and i >= k:
            expected[order] = -math.inf
    probs, total = expected.softmax(-1), 0.0
    for order in probs.argsort(descending=True).tolist():
        total, probs[order] = total + probs[order].item(), probs[order] if total < p else 0.0
    probs[probs < min_p * probs.max()] = 0
    probs /= probs.sum()
    assert (abs(counts / n - probs) <= 4.5 * (probs * (1 - probs) / n).sqrt()).all()


def test_of_the_special_tokens_only_the_end_token_is_sampled():
    specials = {END: 10, "<|alice|>": 11, "<|unk|>": 12}
    sample = make_sampler(Settings(temperature=0), torch.tensor([11, 12]), 1)
    for name, id in specials.items():
        logits = torch.zeros(1, 13, dtype=torch.float64)
        logits[0, id] = 50.0
        assert (int(sample(logits)) == id) == (name == END)


def greedy_ids(logits, prompt, settings):
    """The ids of the largest logits (steps, V), one after another, penalized by all earlier ids."""
    ids = list(prompt)
    for row in logits.tolist():
        for id in set(ids):
            penalty = settings.repetition_penalty
            row[id] = row[id] / penalty if row[id] > 0 else row[id] * penalty
        k = settings.no_repeat_ngram
        grams = {tuple(ids[i : i + k]) for i in range(len(ids) - k + 1)}
        left = [id for id in range(len(row)) if not k or (*ids[len(ids) - k + 1 :], id) not in grams]
        ids.append(max(left or range(len(row)), key=lambda id: row[id]))
    return ids[len(prompt) :]


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_penalties_count_all_earlier_ids_whatever_rows_are_dropped(n, penalty):
    steps, rows, kept = 60, 4, [2, 0]
    logits = torch.randn(steps, rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    settings, prompt = Settings(temperature=0, no_repeat_ngram=n, repetition_penalty=penalty), [3, 1, 3, 1, 3, 5]
    sample, found = make_sampler(settings, NONE, rows, prompt=prompt), []
    for step, now in enumerate(logits):
        if step == 30:
            sample.arrange([sample.texts[row] for row in kept])
        found.append(sample(now[kept] if step >= 30 else now).tolist())
    for row in range(rows):
        expected = greedy_ids(logits[:, row], prompt, settings)
        assert [ids[row] for ids in found[:30]] == expected[:30]
        if row in kept:
            assert [ids[kept.index(row)] for ids in found[30:]] == expected[30:]


def test_the_penalties_state_is_bounded_by_the_vocabulary():
    settings = Settings(temperature=0, no_repeat_ngram=3, repetition_penalty=1.1)
    sample = make_sampler(settings, NONE, 1)
    for _ in range(3000):
        sample(torch.randn(1, 6))
    assert sample.seen.shape == (1, 6) and sample.texts[0].seen == set(range(6))
    ngrams = sample.texts[0].ngrams
    assert len(ngrams.followers) <= 36 and all(len(ids) <= 24 for ids in ngrams.followers.values())


EXTREMES = [
    {"temperature": 1e-6},
    {"temperature": 1e6},
    {"repetition_penalty": 1e-6},
    {"repetition_penalty": 1e6},
    {"repetition_penalty": 1e6, "temperature": 1e-6},
    {"repetition_penalty": 1e-6, "temperature": 1e6},
    {"min_p": 1.0},
    {"min_p": 5e-324},
    {"top_p": 1e-9},
    {"top_k": 2**53},
    {"top_k": 2**53, "top_p": 1e-9, "min_p": 1.0, "temperature": 1e-6, "repetition_penalty": 1e6},
    {"no_repeat_ngram": 100},
]


@pytest.mark.parametrize("extreme", EXTREMES, ids=str)
@pytest.mark.parametrize("shares", [[1.0], [1e-12, 1.0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_settings_still_sample_allowed_tokens(extreme, shares, dtype):
    settings = make_settings({"top_p": 1.0} | extreme)
    generator = torch.Generator().manual_seed(1)
    sample = make_sampler(settings, torch.tensor([7]), 50, shares, [2, 3], torch.float32)
    for _ in range(20):
        logits = (torch.randn(50 * len(shares), 8, generator=generator) * 100).to(dtype)
        logits[:, 4] = 0
        ids = sample(logits)[:: len(shares)]
        assert ((ids >= 0) & (ids < 7)).all()
        sharp = {"min_p": 1.0}, {"top_p": 1e-9}, {"temperature": 1e-6}
        if shares == [1.0] and extreme in sharp:
            best = logits.float()[:, :7]
            assert (best.gather(1, ids[:, None]) == best.amax(1, keepdim=True)).all()


MIXED = [
    {},
    {"temperature": 0},
    {"temperature": 1.0, "top_p": 1.0},
    {"top_k": 3, "top_p": 1.0},
    {"top_k": 1},
    {"top_k": 2**53, "top_p": 0.7},
    {"top_k": 30, "top_p": 0.7},
    {"top_k": 9, "top_p": 0.4, "min_p": 0.1},
    {"min_p": 0.3, "top_p": 1.0},
    {"repetition_penalty": 1.5, "temperature": 2.0},
    {"no_repeat_ngram": 1, "temperature": 0},
    {"repetition_penalty": 0.7, "no_repeat_ngram": 2},
]


def test_a_text_is_the_same_alone_and_beside_texts_of_other_settings_that_join_and_leave():
    steps, rng = 40, random.Random(3)
    texts = []  # settings, the styles' weights, the step at which it joins, its logits
    for i in range(60):
        weights = [[1.0], [0.3, 0.7], [0.5, 0.2, 0.3]][i % 5 % 3]
        logits = torch.randn(steps, len(weights), 50, generator=torch.Generator().manual_seed(i)) * 3
        texts.append((Settings(seed=i, **MIXED[i % len(MIXED)]), weights, rng.randrange(steps), logits))
    forbidden, alone = torch.tensor([7, 11]), []
    for settings, weights, joins, logits in texts:
        sample = Sampler([SampledText(settings, 2, [1, 2], weights)], forbidden)
        alone.append([int(sample(logits[step].clone())[0]) for step in range(joins, steps)])
    crowd, running, found = Sampler([], forbidden), {}, {i: [] for i in range(len(texts))}
    for step in range(steps):
        running |= {i: SampledText(t[0], 2, [1, 2], t[1]) for i, t in enumerate(texts) if t[2] == step}
        running = {i: running[i] for i in rng.sample(sorted(running), len(running)) if len(found[i]) < 25}
        if running:
            crowd.arrange(list(running.values()))
            crowd(torch.cat([texts[i][3][step] for i in running]))
            for i, id in zip(running, crowd.ids.tolist(), strict=True):
                found[i].append(id)
    assert sum(map(len, alone)) > 900 and found == {i: ids[:25] for i, ids in enumerate(alone)}


@pytest.mark.parametrize("size", [300, 2**15 - 1, 2**15, 50_257])
def test_a_row_adds_up_to_the_same_bits_alone_and_beside_others(size):
    x, threads = torch.rand(20, size, generator=torch.Generator().manual_seed(0)), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(torch.cat([sampler.add_up(row[None]) for row in x]), sampler.add_up(x))
    finally:
        torch.set_num_threads(threads)
