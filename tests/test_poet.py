"""Poet: what it generates, against the model's own probabilities and a naive sampler, and how it names mistakes."""

import dataclasses
import gc
import itertools
import math
import os
import types
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, save_random

import sample
from robopoet.errors import CheckpointError, ConfigError
from robopoet.text.tokenizer import END
from robopoet.writing import poet as poet_module
from robopoet.writing.batch import Batch
from robopoet.writing.decode import window_start
from robopoet.writing.sampler import SampledText, Sampler
from sample import Poet


def test_sampled_tokens_follow_the_models_distribution(poet):
    prompt = "the q"
    idx = torch.tensor([poet.tokenizer.encode(prompt)])
    logits = poet.model(idx)[0][0, -1].detach()
    for special in poet.tokenizer.specials.values():
        logits[special] = -math.inf if special != poet.tokenizer.specials[END] else logits[special]
    expected = (logits / 0.7).softmax(-1)
    n = 4000
    pieces = next(iter(poet.stream(poet.begin(prompt, n, temperature=0.7, top_p=1.0))))
    for id, char in enumerate(poet.tokenizer.chars):
        share = pieces.count(char) / n
        assert abs(share - expected[id]) < 4.5 * math.sqrt(expected[id] * (1 - expected[id]) / n) + 1e-9


def test_temperature_zero_is_greedy(poet):
    ids = poet.tokenizer.encode("ab")
    for _ in range(12):
        logits = poet.model(torch.tensor([ids]))[0][0, -1]
        ids.append(int(logits[: poet.tokenizer.specials[END] + 1].argmax()))
    if poet.tokenizer.specials[END] in ids:
        ids = ids[: ids.index(poet.tokenizer.specials[END])]
    expected = poet.tokenizer.decode_bytes(ids).decode()
    assert poet.write("ab", temperature=0, max_new_tokens=12, until="tokens") == [expected]


def test_a_passage_is_the_same_alone_and_in_a_batch(poet):
    together = poet.write("o romeo", n=4, max_new_tokens=40)
    assert len(set(together)) == 4
    for i, text in enumerate(together):
        alone = poet.begin("o romeo", 1, first=i, max_new_tokens=40)
        assert "o romeo" + "".join(piece for (piece,) in poet.stream(alone)) == text
    assert poet.write("o romeo", seed=1, max_new_tokens=40) != poet.write("o romeo", seed=2, max_new_tokens=40)
    assert poet.write("o romeo", n=4, max_new_tokens=40) == together


def test_rows_of_finished_passages_are_dropped(poet, monkeypatch):
    rows, call = [], Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, logits: rows.append(len(logits)) or call(self, logits))
    alone = poet.write("o romeo", n=6, max_new_tokens=60, until="tokens")
    letter = max(poet.tokenizer.chars, key=lambda c: len({text.find(c, 7) for text in alone}))  # ends them apart
    rows.clear()
    ended = poet.write("o romeo", n=6, max_new_tokens=60, stop=(letter,), until="tokens")
    assert ended == [text[:7] + text[7:].split(letter)[0] for text in alone]
    assert rows[0] == 6 and len(set(rows)) > 2 and rows == sorted(rows, reverse=True)


@pytest.mark.parametrize("device, dropped", [("cpu", [1, 2, 3]), ("meta", [2, 3])])
def test_rows_are_dropped_at_once_on_a_cpu_and_by_halves_on_a_gpu(device, dropped):
    kept, passages = [], [types.SimpleNamespace(done=False) for _ in range(4)]
    forbidden = types.SimpleNamespace(device=torch.device(device))
    texts = [types.SimpleNamespace(weights=[0.5, 0.5], place=place) for place in range(4)]
    sampler = types.SimpleNamespace(texts=texts, forbidden=forbidden)
    sampler.arrange = lambda texts: (kept.append([text.place for text in texts]), setattr(sampler, "texts", texts))
    batch = Batch(passages, sampler, False)
    for done, i in enumerate((2, 0, 3), 1):
        passages[i].done = True
        rows = batch.drop_done()
        assert (rows is not None) == (done in dropped)
        assert rows is None or len(rows) == 2 * (4 - done) == 2 * len(batch.active)
    assert batch.active == [1] and not batch.is_done
    assert kept == ([[0, 1, 3], [1, 3], [1]] if device == "cpu" else [[1, 3], [1]])


def test_the_style_tag_stands_first_in_every_window_and_changes_the_text(poet):
    windows = []
    handle = poet.model.transformer.wte.register_forward_pre_hook(lambda module, args: windows.append(args[0].clone()))
    styled = poet.write("once upon", style="bard", max_new_tokens=40, temperature=0)
    handle.remove()
    assert styled != poet.write("once upon", max_new_tokens=40, temperature=0)
    tag = poet.tokenizer.specials["<|bard|>"]
    assert all(window[0, 0] == tag for window in windows) and len(windows) > 3


