"""The measures of bench.writing count what they say; the n-gram model is Kneser and Ney's."""

import collections
import random

import numpy as np
import pytest

from bench import coders, writing
from robopoet.errors import DataError
from robopoet.text.tokenizer import END, CharTokenizer


def test_words_are_letters_in_lower_case():
    assert writing.words_of("Don't go,\nKING Née_42!") == ["don", "t", "go", "king", "née"]


@pytest.mark.parametrize(("n", "share"), [(1, 2 / 5), (2, 2 / 4), (3, 2 / 3), (5, 1), (6, 0)])
def test_distinct(n, share):
    assert writing.distinct("a b a b a".split(), n) == share


def numbered(*places):
    """A hundred different words, but for `to be or not` at these places."""
    words = [str(i) for i in range(100)]
    for place in places:
        words[place : place + 4] = "to be or not".split()
    return words


@pytest.mark.parametrize(
    ("words", "before"),
    [
        ([], 0),
        ("x y a b c d a b c d e".split(), 2),
        ("x y a b c d e a b c d".split(), 11),
        ("x no more no more no more no more".split(), 1),
        (["la"] * 9, 0),
        (numbered(5, 20), 100),
        (numbered(5, 20, 51), 5),  # words 5 to 54
        (numbered(5, 20, 52), 100),
        (numbered(5, 30, 60, 76), 30),
        (numbered(40, 44), 40),
    ],
)
def test_words_before_a_loop(words, before):
    assert writing.words_before_loop(words) == before


PLAY = """ACT I

SCENE I. A heath.

[Enter LEAR]

LEAR
Blow, winds!
O!

FOOL

[Exit]

KENT
KING LEAR
Who's there?

DUKE"""


def test_speaker_lines():
    assert writing.speaker_lines(PLAY) == [("LEAR", "Blow, winds!"), ("FOOL", ""), ("KENT", "KING LEAR")]
    assert writing.speaker_lines("LEAR\nNo.") == [("LEAR", "No.")] and writing.speaker_lines("LEAR") == []


def test_drama_is_where_every_other_paragraph_is_a_speech():
    assert writing.is_drama("LEAR\nBlow!\n\n[Exit]\n\nKENT\nNo.\n")
    assert not writing.is_drama(PLAY) and not writing.is_drama("Alice ran.\n\nTHE END\n\nAlice slept.\n")


def test_measure():
    language = {"a", "act", "i", "scene", "heath", "blow", "there", "who", "exit", "enter"}
    found = writing.measure(PLAY, {"blow", "winds", "o", "lear"}, language, {"LEAR", "FOOL"}, 17)
    words = "act i scene i a heath enter lear lear blow winds o fool exit kent king lear who s there duke".split()
    assert found == {
        "real_words": 6 / len(words),
        "invented_words": 5 / len(words),  # fool, kent, king, s and duke
        "repeated_4_grams": 0,
        "distinct_1": 18 / len(words),
        "distinct_2": 1,
        "distinct_3": 1,
        "longest_copy_characters": 17,
        "known_speakers": 2 / 3,
        "speakers_who_speak": 1 / 3,
        "words_before_loop": len(words),
    }
    for prose in (writing.measure(PLAY, set(), set(), set(), 0), writing.measure("", set(), set(), {"LEAR"}, 0)):
        assert prose["known_speakers"] is prose["speakers_who_speak"] is None
        assert prose["real_words"] == 0


def test_a_books_language_is_the_one_whose_dictionary_knows_its_words():
    english = writing.dictionary({"whale", "captain", "said", "ahaburob", "die"})
    assert {"sailor", "thou"} <= english and not {"burob", "hunen", "fleißig"} & english
    assert {"fleißig", "hafen"} <= writing.dictionary({"wal", "kapitän", "sagte", "und", "die"})


def test_a_passage_is_outside_of_98_percent_of_peoples():
    people = [{"length": i, "never": None, "rarely": 0.5 if i == 7 else None} for i in range(101)]
    found = writing.ranges(people)
    assert found == {
        "length": {"mean": 50, "p1": 1, "p99": 99},
        "rarely": {"mean": 0.5, "p1": 0.5, "p99": 0.5},
    }
    assert writing.outside({"length": 1, "never": 3, "rarely": None}, found) == []
    assert writing.outside({"length": 0.9, "never": None, "rarely": 0.6}, found) == ["length", "rarely"]


