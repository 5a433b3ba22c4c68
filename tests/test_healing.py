"""A prompt's last word, written by the model in tokens as it learned them: by every door, and as brute force has it."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import SPECIALS, TEXT, make_book, save_random

from robopoet.text.tokenizer import END, PATTERNS, BPETokenizer, CharTokenizer
from robopoet.writing import healing
from robopoet.writing.characters import ERROR, START
from robopoet.writing.decode import window_start
from robopoet.writing.healing import Healing, Prompt, Rest, heal
from robopoet.writing.poet import Poet

WORDS = [b" q", b" qu", b" que", b"en", b" queen", b"ue", b"ly", b" c", b"Th", b"The", b"  ", b"ee", b"een", b" qua"]
WORDS += [b"es", b"ens", b" queens", b"--", b"'s", b"\n\n", b"'ll"]
SAID = [END, "<|a|>", "<|b|>"]


QUEENS = BPETokenizer([bytes([byte]) for byte in range(256)] + WORDS, SAID)


@pytest.fixture(scope="module")
def tok() -> BPETokenizer:
    return QUEENS


@pytest.fixture(scope="module")
def book() -> BPETokenizer:
    return BPETokenizer.train([make_book(3, 60) + "Été, 東京! 1234 don't we'll\n"], 360, SAID)


@pytest.fixture(scope="module")
def path(tmp_path_factory, tok):
    """Random weights; smaller ones, so that no id is certain."""
    return save_random(tmp_path_factory.mktemp("healing") / "best.pt", tok, scale=2, block_size=24)


@pytest.fixture(scope="module")
def poet(path) -> Poet:
    return Poet(str(path), "cpu", "float64")


def written(poet: Poet, prompt: str, n: int = 1, **keys):
    """The passages that continue a prompt."""
    passages = poet.begin(prompt, n, **keys)
    for _ in poet.stream(passages, logprobs=True):
        pass
    return passages


# --- what is given back


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("The queen", " queen"),
        ("The que", " que"),
        ("The queen ", " "),
        ("The queen  ", "  "),
        ("The queen,", ","),
        ("The queen'", "'"),
        ("The queen's", "'s"),
        ("The queen\n  ", "\n  "),
        ("The queen 1599", " 1599"),
        ("queen", "queen"),
        (" ", " "),
        ("The queen\n", ""),
        ("The queen, \n\n", ""),
        ("", ""),
    ],
)
def test_a_prompts_last_word_is_given_back(tok, text, rest):
    ids = tok.encode(text or "\n")
    found = heal(tok, text, ids)
    assert (found.text, found.ids, found.rest.decode()) == (text, ids, rest)
    assert found.before + rest == text and found.read
    if found.before:
        assert tok.decode_bytes(found.read).decode() == found.before and ids[: len(found.read)] == found.read
    elif text:
        assert found.read == tok.encode("\n")  # as without a prompt


def test_of_a_long_word_the_last_tokens_are_given_back_at_a_characters_start(tok):
    given = heal(tok, "A " + "x" * 100, tok.encode("A " + "x" * 100))
    assert given.rest == b"x" * healing.GIVEN_TOKENS and len(given.read) == 94
    kanji = heal(tok, "東京東京", tok.encode("東京東京"))  # three tokens each
    assert kanji.rest.decode() == "東京" and len(kanji.ids) - len(kanji.read) == 6
    long = BPETokenizer([*tok.tokens, *(b"=" * n for n in (2, 4, 8, 16, 32, 64, 128))], SAID)
    assert heal(long, "a" + "=" * 96, long.encode("a" + "=" * 96)).rest == b"=" * 32
    assert heal(long, "=" * 128, long.encode("=" * 128)) == Prompt("=" * 128, [long.tokens.index(b"=" * 128)],
                                                                   [long.tokens.index(b"=" * 128)])  # fmt: skip


def test_characters_and_ids_need_none():
    letters = CharTokenizer.train([TEXT], SPECIALS)
    for text in ("The queen", "The ", "T"):
        assert heal(letters, text, letters.encode(text)) == Prompt(text, letters.encode(text), letters.encode(text))


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_a_text_that_is_cut_can_nearly_always_be_written_in_its_own_tokens(book, pattern):
    """So a model that is sure of a text goes on with it, as if the prompt had not been cut there."""
    tok = BPETokenizer(book.tokens, SAID, pattern)
    rules, text, followed = Healing(tok), make_book(5, 3) + "Été, don't we'll\n\n 12 quartz!\n", 0
    ids = tok.encode(text)
    for cut in range(1, len(text)):
        prompt = heal(tok, text[:cut], tok.encode(text[:cut]))
        rest = Rest(rules, prompt.own, [0.0] * len(prompt.own))
        n = len(prompt.ids) - len(prompt.own)
        for id in ids[n:] if prompt.ids[:n] == ids[:n] else []:
            if not rest or rest.given(torch.zeros(tok.vocab_size))[id] == -math.inf:
                break
            rest.push(id)
        followed += not rest
        assert not rest or text[cut - 1 : cut + 1].isalpha()  # only words whose beginning has other tokens
    assert followed > 0.9 * len(text)


@pytest.mark.parametrize("left", [" queen", " que", " ", "  ", "q", "The", "'", "é", "\n", "-"])
def test_the_tokens_that_begin_with_some_bytes_are_found(tok, book, left):
    for which in (tok, book):
        expected = {id for id, token in enumerate(which.tokens) if token.startswith(left.encode())}
        found = Healing(which).beginning(left.encode()).tolist()
        assert len(found) == len(set(found)) and set(found) == expected


# --- what is written


def covers(poet: Poet, prompt: str, style: str = "") -> dict[tuple[int, ...], float]:
    """Each way to write a prompt's last word, with its probability: a full forward pass for each token, in float64.

    A way is some of the prompt's own tokens, and one that begins with all that is left.
    """
    tokens, read = poet.tokenizer.tokens, poet.read(prompt)
    front, own = [poet.tokenizer.specials[f"<|{style}|>"]] if style else [], tuple(read.own)
    found, before = {}, 1.0
    for n in range(len(own)):
        with torch.inference_mode():
            logits = poet.model(torch.tensor([[*front, *read.read, *own[:n]]]))[0][0, -1]
        probs, left = logits.softmax(-1).tolist(), b"".join(tokens[id] for id in own[n:])
        found |= {(*own[:n], id): before * probs[id] for id, token in enumerate(tokens) if token.startswith(left)}
        before *= probs[own[n]]
    total = sum(found.values())
    return {ids: p / total for ids, p in found.items()}


def marginals(ways: dict[tuple[int, ...], float], ids: tuple[int, ...]) -> dict[int, float]:
    """How likely each id comes next after these."""
    found = Counter()
    for way, p in ways.items():
        if way[: len(ids)] == ids:
            found[way[len(ids)]] += p
    return found


@pytest.mark.parametrize("prompt", ["The queen", "The que", "The ", "quee", "The quee", "The q", "The queene"])
def test_the_last_word_is_drawn_from_the_models_distribution_given_it(poet, prompt):
    expected, n = covers(poet, prompt), 4000
    assert sum(expected.values()) == pytest.approx(1) and len(expected) > 1
    found = Counter()
    for passage in written(poet, prompt, n, max_new_tokens=1, until="tokens", temperature=1.0, top_p=1.0):
        ids = passage.ids.tolist()
        raw = [poet.tokenizer.decode_bytes(ids[:k]) for k in range(len(ids) + 1)]
        found[tuple(ids[: next(k for k, part in enumerate(raw) if len(part) >= len(passage.rest))])] += 1
        assert passage.n_new == 1 and passage.prompt == prompt
        assert poet.tokenizer.decode_bytes(ids).startswith(passage.rest)
    assert found.keys() <= expected.keys()
    chi2 = sum((found[ids] - n * p) ** 2 / (n * p) for ids, p in expected.items())
    free = len(expected) - 1
    assert chi2 < free + 5 * math.sqrt(2 * free) + 10


WAYS = [{}, {"top_k": 2}, {"repetition_penalty": 9.0}, {"no_repeat_ngram": 1}, {"top_p": 0.1}]


@pytest.mark.parametrize("given", WAYS, ids=str)
def test_filters_choose_among_what_writes_the_prompt_and_penalties_count_after_it(poet, given):
    prompt = "The queen The queen The quee"
    if "top_p" in given or "top_k" in given:
        likeliest = marginals(covers(poet, prompt), ())
        kept = sorted(likeliest, key=likeliest.get, reverse=True)[: given.get("top_k", 1)]
    for passage in written(poet, prompt, 20, max_new_tokens=6, until="tokens", **{"top_p": 1.0} | given):
        raw = poet.tokenizer.decode_bytes(passage.ids)
        assert raw.startswith(b" quee") and raw[5:].decode(errors="ignore").startswith(passage.text)
        if "top_p" in given or "top_k" in given:
            assert passage.ids[0] in kept


def test_greedy_text_is_that_of_a_naive_loop_over_sliding_windows(tmp_path, tok):
    for style, tag in (("", None), ("a", "<|a|>")):
        path = save_random(tmp_path / f"{style or 'plain'}.pt", tok, block_size=9)
        poet = Poet(str(path), "cpu", "float64")
        for prompt in ("The que", "quee", "The queens", "The quee", "The queen said: The queen and The que", "The "):
            (passage,) = written(poet, prompt, max_new_tokens=30, until="tokens", temperature=0.0, style=style)
            read, front, ids = poet.read(prompt), [tok.specials[tag]] if tag else [], []
            ways = covers(poet, prompt, style) if len(read.own) > 1 else {}
            for _ in passage.ids:
                text = front + read.read + ids
                window = text[window_start(len(text), poet.model.config) :]
                window = front + window[1:] if tag else window
                with torch.no_grad():
                    logits = poet.model(torch.tensor([window]))[0][0, -1].clone()
                logits[poet.forbidden] = -torch.inf
                table, at = poet.characters.table, START
                for id in ids:
                    at = table[at, id]
                logits[torch.from_numpy(table[at] == ERROR)] = -torch.inf
                if not ids and len(read.own) == 1:
                    wrong = [id for id, token in enumerate(tok.tokens) if not token.startswith(read.rest)]
                    logits[[*wrong, *tok.specials.values()]] = -torch.inf
                next_ids = marginals(ways, tuple(ids)) if len(tok.decode_bytes(ids)) < len(read.rest) else {}
                ids.append(max(next_ids, key=next_ids.get) if next_ids else int(logits.argmax()))
            assert ids == passage.ids.tolist() and passage.n_new <= 30


def test_each_passage_has_its_own_count_of_tokens_however_its_prompt_was_written(poet):
    together = written(poet, "The quee", 40, max_new_tokens=7, until="tokens", temperature=3.0, top_p=1.0, seed=2)
    assert len({passage.n_healing for passage in together}) > 1
    end = poet.tokenizer.specials[END]
    assert all(p.n_new == 7 or p.ids[-1] == end for p in together) and sum(p.n_new == 7 for p in together) > 30
    for i in (0, 7, 39):
        keys = {"max_new_tokens": 7, "until": "tokens", "temperature": 3.0, "top_p": 1.0, "seed": 2}
        (alone,) = written(poet, "The quee", 1, first=i, **keys)
        assert (alone.ids, alone.text) == (together[i].ids, together[i].text)


def test_a_stop_is_looked_for_behind_the_prompt_alone(poet):
    for passage in written(poet, "The queen", 8, max_new_tokens=9, until="tokens", stop=("queen", "n", "Th")):
        assert not any(stop in passage.text for stop in ("queen", "n", "Th"))
    assert any(passage.text for passage in written(poet, "The queen", 8, max_new_tokens=9, stop=("queen",)))


def test_blends_write_the_last_word_too(poet):
    for passage in written(poet, "The quee", 10, max_new_tokens=5, until="tokens", style="a:0.7,b:0.3"):
        assert poet.tokenizer.decode_bytes(passage.ids).startswith(b" quee") and passage.prompt == "The quee"


def test_max_copy_lets_a_prompt_be_a_copy_and_goes_no_further(poet, monkeypatch):
    """By a training text in which "queen" and "queens" follow any two words."""
    both = frozenset([b"queen", b"queens"])
    followers = lambda words, count: both if count == 1 else frozenset()  # noqa: E731
    monkeypatch.setitem(poet.__dict__, "originality", SimpleNamespace(followers=followers))
    monkeypatch.setattr(poet, "_copies", {})
    keys = {"max_new_tokens": 3, "until": "tokens", "temperature": 1.0, "top_p": 1.0}
    for prompt in ("and of the queen", "and of the que"):
        free, held = (written(poet, prompt, 300, **keys, max_copy=n) for n in (0, 3))
        word = prompt.split()[-1]
        texts = [(word + p.text).split(" ")[0].rstrip("\n") for p in held]
        assert not any(p.is_stuck for p in held) and all(p.text or p.n_new for p in held)
        longer = {"queen", "queens"} - {word}
        assert any((word + p.text).startswith(tuple(longer)) for p in free)
        assert not longer & set(texts)


def test_specials_are_never_chosen_to_write_a_prompt(poet):
    for prompt in ("The que", "<|a", "<|endoftext|", "The <|endoftext|>"):
        for passage in written(poet, prompt, 30, max_new_tokens=1, until="tokens", temperature=5.0, top_p=1.0):
            assert max(passage.ids[: passage.n_healing], default=0) < len(poet.tokenizer.tokens)
            assert poet.tokenizer.decode_bytes(passage.ids).startswith(passage.rest)
