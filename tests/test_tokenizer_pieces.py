"""Long texts are cut into pieces and encoded on many threads: neither changes an id."""

import random
import threading
import time
from itertools import pairwise

import pytest
import tiktoken
from conftest import MIXED_WORDS, TEXT, decode, make_text, within

from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.text.tokenizer import END, UNKNOWN, BPETokenizer


def uncut(tok: BPETokenizer) -> tiktoken.Encoding:
    """The same tokenizer, without our cutting of long texts."""
    ranks = {token: id for id, token in enumerate(tok.tokens)}
    return tiktoken.Encoding("uncut", pat_str=tok.pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_long_text_has_the_ids_it_would_have_in_one_piece(bpe, seed):
    text = make_text(25_000, seed)
    assert len(text) > 4 * 25_000
    assert bpe.encode(text) == uncut(bpe).encode_ordinary(text)


def test_long_text_is_cut_where_words_are_cut(bpe, monkeypatch):
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 400)
    lines = "".join(random.Random(5).choices(["word ", "x\n", "\n", "  in\n", "\r\n", "a!\n", "\n \n", "\t"], k=9000))
    assert bpe.encode(lines) == uncut(bpe).encode_ordinary(lines)


MERGED = [
    b"\n\n",
    b"\n\n\n",
    b"\n ",
    b" \n",
    b"  ",
    b"\r\n",
    b"\r\n\r\n",
    b".\n",
    b"ab",
    b" a",
    b"--",
    "\u3000\u3000".encode(),
]
WHITE = " \n\r\t\v\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\ufeff"  # and more
OTHER = "abZé東1٣²½'st.!-_。、́🙂\0\u0378"
GPT2_PATTERNS = [pattern for pattern in sorted(tokenizer.PATTERNS) if "\\r" not in pattern]


@pytest.mark.parametrize("pattern", sorted(tokenizer.PATTERNS))
def test_cutting_changes_no_id_whatever_the_white_space(monkeypatch, pattern):
    tok = BPETokenizer([bytes([byte]) for byte in range(256)] + MERGED, [], pattern)
    uncut_tok, rng, n_cut = uncut(tok), random.Random(0), 0
    for _ in range(1500):
        kinds = [rng.choice([WHITE, OTHER, OTHER, " \n"]) for _ in range(rng.randrange(60))]
        text = "".join(rng.choice(kind) * rng.choice([1, 1, 2]) for kind in kinds)
        monkeypatch.setattr(tokenizer, "PIECE_CHARS", rng.randrange(12, 30))
        pieces = list(tokenizer._pieces(text))
        ends = [(left[-1], right[0]) for left, right in pairwise(pieces)]
        good = tokenizer._ends_word, tokenizer._ends_text
        if all(any(cuts(*end) for cuts in good[: 1 + (pattern in GPT2_PATTERNS)]) for end in ends):
            n_cut += len(ends)
            assert tok.encode(text) == uncut_tok.encode_ordinary(text)
    assert n_cut > 1000


def test_paragraphs_have_the_ids_and_merges_of_the_full_text(monkeypatch):
    """Cut behind a blank line, `\\n\\n` and the line end before the next word would be other pieces."""
    gaps = ["\n\n", "\n\n\n", "\n \n", "\r\n\r\n", "\n", " "]
    rng = random.Random(1)
    text = "".join(rng.choice(MIXED_WORDS) + rng.choice(gaps) for _ in range(4000))
    learned = BPETokenizer.train([text], 330, [])
    assert {b"\n\n", b"\r\n\r"} & set(learned.tokens)
    ids = learned.encode(text)
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 50)
    assert len(list(tokenizer._pieces(text))) > 300
    assert BPETokenizer.train([text], 330, []).tokens == learned.tokens
    assert learned.encode(text) == ids == uncut(learned).encode_ordinary(text)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "\x1c", "🙂", "!\n"])
def test_a_text_with_no_good_place_for_a_cut_is_cut_all_the_same(unit):
    text = unit * (1_000_000 // len(unit))
    with within(30):
        sizes = [len(piece) for piece in tokenizer._pieces(text)]
    assert max(sizes) <= tokenizer.PIECE_CHARS and sum(sizes) == len(text) and len(sizes) < 60


@pytest.mark.parametrize("batch_chars", [1, 300, 10**6])
@pytest.mark.parametrize("name", ["bpe", "char"])
def test_texts_encoded_together_have_the_ids_that_each_has_alone(request, monkeypatch, name, batch_chars):
    tok = request.getfixturevalue(name)
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", 100)
    monkeypatch.setattr(tokenizer, "BATCH_CHARS", batch_chars)
    texts = ["a", "the cat sat\non the mat, it's said.\n" * 40, "x \n", "  The", "The", "Ω\0", "🙂" * 99, f" {END}\n\n"]
    texts += [f"a{tokenizer.SEPARATOR}b", tokenizer.SEPARATOR, *(TEXT[i : i + 70] for i in range(0, 5000, 70))]
    found: dict[int, list[int]] = {}
    for key, ids in tokenizer.encode_all(tok, enumerate(texts)):
        assert not found or key in (last := max(found), last + 1)  # in order
        found.setdefault(key, []).extend(ids.tolist())
    if name == "bpe":
        assert [found[i] for i in range(len(texts))] == [uncut(tok).encode_ordinary(text) for text in texts]
    else:
        ids = {char: id for id, char in enumerate(sorted(set(TEXT)))}
        expected = [[ids.get(char, tok.specials[UNKNOWN]) for char in text] for text in texts]
        assert [found[i] for i in range(len(texts))] == expected


def test_an_error_while_reading_texts_is_raised(bpe):
    def texts():
        yield from enumerate(["a", "b"])
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        list(tokenizer.encode_all(bpe, texts()))
    assert list(tokenizer.encode_all(bpe, [])) == []


def test_while_a_batch_is_encoded_other_threads_run(bpe):
    batch, turns, done = [make_text(4000, seed) for seed in range(40)], 0, threading.Event()

    def encode():
        bpe.encode_pieces(batch)
        done.set()

    start = time.perf_counter()
    bpe.encode_pieces(batch)
    alone_s = time.perf_counter() - start
    thread = threading.Thread(target=encode)
    thread.start()
    while not done.wait(alone_s / 100):
        turns += 1
    thread.join()
    assert turns > 10


@pytest.mark.parametrize("size", [1, 2, 7])
def test_cutting_text_loses_nothing(bpe, monkeypatch, size):
    monkeypatch.setattr(tokenizer, "PIECE_CHARS", size)
    text = TEXT[:2000] + "\n" * 50 + "🙂" * 50
    assert decode(bpe, bpe.encode(text)) == text