def test_a_blend_is_the_weighted_mean_of_its_styles_log_probabilities(poet):
    shares = {poet.tokenizer.specials["<|bard|>"]: 0.75, poet.tokenizer.specials["<|alice|>"]: 0.25}
    assert poet.blend_of("bard:3, alice") == shares and poet.blend_of("") == {}
    end, prompt = poet.tokenizer.specials[END], poet.tokenizer.encode("once upon")
    ids, texts = list(prompt), {}
    while len(ids) < len(prompt) + 30 and ids[-1] != end:
        mean = 0
        for tag, share in shares.items():
            window = [tag, *ids]
            start = window_start(len(window), poet.model.config)
            logits = poet.model(torch.tensor([[tag, *window[start + 1 :]]]))[0][0, -1]
            logits[poet.forbidden] = -math.inf
            mean = mean + share * logits.log_softmax(-1)
        ids.append(int(mean.argmax()))
    for n in (1, 3):
        texts = poet.write("once upon", n, style="bard:3,alice", max_new_tokens=30, temperature=0, until="tokens")
        assert texts == [poet.tokenizer.decode_bytes(ids).decode()] * n
    assert texts[0] not in poet.write("once upon", style="bard", max_new_tokens=30, temperature=0, until="tokens")
    several = poet.write("a", 4, style="bard:0.5,alice:0.5", max_new_tokens=60)  # rows end one by one
    for i, text in enumerate(several):
        alone = poet.begin("a", 1, i, style="bard:0.5,alice:0.5", max_new_tokens=60)
        assert "a" + "".join(piece for (piece,) in poet.stream(alone)) == text


def test_text_outgrows_the_block_and_stops_at_max_new_tokens(poet):
    pieces = list(poet.stream(poet.begin("a", max_new_tokens=100, seed=5)))
    assert len(pieces) <= 101
    (text,) = poet.write("a" * 50, max_new_tokens=30)
    assert len(text) <= 80


@torch.inference_mode()
def naive_ids(poet, prompt, number, settings):
    """A passage's ids, each sampled with all earlier ids at hand: no KV cache, and penalties by their definition."""
    blend = poet.blend_of(settings.style) or {None: 1.0}
    plain = dataclasses.replace(settings, repetition_penalty=1.0, no_repeat_ngram=0)
    sampler = poet.sampler([SampledText(plain, number, [])])
    context = [tag for tag in blend if tag is not None][:1] + poet.tokenizer.encode(prompt)
    ids = []
    while len(ids) < settings.max_new_tokens and poet.tokenizer.specials[END] not in ids:
        rows = []
        for tag in blend:
            window = context[window_start(len(context), poet.model.config) :]
            rows.append(poet.model(torch.tensor([window if tag is None else [tag, *window[1:]]]))[0][0, 0])
        logits = torch.stack(rows).index_fill(1, poet.forbidden, -math.inf)
        if len(rows) > 1:
            logits = (logits.log_softmax(-1) * torch.tensor(list(blend.values()))[:, None]).sum(0, keepdim=True)
        for id in set(context):
            better = logits[0, id] > 0
            logits[0, id] *= 1 / settings.repetition_penalty if better else settings.repetition_penalty
        n = settings.no_repeat_ngram
        grams = {tuple(context[i : i + n]) for i in range(len(context) - n + 1)} if n else ()
        again = [id for id in range(logits.shape[1]) if (*context[len(context) - n + 1 :], id) in grams]
        if n and logits.index_fill(1, torch.tensor(again, dtype=torch.long), -math.inf).max() > -math.inf:
            logits[0, again] = -math.inf
        ids.append(int(sampler.sample(logits)))
        context.append(ids[-1])
    return ids


@pytest.fixture(scope="module", params=[{}, {"block_size": 128, **LLAMA}], ids=["gpt2", "llama"])
def either(request, tmp_path_factory) -> Poet:
    """A poet whose passages outgrow its window, and one of a Llama, whose window slides otherwise: they fit into it."""
    return Poet(str(save_random(tmp_path_factory.mktemp("either") / "best.pt", **request.param)), "cpu", "float64")


@pytest.mark.parametrize("style", ["", "bard", "bard:0.3,alice"])
@pytest.mark.parametrize("given", [{}, {"repetition_penalty": 1.4, "no_repeat_ngram": 2, "top_k": 9}])
@pytest.mark.parametrize("prompt", ["o romeo", "the quick brown fox jumps over the lazy dog"])
def test_passages_equal_those_of_a_naive_sampler(either, style, given, prompt):
    poet = either
    passages = poet.begin(prompt, 3, style=style, max_new_tokens=50, until="tokens", top_p=0.99, stop=("q",), **given)
    for _ in poet.stream(passages):
        pass
    for number, passage in enumerate(passages):  # they end one by one, by END or by a stop
        expected = naive_ids(poet, prompt, number, passage.settings)
        assert passage.ids.tolist() == expected[: len(passage.ids)]
        assert passage.done or len(passage.ids) == 50


