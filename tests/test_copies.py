"""With max_copy no passage holds so many words in a row that stand in the training text, by a search for every run."""

import codecs
import collections
import itertools
import random
import re

import numpy as np
import pytest
import torch
from conftest import make_book
from hypothesis import given
from hypothesis import settings as cases
from hypothesis import strategies as st
from test_originality import plain_words

import prepare
from model import GPT, GPTConfig
from robopoet.errors import ConfigError, DataError
from robopoet.text import tokenizer
from robopoet.text.dataset import read_meta
from robopoet.weights import checkpoint
from robopoet.writing import poet as poet_module
from robopoet.writing.copies import Copied, Copies
from robopoet.writing.originality import Originality, fold, read_texts
from robopoet.writing.passage import SavedSettings, Settings
from robopoet.writing.poet import Poet
from robopoet.writing.replay import replay, save_passages
from robopoet.writing.session import Session
from robopoet.writing.terminal import print_passages

ORDERS = 40, 12, 6, 3, 1, 0
PROMPTS = "", "\n", "and the", "new words "


def copied_runs(prompt, text, n, works):
    """Every run of n words that ends with a word, whole or in part, of `text` and stands in a work."""
    words = plain_words(prompt + text)
    pairs = zip(plain_words(prompt), words, strict=False)
    own = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))  # the prompt's own tokens
    runs = (" ".join(words[i : i + n]) for i in range(max(own - n + 1, 0), len(words) - n + 1))
    return [run for run in runs if any(f" {run} " in work for work in works)]


@pytest.fixture(scope="module", params=["char", "bpe"])
def corpus(request, tmp_path_factory):
    """The bins of two books, with punctuation, and white space and letters of several bytes."""
    folder = tmp_path_factory.mktemp("copies")
    for seed in (1, 2):
        text = make_book(seed, 60).replace("the", "th\u00e9\u00a0\u2014").replace("more", "lovely")
        text = text.replace("never", "o'er, NE-ver").replace("crown", "国王万岁").replace("of to", "of, to\u2019")
        (folder / f"book{seed}.txt").write_text(text, encoding="utf-8")
    size = 360 if request.param == "bpe" else 0
    keys = {"input": (str(folder / "*.txt"),), "tokenizer": request.param, "vocab_size": size}
    prepare.main(prepare.PrepareConfig(**keys, out=str(folder / "bins")))
    return folder / "bins"


@pytest.fixture(scope="module")
def works(corpus):
    return [f" {' '.join(plain_words(text))} " for text in read_texts(corpus, "train")]


@pytest.fixture(scope="module")
def texts(corpus):
    return read_texts(corpus, "train")


@pytest.fixture(scope="module")
def poet(corpus, tmp_path_factory):
    """A poet that was trained on that corpus, by its checkpoint."""
    meta = read_meta(corpus)
    model = GPT(GPTConfig(block_size=16, vocab_size=meta.vocab_size, n_layer=1, n_head=1, n_embd=8))
    entries = {"tokenizer": meta.tokenizer.to_json(), "text_sha256": meta.text_sha256}
    path = tmp_path_factory.mktemp("poet") / "best.pt"
    checkpoint.save(path, checkpoint.model_entries(model) | entries | {"config": {"dataset": str(corpus)}})
    return Poet(str(path), "cpu", "float32")


@pytest.fixture(scope="module")
def learned_by_heart(poet, corpus):
    """The generate of a model that has learned its text by heart: it goes on as the text does, wherever it can.

    It changes case and punctuation: it takes tokens alike for one another, and adds marks as it likes.
    """
    tokens = [token.decode(errors="replace") for token in poet.tokenizer.tokens]
    alike, marks = collections.defaultdict(list), [id for id, token in enumerate(tokens) if token in tuple(",'-\n")]
    for id, token in enumerate(tokens):
        alike[fold(token) if fold(token).strip() else token].append(id)
    one = {id: ids[0] for ids in alike.values() for id in ids}  # for all that are alike
    ids = [one.get(id, id) for id in np.fromfile(corpus / "train.bin", "<u2").tolist() if id not in marks]
    followers = collections.defaultdict(set)  # so many ids in a row -> the ids that follow them
    for order in ORDERS:
        for i in (i for i in range(len(ids) - order) if ids[i + order] < len(tokens)):
            followers[tuple(ids[i : i + order])].add(ids[i + order])
    others = {ids[0]: ids for ids in alike.values()}

    def generate(model, idx, max_new_tokens, sample, tags, record):
        texts, noise = idx.tolist(), torch.Generator().manual_seed(7)
        for _ in range(max_new_tokens):
            logits = torch.randn(len(texts), model.config.vocab_size, generator=noise)
            for row, text in zip(logits, texts, strict=True):
                said = [one.get(id, id) for id in text[-2 * max(ORDERS) :] if id not in marks]
                ends = (tuple(said[len(said) - order :]) for order in ORDERS if order <= len(said))
                for id in next(followers[end] for end in ends if end in followers):
                    row[others[id]] += 10
                    row[id] += 2
                row[marks] += 8
            chosen = sample(logits)
            texts = [[*text, id] for text, id in zip(texts, chosen.tolist(), strict=True)]
            rows = yield chosen
            texts = texts if rows is None else [texts[row] for row in rows.tolist()]

    return generate


