"""With max_copy no passage holds so many words in a row that stand in the training text, by a search for every run."""

import collections
import random

import numpy as np
import pytest
import torch
from conftest import make_book
from hypothesis import given
from hypothesis import settings as cases
from hypothesis import strategies as st

import prepare
from configurator import ConfigError
from model import GPT, GPTConfig
from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.text.dataset import read_meta
from robopoet.weights import checkpoint
from robopoet.writing import poet as poet_module
from robopoet.writing.copies import Copied, Copies
from robopoet.writing.originality import Originality, read_texts
from robopoet.writing.passage import SavedSettings, Settings
from robopoet.writing.poet import Poet
from robopoet.writing.replay import replay, save
from robopoet.writing.session import Session
from robopoet.writing.terminal import print_passages

ORDERS = 40, 12, 6, 3, 1
PROMPTS = "", "\n", "and the", "new words "


def copied_runs(prompt, text, n, works):
    """Every run of n words that ends with a word, whole or in part, of `text` and stands in a work."""
    own = len(prompt.split())  # words of the prompt alone
    if prompt and text and not prompt[-1].isspace() and not text[0].isspace():
        own -= 1
    words = (prompt + text).split()
    runs = (" ".join(words[i : i + n]) for i in range(max(own - n + 1, 0), len(words) - n + 1))
    return [run for run in runs if any(f" {run} " in work for work in works)]


@pytest.fixture(scope="module", params=["char", "bpe"])
def corpus(request, tmp_path_factory):
    """The bins of two books, with white space and letters of several bytes."""
    folder = tmp_path_factory.mktemp("copies")
    for seed in (1, 2):
        text = make_book(seed, 60).replace("the", "th\u00e9\u00a0\u2014").replace("more", "lovely")
        (folder / f"book{seed}.txt").write_text(text, encoding="utf-8")
    size = 300 if request.param == "bpe" else 0
    keys = {"input": (str(folder / "*.txt"),), "tokenizer": request.param, "vocab_size": size}
    prepare.main(prepare.PrepareConfig(**keys, out=str(folder / "bins")))
    return folder / "bins"


@pytest.fixture(scope="module")
def works(corpus):
    return [f" {' '.join(text.split())} " for text in read_texts(corpus, "train")]


@pytest.fixture(scope="module")
def poet(corpus, tmp_path_factory):
    """A poet that was trained on that corpus, by its checkpoint."""
    meta = read_meta(corpus)
    model = GPT(GPTConfig(block_size=16, vocab_size=meta.vocab_size, n_layer=1, n_head=1, n_embd=8))
    entries = {"tokenizer": meta.tokenizer.to_json(), "text_sha256": meta.text_sha256}
    path = tmp_path_factory.mktemp("poet") / "best.pt"
    checkpoint.save(path, checkpoint.model_entries(model) | entries | {"config": {"dataset": str(corpus)}})
    return Poet(str(path), "cpu", "float32")


@pytest.fixture
def parrot(poet, corpus, monkeypatch):
    """That poet with a model that has learned its text by heart: it goes on as the text does, wherever it can."""
    ids = np.fromfile(corpus / "train.bin", "<u2").tolist()
    followers = collections.defaultdict(set)  # of so many ids in a row
    for order in ORDERS:
        for i in (i for i in range(len(ids) - order) if ids[i + order] < len(poet.tokenizer.tokens)):
            followers[tuple(ids[i : i + order])].add(ids[i + order])

    def generate(model, idx, max_new_tokens, sample, tags, record):
        texts, noise = idx.tolist(), torch.Generator().manual_seed(7)
        for _ in range(max_new_tokens):
            logits = torch.randn(len(texts), model.config.vocab_size, generator=noise)
            for row, text in zip(logits, texts, strict=True):
                ends = (tuple(text[-order:]) for order in ORDERS)
                row[list(next((followers[end] for end in ends if end in followers), ()))] += 12
            chosen = sample(logits)
            texts = [[*text, id] for text, id in zip(texts, chosen.tolist(), strict=True)]
            rows = yield chosen
            texts = texts if rows is None else [texts[row] for row in rows.tolist()]

    monkeypatch.setattr(poet_module, "generate", generate)
    return poet


@pytest.mark.parametrize("n", [3, 5, 8])
@pytest.mark.parametrize("prompt", [*PROMPTS, 0, 1])
def test_no_run_of_n_words_is_copied(parrot, works, n, prompt):
    if isinstance(prompt, int):  # one that copies already, up to within a word
        prompt = works[prompt][1 : 150 + prompt]
    together = {"n": 3, "max_new_tokens": 300, "until": "tokens", "temperature": 0.7}
    free = parrot.write(prompt, **together)
    assert any(copied_runs(prompt, text[len(prompt) :], n, works) for text in free)
    for text in parrot.write(prompt, **together, max_copy=n):
        assert len(text) > len(prompt) and copied_runs(prompt, text[len(prompt) :], n, works) == []


OTHERS = {"until": "sentence"}, {"until": "line"}, {"style": "book1:0.4,book2"}, {"temperature": 0}


@pytest.mark.parametrize("more", OTHERS)
def test_nor_where_a_passage_ends_early_or_blends(parrot, works, more):
    prompt = works[1][1:60]
    for text in parrot.write(prompt, 4, max_copy=4, max_new_tokens=80, **more):
        assert copied_runs(prompt, text[len(prompt) :], 4, works) == []


