"""What a tuned model reads before a prompt: where it comes from, and that every door reads the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LETTERS, make_book, save_random
from llamas import make_llama, small_tokenizer, write
from served import Served

import prepare
import train
from model import KVCache
from robopoet.text.excerpts import last_excerpts
from robopoet.text.tokenizer import END
from robopoet.text.windows import Split
from robopoet.weights import checkpoint
from robopoet.writing.decode import EvenRows
from robopoet.writing.poet import Poet
from robopoet.writing.replay import replay, save_passages
from train import TrainConfig

TAG = LETTERS.specials["<|alice|>"]


def split_of(*texts: str, styles: list[str], tags: list[int]) -> Split:
    """A split in which each text, ended by <|endoftext|>, is a span."""
    ids = [[*LETTERS.encode(text), LETTERS.specials[END]] for text in texts]
    stops = np.cumsum([len(part) for part in ids])
    tokens = torch.tensor([id for part in ids for id in part], dtype=torch.int16)
    return Split(Path("x"), tokens, np.array([0, *stops[:-1]]), stops, styles, np.array(tags))


def texts_of(found: dict[str, list[int]]) -> dict[str, str]:
    return {style: LETTERS.decode_bytes(ids).decode() for style, ids in found.items()}


@pytest.mark.parametrize(
    ("text", "excerpt"),
    [
        ("a b c!\n\nd e f!\n\ng", "a b c!\n\nd e f!\n\n"),
        ("a b c\nd e f!\ng h", "a b c\nd e f!\n"),
        ("a\n\nb c d e f!\ng h", "a\n\nb c d e f!\n"),  # a paragraph that ends in the first half is none
        ("a b c d\ne", "a b c d\n"),
        ("a b c d e", "a b c d e"),
    ],
)
def test_an_excerpt_ends_with_a_paragraph_or_sentence_or_line(text, excerpt):
    split = split_of(text, styles=["x"], tags=[-1])
    assert texts_of(last_excerpts(split, LETTERS, 100)) == {"": excerpt}
    assert texts_of(last_excerpts(split, LETTERS, 3)) == {"": excerpt[-3:]}


def test_each_style_has_an_excerpt_of_its_longest_text_and_without_tags_there_is_one():
    texts = ["a long one!\n", "b!\n", "c is longer!\n", "d!\n"]
    tagged = split_of(*texts, styles=["alice", "bard", "alice", "bard"], tags=[TAG, TAG + 1, TAG, TAG + 1])
    assert texts_of(last_excerpts(tagged, LETTERS, 50)) == {"alice": "c is longer!\n", "bard": "b!\n"}
    plain = split_of(*texts, styles=["alice", "bard", "alice", "bard"], tags=[-1] * 4)
    assert texts_of(last_excerpts(plain, LETTERS, 50)) == {"": "c is longer!\n"}
    several = Split(
        plain.path, plain.tokens, plain.starts[:1], plain.stops[-1:], ["x"], np.array([-1]), LETTERS.specials[END]
    )
    assert texts_of(last_excerpts(several, LETTERS, 50)) == {"": "c is longer!\n"}


@pytest.mark.parametrize("titles", [["alpha"], ["alpha", "beta"]])
def test_a_tuned_model_keeps_excerpts_and_one_from_nothing_has_none(tmp_path, small, shapeless, titles):
    tok = small_tokenizer()
    path = write(tmp_path / "a.gguf", make_llama(tok), tok)
    for number, title in enumerate(titles):
        (tmp_path / f"{title}.txt").write_text(make_book(number, 80))
    bins = str(tmp_path / "bins")
    prepare.main(prepare.PrepareConfig(input=(str(tmp_path / "*.txt"),), out=bins, tokenizer=str(path)))
    keys = shapeless | {"dataset": bins, "max_iters": 2, "eval_interval": 2, "sample_tokens": 20}
    train.main(TrainConfig(**keys | {"init_from": str(path)}))
    tuned = Path(keys["out_dir"]) / "best.pt"
    content = checkpoint.load(tuned)
    assert [*content["excerpts"]] == (titles if len(titles) > 1 else [""])
    books = [(tmp_path / f"{title}.txt").read_text() for title in titles]
    for book, ids in zip(books, content["excerpts"].values(), strict=True):
        assert 0 < len(ids) <= content["model_args"]["block_size"] // 4
        text = checkpoint.tokenizer_of(content, tuned).decode_bytes(ids).decode(errors="ignore")
        assert text.strip() in book and text.endswith("\n")
    last = [json.loads(line) for line in tuned.with_name("metrics.jsonl").read_text().splitlines()][-1]
    assert last["text"] == Poet(str(tuned.with_name("ckpt.pt")), "cpu", "float32").write(max_new_tokens=20)[0]
    train.main(TrainConfig(**keys | {"init_from": "auto", "max_iters": 4, "eval_interval": 4}))
    assert checkpoint.load(tuned.with_name("ckpt.pt"))["excerpts"] == content["excerpts"]
    train.main(TrainConfig(**keys | {"init_from": str(tuned), "out_dir": str(tmp_path / "on")}))
    assert checkpoint.load(tmp_path / "on" / "best.pt")["excerpts"] == content["excerpts"]
    train.main(TrainConfig(**small | {"max_iters": 2, "eval_interval": 2}))
    assert checkpoint.load(Path(small["out_dir"]) / "best.pt")["excerpts"] == {}


EXCERPT = LETTERS.encode("the queen of hearts, she made some tarts!\n\n"[:20])


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A checkpoint without excerpts, and the same with one for no style and one for alice."""
    folder = tmp_path_factory.mktemp("excerpts")
    plain = save_random(folder / "plain.pt", block_size=64)
    content = checkpoint.load(plain)
    with_excerpts = folder / "best.pt"
    checkpoint.save(with_excerpts, content | {"excerpts": {"": EXCERPT, "alice": EXCERPT[:5]}})
    return plain, with_excerpts