@pytest.fixture
def parrot(poet, learned_by_heart, monkeypatch):
    """That poet with that model."""
    monkeypatch.setattr(poet_module, "generate", learned_by_heart)
    return poet


@pytest.mark.parametrize("n", [3, 8])
@pytest.mark.parametrize("prompt", [*PROMPTS, 0, 1])
def test_no_run_of_n_words_is_copied(parrot, works, texts, n, prompt):
    if isinstance(prompt, int):  # one that copies already, up to within a word
        prompt = texts[prompt][: 150 + prompt]
    together = {"n": 2, "max_new_tokens": 200, "until": "tokens", "temperature": 0.7}
    free = parrot.write(prompt, **together)
    assert any(copied_runs(prompt, text[len(prompt) :], n, works) for text in free)
    for text in parrot.write(prompt, **together, max_copy=n):
        assert len(text) > len(prompt) and copied_runs(prompt, text[len(prompt) :], n, works) == []


OTHERS = {"until": "sentence"}, {"until": "line"}, {"style": "book1:0.4,book2"}, {"temperature": 0}


@pytest.mark.parametrize("more", OTHERS)
def test_nor_where_a_passage_ends_early_or_blends(parrot, works, texts, more):
    prompt = texts[1][:60]
    for text in parrot.write(prompt, 4, max_copy=4, max_new_tokens=80, **more):
        assert copied_runs(prompt, text[len(prompt) :], 4, works) == []


@pytest.mark.parametrize("stop", ["ly", "e", "r s", ",", "\u2014"])
def test_a_stop_text_leaves_no_copy_by_cutting_a_word(parrot, works, stop):
    for seed in range(4):
        text = parrot.write("", 4, max_copy=3, max_new_tokens=80, until="tokens", stop=(stop,), seed=seed)
        assert [run for passage in text for run in copied_runs("", passage, 3, works)] == []


def test_text_shorter_than_the_run_is_left_as_it_is(parrot):
    for settings in ({"temperature": 0.8}, {"temperature": 0, "no_repeat_ngram": 4}):
        plain = parrot.write("and", 3, max_new_tokens=30, **settings)
        assert parrot.write("and", 3, max_new_tokens=30, **settings, max_copy=100) == plain


def test_the_ids_left_out_are_those_that_complete_a_run(corpus, works, texts):
    tok = tokenizer.from_json(read_meta(corpus).tokenizer)
    copies = {n: Copies(Originality(corpus, read_meta(corpus).text_sha256), tok, n) for n in (3, 5)}
    rng, left_out, in_a_character = random.Random(5), 0, 0
    for _ in range(200):
        work, n = rng.choice(texts), rng.choice([3, 3, 5])
        start = rng.randrange(len(work) - 60)
        text = work[start : start + rng.randrange(1, 60)]
        if rng.random() < 0.3:  # up to a character of several bytes
            text = re.search(r".*[^\0-\x7f]|", text, re.S)[0] or text
        text = text.replace(" ", rng.choice([" ", "\n", ",\u00a0 "]))
        copied, begun = Copied(copies[n], rng.choice([text, text.upper()])), b""
        last = text[-1].encode()
        if last[:-1] in tok.tokens:  # stop within a character
            text, begun = text[:-1], last[:-1]
            copied = Copied(copies[n], text)
            copied.push(tok.tokens.index(begun))
            in_a_character += 1
        expected = []
        for id, token in enumerate(tok.tokens):
            try:
                piece = codecs.getincrementaldecoder("utf-8")().decode(begun + token)
            except UnicodeDecodeError:
                continue
            if copied_runs(text, piece, n, works) or len(plain_words(piece)) >= n:
                expected.append(id)
        assert sorted(set(copied.ids())) == expected
        left_out += len(expected)
    assert left_out > 20 and (in_a_character > 5 or isinstance(tok, tokenizer.CharTokenizer))


