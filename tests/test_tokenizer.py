"""Tokenizers: text comes back unchanged, ids are where they should be, and specials are never made of text."""

import json
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
from conftest import SPECIALS, TEXT, decode
from hypothesis import given, settings
from hypothesis import strategies as st

from robopoet.errors import DataError
from robopoet.text import tokenizer
from robopoet.text.tokenizer import END, UNKNOWN, BPETokenizer, CharTokenizer, StreamDecoder

# --- round trips


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_bpe_gives_any_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode_bytes(ids) == text.encode()
    assert decode(bpe, ids) == text
    assert all(0 <= id < len(bpe.tokens) for id in ids)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "\0" * 1000,
        "a\r\nb\r\n\r\n",
        "\r\r\n\n",
        "\ufeffx",
        "👩‍👩‍👧🏳️‍🌈",
        "e\u0301",
        "\U0010ffff\ufffd\ufffe",
        "\u2028 \u2029\x85\x1c",
    ],
)
def test_bpe_gives_odd_text_back(bpe, text):
    assert decode(bpe, bpe.encode(text)) == text


@pytest.mark.parametrize("unit", [" ", "\n", "a", "🙂", " \n", "\r\n", "1", "!"])
def test_bpe_gives_a_million_characters_of_one_kind_back(bpe, unit):
    text = unit * (1_000_000 // len(unit))
    assert decode(bpe, bpe.encode(text)) == text


def test_char_gives_its_own_alphabet_back(char):
    alphabet = sorted(set(TEXT))
    assert char.encode("".join(alphabet)) == list(range(len(alphabet)))  # ids in order of code point, as nanoGPT has
    assert decode(char, char.encode(TEXT)) == TEXT
    assert char.unknown(TEXT) == ""
    assert char.vocab_size == len(alphabet) + len(SPECIALS) + 1


def test_an_unknown_character_becomes_unk_and_is_listed(char):
    assert char.specials[UNKNOWN] == char.vocab_size - 1
    [t, unk, e, _, _] = char.encode("TΩe\0Ω")
    assert (t, e) == (char.encode("T")[0], char.encode("e")[0])
    assert unk == char.specials[UNKNOWN]
    assert char.unknown("TΩe\0Ω") == "Ω\0"


def test_without_specials_there_is_no_unk_and_unknown_characters_are_dropped():
    plain = CharTokenizer.train(["banana"], [])
    assert (plain.vocab_size, plain.specials) == (3, {})
    assert plain.encode("band") == [1, 0, 2]
    assert plain.unknown("band") == "d"


def test_bpe_knows_every_character(bpe):
    assert bpe.unknown("Ω\0\U0010ffff") == ""


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff then", "\ud83d\ude42"])
def test_bpe_refuses_half_a_surrogate_pair_and_says_where(bpe, text):
    place = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    with pytest.raises(DataError, match=f"character {place} "):
        bpe.encode(text)


# --- specials


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_specials_spelled_in_text_are_ordinary_text(name, request):
    tok = request.getfixturevalue(name)
    for special in SPECIALS:
        ids = tok.encode(f"x{special}y")
        assert not set(ids) & {tok.specials[special] for special in SPECIALS}
    assert decode(tok, tok.encode("T<|a|>")) == "T<|a|>" or UNKNOWN in tok.specials


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_specials_are_the_last_ids_in_order_and_stand_for_no_text(name, request):
    tok = request.getfixturevalue(name)
    n = len(tok.specials)
    assert list(tok.specials.values()) == list(range(tok.vocab_size - n, tok.vocab_size))
    assert list(tok.specials)[:3] == SPECIALS
    assert tok.decode_bytes([tok.specials[END], tok.encode("T")[0], tok.vocab_size - 1]) == b"T"
    assert tokenizer.styles(tok) == {"a": tok.specials["<|a|>"], "b": tok.specials["<|b|>"]}
    assert tokenizer.style_token("a") == "<|a|>"


def test_only_a_name_between_bars_is_a_style():
    """Once, a foreign tokenizer's special tokens were styles from their third character on: `<pad>` was style a."""
    names = [END, "<pad>", "<s>", "[MASK]", "<|alice|>", "<||>", "<|>", "|alice|", "x<|b|>", UNKNOWN, "<|b c|>"]
    tok = CharTokenizer("abc", names)
    assert tokenizer.styles(tok) == {"alice": tok.specials["<|alice|>"], "b c": tok.specials["<|b c|>"]}


# --- the size of the vocabulary


@pytest.mark.parametrize("size", [259, 260, 300, 340])
def test_the_vocabulary_has_exactly_the_size_asked_for(size):
    tok = BPETokenizer.train([TEXT], size, SPECIALS)
    assert tok.vocab_size == size == len(tok.tokens) + len(SPECIALS)
    assert len(set(tok.tokens)) == len(tok.tokens)
    assert {bytes([i]) for i in range(256)} <= set(tok.tokens)


def test_too_large_a_vocabulary_names_the_largest_that_works():
    text = "a rose is a rose is a rose"
    with pytest.raises(DataError, match=r"found 5000.*at most (\d+)") as caught:
        BPETokenizer.train([text], 5000, SPECIALS)
    most = int(str(caught.value).split("at most ")[1].split(";")[0])
    assert BPETokenizer.train([text], most, SPECIALS).vocab_size == most
    with pytest.raises(DataError, match=f"at most {most}"):
        BPETokenizer.train([text], most + 1, SPECIALS)


def test_too_small_a_vocabulary_names_the_smallest_that_works():
    with pytest.raises(DataError, match="at least 259"):
        BPETokenizer.train([TEXT], 258, SPECIALS)
    assert BPETokenizer.train([""], 259, SPECIALS).vocab_size == 259


def test_the_first_merge_is_the_most_frequent_pair_of_letters():
    words = ["ab"] * 9 + ["bc"] * 5 + ["cab"] * 3
    pairs = Counter(pair for word in words for pair in pairwise(word))
    commonest = "".join(max(pairs, key=pairs.get)).encode()
    assert BPETokenizer.train(["\n".join(words)], 257, []).tokens[256] == commonest


def test_training_twice_gives_the_same_tokens(bpe):
    assert BPETokenizer.train([TEXT], 340, SPECIALS).tokens == bpe.tokens
    assert BPETokenizer.train(iter([TEXT]), 340, iter(SPECIALS)).to_json() == bpe.to_json()


# --- saving


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_a_tokenizer_survives_json(name, request):
    tok = request.getfixturevalue(name)
    text = TEXT + "Ω\0\x80\xff�"
    again = tokenizer.from_json(json.loads(json.dumps(tok.to_json())))
    assert type(again) is type(tok)
    assert again.encode(text) == tok.encode(text)
    assert (again.tokens, again.specials, again.vocab_size) == (tok.tokens, tok.specials, tok.vocab_size)
    assert again.to_json() == tok.to_json()


BYTES = {"kind": "bpe", "pattern": tokenizer.PATTERN, "tokens": [chr(byte) for byte in range(256)], "specials": []}
deep: list = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.parametrize(
    "saved",
    [
        {},
        [],
        None,
        {"kind": "bpe"},
        {"kind": "char", "chars": 5, "specials": []},
        {"kind": "bpe", "pattern": ".", "tokens": ["東"], "specials": []},
        BYTES | {"pattern": ""},
        BYTES | {"pattern": "("},
        BYTES | {"pattern": "a+"},
        BYTES | {"pattern": r"(a+)+$"},
        BYTES | {"tokens": BYTES["tokens"][1:]},
        BYTES | {"tokens": [*BYTES["tokens"], "a"]},
        BYTES | {"tokens": [*BYTES["tokens"], ""]},
        BYTES | {"tokens": [*BYTES["tokens"], "東"]},
        BYTES | {"tokens": [*BYTES["tokens"], 7]},
        BYTES | {"tokens": "".join(BYTES["tokens"])},
        BYTES | {"specials": ["<|a|>", "<|a|>"]},
        BYTES | {"specials": [""]},
        BYTES | {"specials": ["\ud800"]},
        BYTES | {"specials": None},
        BYTES | {"kind": "unigram"},
        {"kind": "char", "chars": "aba", "specials": []},
        {"kind": "char", "chars": "a\udfff", "specials": []},
        {"kind": "char", "chars": "ab", "specials": deep},
    ],
    ids=range(24),
)
def test_a_damaged_tokenizer_is_a_data_error(saved):
    with pytest.raises(DataError, match=r"^tokenizer: [^\n]{1,330}; is damaged; run prepare\.py again$"):
        tokenizer.from_json(saved)


def test_a_tokenizer_of_too_many_ids_is_a_data_error(monkeypatch):
    tokens = [*BYTES["tokens"], *(f"{i:07}" for i in range(2**20))]
    with pytest.raises(DataError, match=r"^tokenizer: .*length <= 1048576.*\$\.tokens"):
        tokenizer.from_json(BYTES | {"tokens": tokens})


# --- bytes, and text as it comes


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_token_bytes_sum_to_the_size_of_the_text(name, request):
    tok = request.getfixturevalue(name)
    sizes = tokenizer.token_bytes(tok)
    assert sizes.shape == (tok.vocab_size,)
    assert sizes[tok.encode(TEXT)].sum() == len(TEXT.encode())
    assert not sizes[-len(tok.specials) :].any()
    assert np.array_equal(sizes[: len(tok.tokens)], [len(tok.decode_bytes([i])) for i in range(len(tok.tokens))])


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("aé東🙂\n\0")), seed=st.integers(0, 9))
def test_a_stream_yields_complete_characters_only(text, seed):
    tok = BPETokenizer.train([""], 257, [END])  # every token is one byte
    ids = tok.encode(text)
    assert len(ids) == len(text.encode())
    stream, rng, out, start = StreamDecoder(tok), random.Random(seed), "", 0
    while start < len(ids):
        stop = start + rng.randint(1, 3)
        out += stream.push([*ids[start:stop], tok.specials[END]])
        start = stop
        assert text.startswith(out)
        sure = tok.decode_bytes(ids[:stop]).decode("utf-8", errors="ignore")
        assert out == sure  # and no character later than it could be
    assert out == text


