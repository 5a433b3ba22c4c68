"""No text holds a broken character: the ids that may follow against Python's own decoder, and every way to write."""

import codecs
import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SPECIALS, save_random
from served import Served
from test_html import call, engine, export

from model import GPT, GPTConfig
from robopoet.machine import find_machine
from robopoet.text.tokenizer import END, BPETokenizer, CharTokenizer
from robopoet.writing.characters import START, Characters, find_characters, transitions
from robopoet.writing.passage import Settings
from robopoet.writing.poet import Poet
from robopoet.writing.preview import Preview
from robopoet.writing.sampler import SampledText, Sampler

BROKEN = "\ufffd"
VERSES = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。\nЯ помню чудное мгновенье: Передо мной явилась ты,\n🙂👩‍👩‍👧 ퟿\n"
)


@pytest.fixture(scope="module")
def tok() -> BPETokenizer:
    """A vocabulary most of whose tokens are parts of characters."""
    return BPETokenizer.train([VERSES * 3], 330, SPECIALS)


@pytest.fixture(scope="module")
def checkpoint_path(tok, tmp_path_factory) -> Path:
    """A model of random weights, which draws broken characters all the time unless it is kept from it."""
    return save_random(tmp_path_factory.mktemp("verses") / "best.pt", tok, scale=2)


@pytest.fixture(scope="module")
def poet(checkpoint_path) -> Poet:
    return Poet(str(checkpoint_path), "cpu", "float64")