def live_tensor_bytes() -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_memory_grows_neither_with_the_text_nor_with_max_new_tokens(poet, monkeypatch):
    monkeypatch.setattr(poet, "forbidden", torch.tensor(list(poet.tokenizer.specials.values())))  # so that none ends
    settings = {"max_new_tokens": 10**12, "until": "tokens", "repetition_penalty": 1.1, "no_repeat_ngram": 4}
    passages, sizes = poet.begin("o romeo" * 50, 2, **settings), []
    stream = poet.stream(passages)
    for tokens in (50, 250):
        for _ in itertools.islice(stream, tokens):
            pass
        sizes.append(live_tensor_bytes())
    assert len(passages[0].ids) == 300 and sizes[0] == sizes[1]


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"n": 0}, "n: found 0"),
        ({"n": -1}, "n: found -1"),
        ({"n": 1.5}, "n: found 1.5"),
        ({"n": "2"}, "n: found '2'"),
        ({"n": 10**9}, "n: found 1000000000"),
        ({"prompt": None}, "prompt: found None"),
        ({"prompt": b"x"}, "prompt: found b'x'"),
        ({"prompt": "a\ud800"}, "prompt: character 1 is a lone surrogate"),
        (
            {"prompt": "<|bard|>alas"},
            "prompt: begins with <|bard|>, as exported models have it; leave it out, set style",
        ),
        ({"prompt": "a" * (10 * 2**20 + 1)}, "prompt: found 10,485,761 characters"),
        ({"temprature": 1}, "temprature: no such setting; did you mean temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e-300}, "temperature: found 1e-300"),
        ({"style": "bard:1e-300,alice"}, "style: found 'bard:1e-300'"),
        ({"style": "bard:1e300,alice"}, "style: found 'bard:1e300'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_in_one_line(poet, keys, said):
    with pytest.raises(ConfigError) as e:
        poet.write(**keys)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_wrong_settings_are_named(poet):
    with pytest.raises(ConfigError, match="temperature: found -1"):
        poet.write(temperature=-1)
    with pytest.raises(ConfigError, match=r"style: found 'bob', must be one of the model's: alice, bard"):
        poet.write(style="bob")
    with pytest.raises(ConfigError, match="top_p"):
        poet.begin(top_p=0)


@pytest.mark.parametrize("style", ["bard:x", "bard:0", "bard:-1", "bard:inf", "alice,bob", "bard,", ","])
def test_a_wrong_blend_is_named(poet, style):
    with pytest.raises(ConfigError, match="style: found"):
        poet.begin(style=style)


def test_other_wrong_arguments_are_named(poet, random_pt, monkeypatch):
    with pytest.raises(ConfigError, match="dtype: found 'int8'"):
        Poet(str(random_pt), "cpu", "int8")
    with pytest.raises(ConfigError, match="first: found -1"):
        poet.begin("a", first=-1)
    for passages in ([], poet.begin("a") + poet.begin("b")):
        with pytest.raises(ConfigError, match="must all come from one begin"):
            next(poet.stream(passages))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # a machine with 10 kB
    with pytest.raises(ConfigError, match="generate fewer passages at a time"):
        poet.begin("a", 2)


def test_a_model_of_one_work_has_no_styles(poet, monkeypatch):
    monkeypatch.setattr(poet, "styles", {})
    with pytest.raises(
        ConfigError, match="style: found 'emma', but this model was trained without styles; leave it out"
    ):
        poet.write(style="emma")


def test_unknown_characters_are_named(poet):
    assert poet.unknown("hello") == ""
    assert poet.unknown("héllo ☃") == "prompt: the model does not know 'é', '☃': taken as <|unk|>"
    assert poet.write("é", max_new_tokens=3)[0].startswith("é")


def test_for_a_missing_checkpoint_the_existing_ones_are_listed(random_pt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(poet_module, "HOME", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"not found; train one first: make poem, in .*/nowhere, trains"):
        Poet(device="cpu")
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "best.pt").write_bytes(random_pt.read_bytes())
    with pytest.raises(CheckpointError, match=r"out/demo/.*not found; there is out/mine/") as e:
        Poet(device="cpu")
    advice = str(e.value).rsplit("sample.py ", 1)[1]
    assert Poet(advice, device="cpu").write("a", max_new_tokens=2)
    monkeypatch.chdir(tmp_path / "out" / "mine")
    monkeypatch.setattr(poet_module, "HOME", tmp_path)
    with pytest.raises(CheckpointError, match=f"not found; there is {tmp_path}/out/mine/best.pt; try: "):
        Poet(device="cpu")
    makefile = (Path(sample.__file__).parent / "Makefile").read_text()
    assert "\npoem:" in makefile
    with pytest.raises(CheckpointError, match="not found; train first"):
        Poet("x" * 5000, device="cpu")