def test_peoples_passages_begin_where_lines_begin(monkeypatch):
    tok = CharTokenizer("\nabcdef", [END])
    ids = np.array([*tok.encode("ab\ncd\nef\n"), tok.specials[END], *tok.encode("fa\nb")])
    spans = [(0, 10), (10, 14)]
    assert writing.human_passages(ids, spans, tok, 2) == ["ab", "cd", "ef", "fa"]
    assert writing.human_passages(ids, spans, tok, 3) == ["ab\n", "cd\n", "ef\n", "fa\n"]
    assert writing.human_passages(ids, spans, tok, 4) == ["ab\nc", "cd\ne"]
    monkeypatch.setattr(writing, "HUMAN_PASSAGES", 2)
    assert writing.human_passages(ids, spans, tok, 2) == ["ab", "ef"]
    with pytest.raises(DataError, match=r"max_new_tokens: found 10, .* lower it"):
        writing.human_passages(ids, spans, tok, 10)


def naive_kneser_ney(ids, vocab_size, order):
    """p(word | context) by the definition, from sets and dictionaries."""
    grams = {
        k: collections.Counter(tuple(ids[i : i + k]) for i in range(len(ids) - k + 1)) for k in range(1, order + 1)
    }

    def count(gram):
        return grams[order][gram] if len(gram) == order else sum(longer[1:] == gram for longer in grams[len(gram) + 1])

    counts = {gram: count(gram) for k in grams for gram in grams[k]}

    def probability(context, word):
        lower = probability(context[1:], word) if context else 1 / vocab_size
        of_length = [counts[gram] for gram in grams[len(context) + 1]]
        once, twice = of_length.count(1), of_length.count(2)
        discount = once / (once + 2 * twice) if once else 0.5
        after = [counts.get((*context, other), 0) for other in range(vocab_size)]
        if not sum(after):
            return lower
        return (max(after[word] - discount, 0) + discount * sum(n > 0 for n in after) * lower) / sum(after)

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_kneser_ney_is_what_its_definition_says_and_sums_to_one(order):
    rng = random.Random(order)
    vocab_size = 6
    ids = [rng.choice([0, 0, 0, 1, 1, 2, 3]) for _ in range(120)] + [4]  # 4 stands at the end alone, 5 nowhere
    model = coders.KneserNey(np.array(ids), vocab_size, order)
    naive = naive_kneser_ney(ids, vocab_size, order)
    for _ in range(60):
        context = tuple(rng.choices(range(vocab_size), k=order - 1))
        found = [model.probabilities(np.array([*context, word]))[0] for word in range(vocab_size)]
        assert found == pytest.approx([naive(context, word) for word in range(vocab_size)])
        assert sum(found) == pytest.approx(1)
    text = np.array(rng.choices(range(vocab_size), k=30))
    whole = [*ids[len(ids) - order + 1 :], *text.tolist()]
    probs = [naive(tuple(whole[i : i + order - 1]), whole[i + order - 1]) for i in range(30)]
    assert model.bits(np.array(ids), text) == pytest.approx(-np.log2(probs))


@pytest.mark.parametrize("name", ["xz", "zstd", "ppmd"])
def test_a_coder_takes_few_bits_for_what_it_knows_and_eight_a_byte_for_noise(name):
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnop", k=7)) for _ in range(400)]
    known = " ".join(rng.choices(words, k=8000)).encode()
    coder = {"xz": coders.xz, "zstd": coders.zstd, "ppmd": lambda known: coders.ppmd(known, 6)}[name](known)
    again, other, noise = known[9_000:12_000], " ".join(rng.choices(words, k=400)).encode(), rng.randbytes(3_000)
    assert coder(again) < 0.15 * 8 * len(again)
    assert np.log2(400) / 8 < coder(other) / len(other) < 3  # the entropy of a word, and its eight bytes
    assert 7.9 < coder(noise) / len(noise) < 9