@pytest.mark.parametrize("stop", ["ly", "e", "r s"])
def test_a_stop_text_leaves_no_copy_by_cutting_a_word(parrot, works, stop):
    for seed in range(10):
        text = parrot.write("", 4, max_copy=3, max_new_tokens=80, until="tokens", stop=(stop,), seed=seed)
        assert [run for passage in text for run in copied_runs("", passage, 3, works)] == []


def test_text_shorter_than_the_run_is_left_as_it_is(parrot):
    for settings in ({"temperature": 0.8}, {"temperature": 0, "no_repeat_ngram": 4}):
        plain = parrot.write("and", 3, max_new_tokens=30, **settings)
        assert parrot.write("and", 3, max_new_tokens=30, **settings, max_copy=100) == plain


def test_the_ids_left_out_are_those_that_complete_a_run(corpus, works):
    tok = tokenizer.from_json(read_meta(corpus).tokenizer)
    copies = Copies(Originality(corpus, read_meta(corpus).text_sha256), tok, 3)
    rng, left_out = random.Random(5), 0
    for _ in range(150):
        work = rng.choice(works)
        start = rng.randrange(len(work) - 40)
        text = work[start : start + rng.randrange(1, 40)].replace(" ", rng.choice([" ", "\n", "\u00a0 "]))
        found = Copied(copies, text).ids()
        expected = []
        for id, token in enumerate(tok.tokens):
            try:
                piece = token.decode()
            except UnicodeDecodeError:
                continue
            if len(piece.split()) == 1 and copied_runs(text, piece.rstrip(), 3, works):
                expected.append(id)
        is_text = {id for id in found if tok.tokens[id].decode(errors="ignore").encode() == tok.tokens[id]}
        assert sorted(is_text - set(copies.several)) == expected
        left_out += len(expected)
    assert left_out > 20


@cases(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.lists(st.integers(1, 9), max_size=12))
def test_a_text_is_the_same_however_it_arrives(letters, cuts):
    class Index:
        followers = staticmethod(lambda words: frozenset())

    raw = "".join("a \n\u00a0\u00e9\u2003"[letter] for letter in letters).encode()
    copies = Copies(Index(), tokenizer.BPETokenizer([bytes([i]) for i in range(256)], []), 4)
    whole, parts = Copied(copies, raw.decode()), Copied(copies)
    for cut in [*cuts, len(raw)]:
        for byte in raw[:cut]:
            parts.push(byte)
        raw = raw[cut:]
    assert (whole.words, whole.unfinished) == (parts.words, parts.unfinished)


def test_tokens_of_several_words_are_left_out():
    class Index:
        followers = staticmethod(lambda words: frozenset([b"c"] if words == (b"a", b"b") else []))

    tok = tokenizer.BPETokenizer([*(bytes([i]) for i in range(256)), b"c d", b" c", b"c\n", b"cd"], [])
    assert Copied(Copies(Index(), tok, 3), "a b").ids() == [256, 257]
    assert Copied(Copies(Index(), tok, 3), "a b ").ids() == [256, ord("c"), 258, 257]
    assert Copied(Copies(Index(), tok, 3, cut=True), "a b ").ids() == [256, ord("c"), 258, 259, 257]


def test_a_passage_that_can_only_copy_says_so_and_ends(parrot, works, monkeypatch, capsys):
    start = works[0][1:80].rsplit(" ", 1)[0] + " "
    word = works[0][len(start) + 1 :].split()[0]
    only = parrot.tokenizer.encode(word)[0]
    if len(parrot.tokenizer.encode(word)) > 1:
        start += word[:-1]
        only = parrot.tokenizer.encode(word[-1])[0]
    others = [id for id in range(parrot.model.config.vocab_size) if id != only]
    monkeypatch.setattr(parrot, "forbidden", torch.tensor(others))
    passages = parrot.begin(start, 2, max_copy=4)
    pieces = list(parrot.stream(passages, logprobs=True))
    assert [(p.is_stuck, p.done, p.text, len(p.ids)) for p in passages] == [(True, True, "", 0)] * 2
    assert pieces == [["", ""]]
    passages = parrot.begin(start, 2, max_copy=4)
    print_passages(parrot, passages, parrot.stream(passages))
    assert "passage 1 ends where every token would copy 4 words" in capsys.readouterr().err


def test_replay_and_a_session_have_it_too(parrot, works, tmp_path, capsys):
    passages = parrot.begin("and", 2, max_copy=3, max_new_tokens=40, temperature=0.7)
    for _ in parrot.stream(passages):
        pass
    save(tmp_path / "passages.jsonl", parrot, passages)
    replay(tmp_path / "passages.jsonl")
    assert "2 passages, all reproduced exactly" in capsys.readouterr().out
    session = Session(parrot, Settings(max_new_tokens=60, until="tokens", temperature=0.5))
    session.do("/maxcopy 3")
    session.do("and the")
    assert session.last[0].settings.max_copy == 3
    assert copied_runs("and the", session.last[0].text, 3, works) == []
    with pytest.raises(ConfigError, match=r"max_copy: .*2.*, or 0"):
        session.do("/maxcopy 2")


def test_saved_passages_of_older_files_have_none():
    older = {key: value for key, value in vars(Settings()).items() if key != "max_copy"}
    assert SavedSettings(**older).max_copy == 0


def test_a_missing_training_text_is_told_before_anything_is_generated(parrot, monkeypatch):
    monkeypatch.setattr(parrot, "text_sha256", "")
    parrot.__dict__.pop("originality", None)
    with pytest.raises(DataError, match="does not say which text it was trained on"):
        parrot.begin("and", max_copy=8)