# --- GPT-2's


def test_gpt2_without_a_network_says_so(monkeypatch):
    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(DataError, match="could not be downloaded"):
        BPETokenizer.gpt2([END])


GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def test_gpt2s_pattern_is_tiktokens():
    assert getattr(tiktoken_ext.openai_public, "r50k_pat_str", tokenizer.GPT2_PATTERN) == tokenizer.GPT2_PATTERN


def test_gpt2_has_gpt2s_ids_and_its_end_then_the_other_specials(monkeypatch):
    # GPT-2's byte ids are not in order of byte; a small table of that kind stands for it
    order = [*range(33, 256), *range(33)]
    ranks = {bytes([byte]): id for id, byte in enumerate(order)} | {b"he": 256, b" t": 257, b" the": 259, b"the": 258}
    table = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END: 260})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": table}[name])
    tok = BPETokenizer.gpt2([END, "<|a|>"])
    assert tok.specials == {END: 260, "<|a|>": 261}
    assert tok.vocab_size == 262
    text = "  the heathen's 12345 thé 🙂\n\n then"
    assert tok.encode(text) == table.encode_ordinary(text)
    assert decode(tok, tok.encode(text)) == text
    again = tokenizer.from_json(json.loads(json.dumps(tok.to_json())))
    assert (again.encode(text), again.specials) == (tok.encode(text), tok.specials)
    assert BPETokenizer.gpt2([]).specials == {END: 260}
