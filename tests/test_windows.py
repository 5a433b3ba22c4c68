"""Batches are pure functions of a row's number: every window once per epoch, every target once per evaluation."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch
from splits import DOCS, STYLES, VOCAB, describe, write_split

from robopoet.errors import ConfigError
from robopoet.machine import Machine
from robopoet.text import windows
from robopoet.text.dataset import Bin, Span
from robopoet.text.windows import EvalPlan, Split, TrainWindows, eval_batches, open_split
from robopoet.training.schedule import StepRows

CPU = torch.device("cpu")
ALONE = Machine(CPU, torch.float32)
T = 8


@pytest.fixture(params=["in memory", "on the disk"])
def split(request, tmp_path, monkeypatch) -> Split:
    """The same split, in memory and on the disk."""
    if request.param == "on the disk":
        monkeypatch.setattr(windows, "ON_DEVICE_BYTES", 0)
    split = open_split(tmp_path, "train", write_split(tmp_path, DOCS), T, CPU)
    assert isinstance(split.tokens, Bin) == (request.param == "on the disk")
    return split


def tokens_of(split: Split) -> np.ndarray:
    return np.fromfile(split.path, dtype="<u2").astype(np.int64)


def style_at(place: int) -> str:
    for style, length in DOCS:
        if place < length:
            return style
        place -= length
    raise IndexError


# --- training


def test_rows_depend_on_seed_and_number_alone(split):
    def windows(seed: int = 1) -> TrainWindows:
        return TrainWindows(split, T, seed, 0.5)

    count = 5 * windows().per_epoch
    starts, tags = windows().rows(0, count)
    again = windows()
    for i in np.random.default_rng(0).permutation(count):  # one at a time, out of order
        start, tag = again.rows(int(i), 1)
        assert (start[0], tag[0]) == (starts[i], tags[i])
    for first in range(0, count, 7):  # in batches that cross epochs
        part = again.rows(first, min(7, count - first))
        assert np.array_equal(part, (starts[first : first + 7], tags[first : first + 7]))
    assert not np.array_equal(windows(2).rows(0, count)[0], starts)


def test_a_row_far_ahead_is_computed_directly(split):
    starts, _ = TrainWindows(split, T, 1, 0.5).rows(10**12, 3)
    assert starts.shape == (3,)


@pytest.mark.parametrize("n_tokens", [T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T - 1, 203])
def test_each_epoch_visits_every_window_of_its_grid_once(tmp_path, n_tokens):
    split = open_split(tmp_path, "train", write_split(tmp_path, [("alice", n_tokens)]), T, CPU)
    windows = TrainWindows(split, T, 7, 0.9)
    offsets, orders = set(), set()
    for epoch in range(30):
        starts, _ = windows.rows(epoch * windows.per_epoch, windows.per_epoch)
        assert starts.min() >= 0
        assert starts.max() + T < n_tokens  # the last target is there
        offset = int(starts.min())
        assert sorted(starts) == list(range(offset, offset + T * windows.per_epoch, T))
        unseen = n_tokens - 1 - T * windows.per_epoch  # targets of no window
        assert 0 <= unseen < 2 * T
        offsets.add(offset)
        orders.add(tuple((starts - offset).tolist()))
    assert len(offsets) >= min(T, n_tokens - T) / 2
    assert len(orders) > 20 or windows.per_epoch <= 3


def test_over_many_epochs_every_token_is_a_target(split):
    windows = TrainWindows(split, T, 3, 0.0)
    starts, _ = windows.rows(0, 200 * windows.per_epoch)
    seen = np.zeros(len(tokens_of(split)), dtype=int)
    for start in starts:
        seen[start + 1 : start + T + 1] += 1
    assert (seen[1:] > 0).all()


def test_a_batch_is_the_naive_slice(split):
    tokens, windows = tokens_of(split), TrainWindows(split, T, 5, 0.0)
    inputs, targets = windows.batch(11, 40, CPU)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (40, T)
    for row, start in enumerate(windows.rows(11, 40)[0]):
        assert inputs[row].tolist() == tokens[start : start + T].tolist()
        assert targets[row].tolist() == tokens[start + 1 : start + T + 1].tolist()
    assert inputs.max() > 32_767  # ids beyond a signed 16-bit number


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("accumulation, batch_size", [(1, 12), (4, 6), (5, 12), (12, 1)])
def test_ranks_share_a_step_without_overlap_in_equal_micro_batches(split, world_size, accumulation, batch_size):
    rows, windows, total, step = (
        StepRows(batch_size, accumulation, world_size),
        TrainWindows(split, T, 1, 0.5),
        accumulation * batch_size,
        3,
    )
    assert rows.size <= batch_size and rows.count * rows.size * world_size == total
    full = windows.batch(step * total, total, CPU)
    parts = []
    for rank in range(world_size):
        first, count = rows.of(step, rank)
        assert count == rows.count * rows.size
        parts += [windows.batch(first + micro * rows.size, rows.size, CPU) for micro in range(rows.count)]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), full[i])


def test_ranks_that_can_not_share_equally_are_refused():
    with pytest.raises(ConfigError, match=r"batch_size.*3 ranks"):
        StepRows(8, 1, 3)


# --- tags


def test_with_probability_one_the_tag_is_the_first_input_of_every_row_and_nothing_else_changes(split):
    plain, tagged = TrainWindows(split, T, 5, 0.0), TrainWindows(split, T, 5, 1.0)
    starts, tags = tagged.rows(0, 200)
    assert np.array_equal(starts, plain.rows(0, 200)[0])
    assert tags.tolist() == [STYLES[style_at(start)] for start in starts]
    assert set(tags) == set(STYLES.values())
    for first, count in [(0, 60), (60, 1)]:
        inputs, targets = tagged.batch(first, count, CPU)
        plain_inputs, plain_targets = plain.batch(first, count, CPU)
        assert inputs[:, 0].tolist() == tags[first : first + count].tolist()
        assert torch.equal(inputs[:, 1:], plain_inputs[:, 1:])
        assert torch.equal(targets, plain_targets)
    assert (plain.rows(0, 200)[1] == -1).all()


def test_a_row_has_its_tag_with_the_given_probability(split):
    n = 4000
    _, tags = TrainWindows(split, T, 5, 0.9).rows(0, n)
    assert abs((tags >= 0).sum() - 0.9 * n) < 5 * (n * 0.9 * 0.1) ** 0.5


def test_a_corpus_without_tags_has_none(tmp_path):
    split = open_split(tmp_path, "train", write_split(tmp_path, DOCS, styles={}), T, CPU)
    windows = TrainWindows(split, T, 5, 1.0)
    assert (windows.rows(0, 100)[1] == -1).all()
    inputs, _ = windows.batch(0, 10, CPU)
    assert inputs[:, 0].tolist() == tokens_of(split)[windows.rows(0, 10)[0]].tolist()
    assert all((batch.inputs < 60_000).all() for batch in eval_batches(split, EvalPlan(T, 4), ALONE.device))


# --- evaluation


def naive_evaluation(split: Split, block_size: int) -> list[tuple[int, list[int], list[int]]]:
    """(document, inputs, targets) of every row, a document at a time, a token at a time."""
    rows, place, tokens = [], 0, tokens_of(split).tolist()
    for document, (style, length) in enumerate(DOCS):
        text = tokens[place : place + length]
        place += length
        for i in range(length - 1):
            if i % block_size == 0:
                rows.append((document, [], []))
            rows[-1][1].append(STYLES[style] if i % block_size == 0 else text[i])
            rows[-1][2].append(text[i + 1])
    return rows


@pytest.mark.parametrize("block_size, batch_size", [(8, 4), (8, 1), (8, 1000), (1, 5), (7, 3), (200, 2)])
def test_evaluation_has_every_target_once_tagged_and_never_across_documents(split, block_size, batch_size):
    expected = naive_evaluation(split, block_size)
    found = []
    for inputs, targets, document in eval_batches(split, EvalPlan(block_size, batch_size), ALONE.device):
        assert inputs.shape == targets.shape == (len(document), block_size)
        assert inputs.dtype == targets.dtype == torch.int64
        assert 0 < len(document) <= batch_size
        assert inputs.min() >= 0  # what is padded can still be looked up
        assert inputs.max() < VOCAB
        for row, its_document in enumerate(document):
            n = int((targets[row] >= 0).sum())
            assert (targets[row, n:] == -1).all()
            found.append((its_document, inputs[row, :n].tolist(), targets[row, :n].tolist()))
    assert found == expected


@pytest.mark.parametrize("searched", [1, 7, 1000])
@pytest.mark.parametrize("on_device_bytes", [0, 2**30])
def test_documents_that_share_a_span_are_evaluated_one_by_one(tmp_path, monkeypatch, searched, on_device_bytes):
    monkeypatch.setattr("robopoet.text.windows.SEARCHED_TOKENS", searched)
    monkeypatch.setattr("robopoet.text.windows.ON_DEVICE_BYTES", on_device_bytes)
    meta, end = write_split(tmp_path, DOCS), 60_000
    tokens = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    spans = meta.splits["train"].documents
    tokens[[doc.stop - 1 for doc in spans]] = end
    meta.splits["train"] = describe(tmp_path / "train.bin", tokens, spans)
    apart = open_split(tmp_path, "train", meta, T, CPU)
    runs = [("alice", 0, 40), ("king", 40, 141), ("alice", 141, 150), ("king", 150, 153), ("alice", 153, 203)]
    spans = tuple(Span("d", style, start, stop) for style, start, stop in runs)
    meta.splits["train"] = dataclasses.replace(meta.splits["train"], documents=spans, end=end)
    together = open_split(tmp_path, "train", meta, T, CPU)
    assert len(together.styles) == 5 < len(DOCS)
    for ours, other in zip(
        *(eval_batches(split, EvalPlan(T, 4), ALONE.device) for split in (apart, together)), strict=True
    ):
        assert torch.equal(ours.inputs, other.inputs) and torch.equal(ours.targets, other.targets)
        assert [apart.styles[i] for i in ours.span] == [together.styles[i] for i in other.span]
    windows = [TrainWindows(split, T, 1, 0.5).rows(0, 100) for split in (apart, together)]
    assert np.array_equal(*windows)


@pytest.mark.parametrize("limit", [0, 1, 3, 10_000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_the_batches_of_an_evaluation(split, limit, world_size):
    alone = list(eval_batches(split, EvalPlan(T, 4, limit), ALONE.device))
    plan, ranks = EvalPlan(T, 4, limit), [Machine(CPU, torch.float32, rank, world_size) for rank in range(world_size)]
    shared = [list(eval_batches(split, plan, rank.device, rank.rank, rank.world_size)) for rank in ranks]
    even = [
        list(eval_batches(split, dataclasses.replace(plan, even=True), rank.device, rank.rank, rank.world_size))
        for rank in ranks
    ]
    assert sum(map(len, shared)) == len(alone)
    assert {len(of_rank) for of_rank in even} == {len(shared[0])}
    for its, same in zip(even, shared, strict=True):
        assert [batch.span.tolist() for batch in its if len(batch.span)] == [batch.span.tolist() for batch in same]
    for i, batch in enumerate(alone):
        other = shared[i % world_size][i // world_size]
        assert torch.equal(batch.inputs, other.inputs)
        assert torch.equal(batch.targets, other.targets)
        assert np.array_equal(batch.span, other.span)


@pytest.mark.parametrize("limit, batch_size", [(1, 2), (2, 2), (2, 5), (1, 28), (7, 4), (9, 3), (10_000, 4)])
def test_a_limited_evaluation_is_spread_evenly_over_the_split(split, limit, batch_size):
    """Each of as many equal parts of the split as windows are read gives the one in its middle, in order."""
    rows, found = naive_evaluation(split, T), []
    plan = EvalPlan(T, batch_size, limit)
    for batch in eval_batches(split, plan, ALONE.device):
        for row, n in enumerate((batch.targets >= 0).sum(1)):
            found.append((batch.span[row], batch.inputs[row, :n].tolist(), batch.targets[row, :n].tolist()))
    n = min(limit * batch_size, len(rows))
    assert found == [rows[int(Fraction(2 * i + 1, 2) * len(rows) / n)] for i in range(n)]
    assert n < 4 or {span for span, *_ in found} >= {0, 2, 5}  # all of the long documents


def test_evaluation_twice_is_the_same_and_leaves_random_state_alone(split):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = (list(eval_batches(split, EvalPlan(T, 4), ALONE.device)) for _ in range(2))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True))
    TrainWindows(split, T, 1, 0.5).batch(0, 4, CPU)
    assert torch.equal(torch.get_rng_state(), before)


# --- gathering


def test_an_opened_split_equals_what_was_written(split):
    assert split.styles == [style for style, _ in DOCS]
    assert (split.stops - split.starts).tolist() == [n for _, n in DOCS]
    assert split.tags.tolist() == [STYLES[style] for style, _ in DOCS]
    everything = split.gather(np.arange(len(split.tokens)), 1, CPU)
    assert everything[:, 0].tolist() == tokens_of(split).tolist()
