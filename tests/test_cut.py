"""A passage that is interrupted, at whichever line, is cut so that it can be generated again."""

import dataclasses
import sys

import pytest

from robopoet.text.tokenizer import BPETokenizer
from robopoet.writing.passage import Passage, Settings

UNTIL_STOPS = (
    {"until": "auto"},
    {"until": "tokens", "stop": ("Kt", "The que_")},
    {"until": "sentence"},
    {"until": "scene"},
)


def check_cut(passage: Passage, tok: BPETokenizer, n: int, shown: str) -> None:
    """Cut an interrupted passage that has shown this text, the last of it with its token n: it can be repeated."""
    before = dataclasses.asdict(passage.settings)
    passage.cut()
    if not n:
        assert not (passage.done or passage.text)
        return
    again = Passage(tok, passage.settings, "O")
    for id, logprob in zip(passage.ids, passage.logprobs, strict=True):
        again.push(id, logprob)
    again.finish()
    assert again.text == passage.text and passage.text.startswith(shown) and passage.done
    assert list(passage.logprobs) == [-float(i) for i in range(n)]
    assert dataclasses.asdict(passage.settings) == before | {"until": "tokens", "max_new_tokens": n}


@pytest.mark.parametrize("settings", UNTIL_STOPS, ids=range(len(UNTIL_STOPS)))
def test_an_interrupted_passage_is_cut_where_it_was_shown(bpe, settings):
    ids = bpe.encode('NURSE\nThe rose, "東京!" "And 42 🙂!\n\nKING\nNo -- the queen (The queen! Never... more.\n\nThe')
    for interrupted in range(len(ids)):
        passage = Passage(bpe, Settings(max_new_tokens=len(ids) + 9, **settings), "O")
        n, shown = 0, ""
        for i, id in enumerate(ids[:interrupted]):
            piece = passage.push(id, -float(i))
            n, shown = i + 1 if piece else n, shown + piece
        if not passage.done:
            check_cut(passage, bpe, n, shown)
    assert shown


@pytest.mark.parametrize("settings", UNTIL_STOPS, ids=range(len(UNTIL_STOPS)))
def test_an_interrupt_at_any_line_leaves_a_passage_that_can_be_cut(bpe, settings):
    ids = bpe.encode("The rose. 東京! And\n")
    countdown = 0

    def trace(frame, event, _argument):
        nonlocal countdown
        if not frame.f_code.co_filename.endswith("passage.py"):
            return None
        countdown -= event == "line"
        if not countdown:
            raise KeyboardInterrupt
        return trace

    for at in range(1, 10_000):
        countdown, n, shown = at, 0, ""
        passage = Passage(bpe, Settings(max_new_tokens=len(ids) + 9, **settings), "O")
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for i, id in enumerate(ids):
                piece = passage.push(id, -float(i))
                n, shown = i + 1 if piece else n, shown + piece
        except KeyboardInterrupt:
            sys.settrace(before)
        else:
            sys.settrace(before)
            break
        if not passage.done:
            n = max(n, passage._kept[0])  # it may have been released, but not yet returned
            check_cut(passage, bpe, n, shown)
    assert 100 < at < 9_999
