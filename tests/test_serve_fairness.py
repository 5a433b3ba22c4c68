"""The rows are shared fairly among requests, and a text that was paused is the same."""

import collections
import dataclasses
import itertools
import types

import pytest
import torch
from conftest import KINDS, save_random

from robopoet.serving.engine import TURN, Choice, Engine
from robopoet.writing.decode import Rows
from robopoet.writing.healing import Prompt
from robopoet.writing.passage import Passage, Settings
from robopoet.writing.poet import Poet

ROWS = 8


def endless(folder, dtype, kind):
    """A poet whose texts don't end by themselves."""
    poet = Poet(str(save_random(folder / "best.pt", **KINDS[kind])), "cpu", dtype)
    poet.forbidden = torch.tensor(list(poet.tokenizer.specials.values()))
    return poet


@pytest.fixture(scope="module")
def poet(tmp_path_factory):
    return endless(tmp_path_factory.mktemp("fair"), "float64", "rotary")


class Stepped:
    """An engine that a test steps by itself."""

    def __init__(self, poet):
        self.engine, self.poet, self.finished = Engine(poet, ROWS), poet, []
        self.tokens = collections.defaultdict(list)
        self.engine.loop = types.SimpleNamespace(is_closed=lambda: True)

    def submit(self, n, tokens, styles=1):
        settings = Passage(self.poet.tokenizer, Settings(until="tokens", max_new_tokens=tokens)).settings
        settings, prompt = dataclasses.replace(settings, seed=n), Prompt("abc", [1, 2, 3], [1, 2, 3])
        choices = [Choice(prompt, settings, i, tokens, 2, False, None) for i in range(n)]
        for choice in choices:
            choice.tags = [None] if styles == 1 else list(self.poet.blend_of("alice,bard"))
            choice.weights = torch.ones(styles) / styles
        self.engine.inbox.put(choices)
        return choices

    @torch.inference_mode()
    def step(self, times=1):
        for _ in range(times):
            if self.engine.inbox.empty() and not self.engine.waiting and not self.engine.running:
                return
            self.engine._receive(), self.engine._admit(), self.engine._step()
            assert len(self.engine.rows.rows) == sum(len(choice.rows) for choice in self.engine.running) <= ROWS
            for gain in self.engine.gains:
                self.tokens[gain.choice] += gain.tokens
            self.finished += [gain.choice for gain in self.engine.gains if gain.finish]
            self.engine.gains = []

    def rows_of(self, choices):
        return sum(len(choice.rows) for choice in choices)


def test_a_request_alone_has_all_rows_and_others_get_their_share_at_once(poet):
    stepped = Stepped(poet)
    large = stepped.submit(20, 5000)
    stepped.step(40)
    assert stepped.rows_of(large) == ROWS
    second = stepped.submit(20, 5000)
    stepped.step(1)
    assert stepped.rows_of(large) == stepped.rows_of(second) == ROWS // 2
    small = stepped.submit(1, 5)
    stepped.step(6)
    assert small[0] in stepped.finished
    stepped.step(2)  # its row goes back
    assert stepped.rows_of(large) == stepped.rows_of(second) == ROWS // 2
    stepped.engine.cancel(second)
    stepped.step(5)
    assert stepped.rows_of(large) == ROWS
    stepped.engine.cancel(large)
    small = stepped.submit(1, 5)
    stepped.step(1)
    assert len(stepped.engine.rows.rows) == 1 and not stepped.engine.waiting


def test_more_requests_than_rows_take_turns_and_a_small_one_does_not_wait_for_large_ones(poet, monkeypatch):
    stepped, pause, lengths = Stepped(poet), Engine._pause, collections.defaultdict(lambda: [0])

    def noting(engine, choice):
        lengths[choice].append(len(choice.passage.ids))
        pause(engine, choice)

    monkeypatch.setattr(Engine, "_pause", noting)
    large = [stepped.submit(1, 5000)[0] for _ in range(3 * ROWS)]
    stepped.step(2 * TURN)
    small = stepped.submit(1, 5)
    stepped.step(3 * TURN)
    assert small[0] in stepped.finished
    stepped.step(20 * TURN)
    gained = [len(choice.passage.ids) for choice in large]
    assert min(gained) > max(gained) / 2
    assert min(n - before for places in lengths.values() for before, n in itertools.pairwise(places)) >= TURN


@pytest.mark.parametrize("styles", [1, 2])
def test_all_requests_end_whatever_their_sizes(poet, styles):
    stepped = Stepped(poet)
    requests = [stepped.submit(1 + 7 * i % 11, 10 + 13 * i % 40, 1 + (styles > 1 and i % 2)) for i in range(14)]
    stepped.step(1000)
    assert sorted(map(id, stepped.finished)) == sorted(id(choice) for choices in requests for choice in choices)
    assert not stepped.engine.waiting and not stepped.engine.running and not stepped.engine.rows.rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_paused_text_has_the_same_bits(tmp_path, monkeypatch, kind, dtype):
    poet, paused, pause = endless(tmp_path, dtype, kind), [], Rows.pause
    monkeypatch.setattr(Rows, "pause", lambda self, row: (paused.append(row.n), pause(self, row)))

    def tokens(crowd: int) -> list[list[tuple]]:
        stepped = Stepped(poet)
        choices = stepped.submit(6, 50, styles=2)
        for _ in range(crowd):
            stepped.step(15)
            stepped.submit(3, 20)
        stepped.step(500)
        return [stepped.tokens[choice] for choice in choices]

    alone = tokens(0)
    assert not paused and set(map(len, alone)) == {50} and tokens(6) == alone
    assert len(paused) > 4 and max(paused) >= 15  # in a full window, too