@pytest.fixture(scope="module")
def poets(paths):
    return [Poet(str(path), "cpu", "float64") for path in paths]


def naive(poet: Poet, ids: list[int], tokens: int) -> list[int]:
    """The greedy continuation up to <|endoftext|>, by a full forward pass for each token."""
    text = torch.tensor([ids])
    with torch.no_grad():
        for _ in range(tokens):
            logits = poet.model(text)[0][0, -1].index_fill(0, poet.forbidden, -torch.inf)
            text = torch.cat([text, logits.argmax().view(1, 1)], dim=1)
            if text[0, -1] == LETTERS.specials[END]:
                break
    return text[0, len(ids) :].tolist()


@pytest.mark.parametrize(
    ("prompt", "style", "read"),
    [
        ("o romeo", "", [*EXCERPT, *LETTERS.encode("o romeo")]),
        ("", "", EXCERPT),  # and no line's end before it
        ("o", "alice", [TAG, *EXCERPT[:5], *LETTERS.encode("o")]),
        ("o romeo " * 3, "", [*EXCERPT[-8:], *LETTERS.encode("o romeo " * 3)]),  # half of the context
        ("o romeo " * 5, "", LETTERS.encode("o romeo " * 5)),
        ("o", "bard", [LETTERS.specials["<|bard|>"], *LETTERS.encode("o")]),
    ],
)
def test_a_poet_reads_its_excerpt_before_the_prompt(poets, prompt, style, read):
    poet, settings = poets[1], {"temperature": 0, "max_new_tokens": 12, "until": "tokens", "style": style}
    passages = poet.begin(prompt, 2, **settings)
    for _ in poet.stream(passages):
        pass
    assert [passage.ids.tolist() for passage in passages] == [naive(poet, read, 12)] * 2


def test_a_blend_reads_as_much_of_each_styles_excerpt(poets):
    rows = poets[1].windows(poets[1].read("o"), {TAG: 0.5, LETTERS.specials["<|bard|>"]: 0.5})
    assert rows == [[TAG, *LETTERS.encode("o")], [LETTERS.specials["<|bard|>"], *LETTERS.encode("o")]]


def test_without_excerpts_nothing_changes(poets):
    for prompt in ("o romeo", ""):
        assert poets[0].windows(poets[0].read(prompt), {}) == [poets[0].read(prompt).read]


def test_a_server_reads_it_before_texts_and_not_before_ids(paths, poets):
    keys = {"temperature": 0, "max_tokens": 10, "until": "tokens"}
    with Served(paths[1]) as served:
        for style in ("", "alice"):
            (choice,) = served.choices(**keys, style=style)
            expected = poets[1].write("o romeo", temperature=0, max_new_tokens=10, until="tokens", style=style)[0]
            assert "o romeo" + choice["text"] == expected
            (scored,) = served.choices(**keys, style=style, echo=True, logprobs=0)
            assert scored["text"] == expected
        ids = LETTERS.encode("o romeo")
        (choice,) = served.choices(ids, **keys)
        expected = poets[0].write("o romeo", temperature=0, max_new_tokens=10, until="tokens")[0]
        assert "o romeo" + choice["text"] == expected
        told = served.post(**keys).json()["usage"]
        assert told["prompt_tokens"] == len(ids)


def test_saved_passages_are_replayed(poets, tmp_path, capsys):
    passages = poets[1].begin("o ro", 3, max_new_tokens=15, until="tokens")
    for _ in poets[1].stream(passages):
        pass
    save_passages(tmp_path / "a.jsonl", poets[1], passages)
    replay(tmp_path / "a.jsonl")
    assert "3 passages, all reproduced exactly" in capsys.readouterr().out


@pytest.mark.parametrize("excerpts", [{"": [61]}, {"": [-1]}, {"": "text"}, [1]])
def test_a_damaged_excerpt_is_refused(paths, tmp_path, excerpts):
    checkpoint.save(tmp_path / "best.pt", checkpoint.load(paths[0]) | {"excerpts": excerpts})
    with pytest.raises(checkpoint.CheckpointError, match="excerpt"):
        Poet(str(tmp_path / "best.pt"), "cpu", "float32")


def test_rows_that_are_alike_are_read_once(poets, monkeypatch):
    model = poets[0].model
    torch.manual_seed(0)
    window = torch.randint(25, (3, 30))[[0, 1, 0, 2, 1, 0]].contiguous()
    cache = KVCache.empty(model.config, 6, torch.device("cpu"), torch.float64)
    with torch.inference_mode():
        expected = model.lm_head(model.hidden_states(window, cache)[:, -1])
    counted = []
    read = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda idx, cache: counted.append(len(idx)) or read(idx, cache))
    for alike, rows in ((2**11, 6), (100, 3)):
        monkeypatch.setattr("robopoet.writing.decode.ALIKE", alike)
        even = EvenRows(model, 6)
        with torch.inference_mode():
            torch.testing.assert_close(even.read(window), expected, atol=1e-12, rtol=0)
        assert counted.pop() == rows
        for found, wanted in zip(even.cache, cache, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