@cases(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.lists(st.integers(1, 9), max_size=12))
def test_a_text_is_the_same_however_it_arrives(letters, cuts):
    class Index:
        followers = staticmethod(lambda words, count: frozenset())

    raw = "".join("a ,'\u00e9\u2003"[letter] for letter in letters).encode()
    copies = Copies(Index(), tokenizer.BPETokenizer([bytes([i]) for i in range(256)], []), 4)
    whole, parts = Copied(copies, raw.decode()), Copied(copies)
    for cut in [*cuts, len(raw)]:
        for byte in raw[:cut]:
            parts.push(byte)
        raw = raw[cut:]
    assert (whole.words, whole.unfinished, whole.begun) == (parts.words, parts.unfinished, parts.begun)


def test_tokens_of_several_words_are_left_out_if_one_of_them_completes_a_run():
    text = "a b c d. A b e f"

    class Index:
        @staticmethod
        def followers(words, count):
            found, wanted = plain_words(text), [word.decode() for word in words]
            k = len(wanted)
            begins = [i + k for i in range(len(found) - k - count + 1) if found[i : i + k] == wanted]
            return frozenset(" ".join(found[i : i + count]).encode() for i in begins)

    more = b"c d", b" c", b"c,\n", b"cd", b"-c-g", b" x c", b"x y z", b" b c", b" B'", b" b-eg", b"' ", b" b e"
    tok = tokenizer.BPETokenizer([*(bytes([i]) for i in range(256)), *more], [])

    def left_out(text, **more):
        return {tok.tokens[id] for id in Copied(Copies(Index(), tok, 3, **more), text).ids()}

    assert left_out("a b") == {b" c", b"-c-g", b"x y z"}
    assert left_out("A, b ") == {*b"c d|c|C|e|E| c|c,\n|-c-g|x y z".split(b"|")}
    assert left_out("a b ", cut=True) == left_out("a b ") | {b"cd"}
    assert left_out("a") == {b" b c", b" b e", b"x y z"}
    assert left_out("a", cut=True) == {b" b c", b" b e", b" b-eg", b"x y z"}


def test_a_passage_that_can_only_copy_says_so_and_ends(parrot, texts, monkeypatch, capsys):
    start, last = re.search(r"^(.{60,70}\w [a-z]*)([a-z]) ", texts[0], re.S).groups()
    only = parrot.tokenizer.encode(last)[0]
    others = [id for id in range(parrot.model.config.vocab_size) if id != only]
    monkeypatch.setattr(parrot, "forbidden", torch.tensor(others))
    passages = parrot.begin(start, 2, heals=False, max_copy=4)
    pieces = list(parrot.stream(passages, logprobs=True))
    assert [(p.is_stuck, p.done, p.text, len(p.ids)) for p in passages] == [(True, True, "", 0)] * 2
    assert pieces == [["", ""]]
    passages = parrot.begin(start, 2, heals=False, max_copy=4)
    print_passages(parrot, passages, parrot.stream(passages))
    assert "passage 1 ends where every token would copy 4 words" in capsys.readouterr().err


def test_replay_and_a_session_have_it_too(parrot, works, tmp_path, capsys):
    passages = parrot.begin("and", 2, max_copy=3, max_new_tokens=40, temperature=0.7)
    for _ in parrot.stream(passages):
        pass
    save_passages(tmp_path / "passages.jsonl", parrot, passages)
    replay(tmp_path / "passages.jsonl")
    assert "2 passages, all reproduced exactly" in capsys.readouterr().out
    session = Session(parrot, Settings(max_new_tokens=60, until="tokens", temperature=0.5))
    session.do("/maxcopy 3")
    session.do("and the")
    assert session.last.settings.max_copy == 3
    assert copied_runs("and the", session.last.text, 3, works) == []
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
    in_memory = Poet.of_model(parrot.model, parrot.tokenizer, parrot.machine)
    with pytest.raises(DataError, match="a model in memory: does not say which text it was trained on"):
        in_memory.begin("and", max_copy=8)