def decoder_after(raw: bytes) -> codecs.IncrementalDecoder:
    """Python's own strict decoder after these bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    decoder.decode(raw)
    return decoder


@functools.cache
def may_follow(begun: bytes, token: bytes) -> bool:
    """Whether these bytes can go on to be UTF-8, by trying what could complete them."""
    raw = begun + token
    for end in (b"", b"\x80", b"\x90", b"\xa0", *(a + b for a in (b"\x80", b"\x90", b"\xa0") for b in (b"\x80",))):
        for more in (b"", b"\x80"):
            try:
                (raw + end + more).decode()
                return True
            except UnicodeDecodeError:
                pass
    return False


def test_the_ids_that_may_follow_are_those_that_pythons_decoder_takes(tok):
    pieces = [*tok.tokens, "é".encode()[1:] + b"a", b"a\xe2", b"\xa0\x80\xf0\x9f", b"\x80" * 3]
    pieces += [bytes([a, b]) for a in (0xC1, 0xE0, 0xED, 0xF0, 0xF4, 0xF5) for b in (0x7F, 0x80, 0x8F, 0x90, 0xA0)]
    vocabulary = BPETokenizer(list(dict.fromkeys(pieces)), SPECIALS)
    characters = Characters(transitions(vocabulary, vocabulary.vocab_size + 2), torch.device("cpu"))
    rng, states = random.Random(1), set()
    for _ in range(25):
        now, raw = np.array([START]), b""
        for _ in range(12):
            begun = decoder_after(raw).getstate()[0]
            texts = [
                vocabulary.tokens[id] if id < len(vocabulary.tokens) else None
                for id in range(characters.table.shape[1])
            ]
            wanted = [not begun if text is None else may_follow(begun, text) for text in texts]
            assert characters.allowed[now][0].tolist() == wanted
            assert characters.allow(now.repeat(len(texts)), torch.arange(len(texts))).tolist() == wanted
            states.add(int(now[0]))
            long = [id for id, text in enumerate(texts) if wanted[id] and text and text[-1] > 0x7F]
            id = rng.choice(long if rng.random() < 0.8 else np.flatnonzero(wanted).tolist())
            raw += texts[id] or b""
            now = characters.after(now, torch.tensor([id]))
    assert states == set(range(8))


def test_a_vocabulary_that_cannot_fail_has_none(tok, bpe):
    cpu = torch.device("cpu")
    assert find_characters(CharTokenizer("".join(set(VERSES)), SPECIALS), 99, cpu) is None
    assert find_characters(tok, tok.vocab_size, cpu) and find_characters(bpe, bpe.vocab_size, cpu)


def draws(settings: Settings, logits: torch.Tensor, characters: Characters | None, states: np.ndarray) -> torch.Tensor:
    """What is sampled for texts that end in these states."""
    texts = [SampledText(settings, number, []) for number in range(len(states))]
    for text, state in zip(texts, states.tolist(), strict=True):
        text.state = state
    return Sampler(texts, torch.tensor([], dtype=torch.long), characters, logits.dtype).sample(logits)


@pytest.mark.parametrize(
    "k, p, min_p", [(0, 1.0, 0), (0, 0.9, 0), (4, 1.0, 0), (1, 1.0, 0), (8, 0.6, 0), (0, 1.0, 0.3), (5, 0.9, 0.2)]
)
def test_draws_have_the_filtered_distribution_among_what_may_follow(k, p, min_p):
    n, tokens = (
        600,
        [b"a", b"\xe5", b"\xba\x8a", b"\xba", b"\x8a", b"b", b"c", b"\xd0\xaf", b"\xd0", b" ", b"d", b"e"],
    )
    cpu = torch.device("cpu")
    table = transitions(type("Vocabulary", (), {"tokens": tokens}), 12)
    characters, settings = Characters(table, cpu), Settings(temperature=0.7, top_k=k, top_p=p, min_p=min_p)
    for seed, state in ((4, START), (5, 1)):
        logits = torch.randn(1, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 1.5
        ids = draws(settings, logits.expand(n, -1).contiguous(), characters, np.full(n, state))
        allowed, counts = torch.from_numpy(table[state] != 8), torch.bincount(ids, minlength=12)

        def filtered(z):
            order = z.argsort(descending=True).tolist()
            probs, total = z.masked_fill(torch.isin(torch.arange(12), torch.tensor(order[k or 12 :])), -torch.inf), 0.0
            probs = probs.softmax(-1)
            for id in order:
                total, probs[id] = total + probs[id].item(), probs[id] if total < p else 0.0
            return probs * (probs >= min_p * probs.max())

        probs = filtered(logits[0] / 0.7) * allowed
        if not probs.any():
            probs = filtered((logits[0] / 0.7).masked_fill(~allowed, -torch.inf))
        probs /= probs.sum()
        assert (abs(counts / n - probs) <= 4.5 * (probs * (1 - probs) / n).sqrt()).all()


def test_a_draw_changes_only_where_it_would_break_a_character(tok):
    n, settings = 800, Settings(temperature=1.0, top_p=0.9)
    logits = torch.randn(n, tok.vocab_size, generator=torch.Generator().manual_seed(0))
    characters, states = find_characters(tok, tok.vocab_size, torch.device("cpu")), np.arange(n) % 8
    before, now = draws(settings, logits, None, states), draws(settings, logits, characters, states)
    allowed = characters.allow(states, before)
    assert 0.02 < allowed.double().mean() < 0.9 and characters.allow(states, now).all()
    assert torch.equal(now[allowed], before[allowed])


WAYS = [
    {},
    {"temperature": 0},
    {"top_k": 1},
    {"top_p": 0.3, "temperature": 1.5},
    {"top_p": 1.0},
    {"min_p": 0.2, "top_p": 1.0},
    {"no_repeat_ngram": 1},
    {"repetition_penalty": 1.3},
    {"style": "a:0.6,b"},
    {"until": "line"},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_no_passage_holds_a_broken_character(poet, monkeypatch, way):
    keys = {"until": "tokens", "max_new_tokens": 40} | way
    found = poet.begin("床前", 8, **keys)
    pieces = ["".join(parts) for parts in zip(*poet.stream(found), strict=True)]
    assert pieces == [passage.text for passage in found] and BROKEN not in "".join(pieces)
    for passage in found:
        raw = poet.tokenizer.decode_bytes(passage.ids).removeprefix(passage.rest)
        begun = decoder_after(raw).getstate()[0]  # raises if it is broken
        assert raw.decode(errors="ignore").startswith(passage.text)
        assert not begun or passage.ids[-1] != poet.tokenizer.specials[END]
    alone = poet.begin("床前", 1, 7, **keys)
    list(poet.stream(alone))
    assert alone[0].text == found[7].text
    if way.keys().isdisjoint(("temperature", "top_k", "until")):
        monkeypatch.setattr(poet, "characters", None)
        assert BROKEN in "".join(poet.write("床前", 8, **keys))


def test_max_copy_ends_a_passage_where_only_broken_characters_are_left(poet, monkeypatch):
    copied = type("Copied", (), {"fork": lambda self: self, "push": lambda self, id: None})()
    valid = np.flatnonzero(poet.characters.allowed[START].numpy())
    copied.ids = lambda: valid
    monkeypatch.setattr(poet, "copied", lambda settings, prompt: copied)
    (passage,) = poet.begin("床", heals=False)
    list(poet.stream([passage]))
    assert passage.is_stuck and passage.text == ""


def test_nor_does_a_text_of_the_server(checkpoint_path):
    with Served(checkpoint_path) as served:
        for way in WAYS[1::2]:
            poets = {"until": "tokens", "max_new_tokens": 40, "temperature": 1.0, "top_p": 1.0, "seed": 1} | way
            wanted = [text[2:] for text in served.poet.write("床前", 5, **poets)]
            asked = {"n": 5, "max_tokens": 40, "seed": 1} | way
            assert [choice["text"] for choice in served.choices("床前", **asked)] == wanted
            assert BROKEN not in "".join(wanted)
        events = served.events("床前", max_tokens=60, seed=2, logprobs=3, stream=True)
        assert BROKEN not in str(events)


def test_nor_does_a_page(checkpoint_path, tmp_path):
    v8 = engine(export(checkpoint_path, tmp_path / "poet.html"))
    poet = Poet(str(checkpoint_path), "cpu", "float32")
    greedy = {"temperature": 0.0, "until": "tokens", "max_new_tokens": 80, "no_repeat_ngram": 2}
    found = call(v8, "write", "床前", greedy | {"style": {}})
    (passage,) = poet.begin("床前", **greedy)
    list(poet.stream([passage]))
    assert (found["text"], found["ids"]) == (passage.text, passage.ids.tolist()) and BROKEN not in found["text"]
    said = """(prompt, settings) => JSON.stringify([...poet.write(prompt, settings)])"""
    for seed in range(3):
        for way in ({}, {"top_k": 1}, {"top_p": 1.0}, {"no_repeat_ngram": 1}, {"style": {"a": 0.5, "b": 0.5}}):
            settings = {"seed": seed, "max_new_tokens": 40, "until": "tokens"} | way
            assert BROKEN not in call(v8, said, "床前", settings)


def test_nor_does_a_runs_preview(tok, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=tok.vocab_size, n_layer=1, n_head=1, n_embd=16))
    preview = Preview(model, tmp_path, None, tok, find_machine("cpu", "float32", trains=False), 300, {})
    monkeypatch.setattr(Preview, "originality", None)
    text = preview()["text"]
    assert BROKEN not in text and len(text) > 50


def test_a_text_may_hold_the_replacement_mark_itself(tmp_path):
    tok = BPETokenizer.train([f"a{BROKEN}b" * 50], 260, [END])
    assert BROKEN.encode() in tok.tokens
    table = transitions(tok, tok.vocab_size)
    assert table[START, tok.tokens.index(BROKEN.encode())] == START


def test_a_tokenizer_of_special_tokens_alone_breaks_no_character():
    assert find_characters(CharTokenizer("", SPECIALS), len(SPECIALS), torch.device("cpu")) is None
