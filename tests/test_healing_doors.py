"""A prompt's last word, written by the model: saved, typed, asked of the server, and in the page."""

import json
import math

import pytest
import torch
from conftest import save_random
from served import Served
from test_healing import QUEENS, covers, marginals, written
from test_html import call, engine, export

from robopoet.serving.engine import Bias
from robopoet.text.tokenizer import END
from robopoet.writing.passage import Settings
from robopoet.writing.poet import Poet
from robopoet.writing.replay import replay, save_passages
from robopoet.writing.session import Session


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("healing") / "best.pt", QUEENS, scale=2, block_size=24)


@pytest.fixture(scope="module")
def poet(path) -> Poet:
    return Poet(str(path), "cpu", "float64")


@pytest.fixture(scope="module")
def served(path):
    with Served(path) as server:
        yield server


def test_a_saved_passage_says_that_its_prompt_was_healed_and_older_ones_are_replayed(poet, tmp_path, capsys):
    file, keys = tmp_path / "passages.jsonl", {"max_new_tokens": 20, "until": "tokens", "temperature": 1.5}
    healed = written(poet, "The queen", 3, **keys)
    own = poet.begin("The queen", 3, heals=False, **keys)
    for _ in poet.stream(own, logprobs=True):
        pass
    assert [p.rest for p in own] == [b""] * 3 and all(p.n_healing == 0 for p in own)
    assert [p.text for p in own] != [p.text for p in healed]
    save_passages(file, poet, healed)
    save_passages(file, poet, own)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["healed"] for line in lines] == [True] * 3 + [False] * 3
    assert all(len(line["ids"]) == len(line["logprobs"]) for line in lines)
    for line in lines[3:]:  # as files had them
        del line["healed"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    replay(file)
    assert "6 passages, all reproduced exactly" in capsys.readouterr().out


def test_a_session_heals_what_is_typed_and_keeps_it(poet, tmp_path, capsys):
    session = Session(poet, Settings(max_new_tokens=12, until="tokens", temperature=1.5))
    session.do("The que")
    first = session.last
    assert capsys.readouterr().out == f"The que{first.text}\n" and first.rest == b" que"
    assert first.text == written(poet, "The que", 1, max_new_tokens=12, until="tokens", temperature=1.5)[0].text
    session.do("/more")
    assert session.last.prompt == "The que" + first.text
    session.do(f"/save {tmp_path / 'x.jsonl'}")
    replay(tmp_path / "x.jsonl")
    assert "1 passages, all reproduced exactly" in capsys.readouterr().out


KEYS = {"max_tokens": 12, "seed": 3}
SAME = {"max_new_tokens": 12, "seed": 3, "until": "tokens", "temperature": 1.0, "top_p": 1.0}


ASKED = [{}, {"temperature": 0}, {"style": "a:0.7,b:0.3"}, {"stop": ["e"]}, {"no_repeat_ngram": 2}]


@pytest.mark.parametrize("given", ASKED, ids=str)
@pytest.mark.parametrize("prompt", ["The queen", "The que", "quee", "The "])
def test_the_servers_texts_are_poets(served, prompt, given):
    expected = [text[len(prompt) :] for text in served.poet.write(prompt, 4, **SAME | given)]
    assert [choice["text"] for choice in served.choices(prompt, n=4, **KEYS | given)] == expected
    streamed = [""] * 4
    for event in served.events(prompt, n=4, stream=True, **KEYS | given):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == expected
    echoed = served.choices(prompt, n=4, echo=True, logprobs=1, **KEYS | given)
    assert [choice["text"] for choice in echoed] == [prompt + text for text in expected]


def test_the_server_takes_ids_as_they_are(served):
    ids = served.poet.tokenizer.encode("The que")
    own = served.poet.begin("The que", 4, heals=False, **SAME)
    for _ in served.poet.stream(own):
        pass
    assert [choice["text"] for choice in served.choices(ids, n=4, **KEYS)] == [passage.text for passage in own]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["The queen", "The que", "quee", "The "])
def test_the_servers_tokens_make_its_text_and_their_log_probabilities_are_given_the_prompt(served, prompt, echo):
    poet, tok, n = served.poet, served.poet.tokenizer, 30
    answer = served.post(prompt, n=n, max_tokens=4, seed=7, logprobs=5, echo=echo, logit_bias={tok.specials[END]: -100})
    answer = answer.json()
    own = tok.encode(prompt)
    passages = written(poet, prompt, n, **SAME | {"seed": 7, "max_new_tokens": 4}) if not echo else [None] * n
    assert answer["usage"] == {"prompt_tokens": len(own), "completion_tokens": 4 * n, "total_tokens": len(own) + 4 * n}
    crossing = 0
    for choice in answer["choices"]:
        told = choice["logprobs"]
        start = len(own) if echo else 0
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == start + 4
        assert told["text_offset"] == sorted(told["text_offset"])
        if not any(token.startswith("bytes:") for token in told["tokens"]):
            assert "".join(told["tokens"]) == choice["text"]
            lengths = [len(token) for token in told["tokens"]]
            assert told["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]
        assert told["tokens"][:start] == [tok.tokens[id].decode() for id in own[:start]]
        assert all(math.isfinite(p) and p <= 0 for p in told["token_logprobs"][1:])
        assert all(len(top) <= 6 for top in told["top_logprobs"][1:])
        for token, p, top in list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))[1:]:
            assert top[token] == p and "" not in top
    # the first token of each: what a full forward pass gives to those that write the last word at once, and more
    rest, ways = poet.read(prompt).rest, covers(poet, prompt)
    beyond = {tok.tokens[way[0]][len(rest) :]: math.log(p) for way, p in ways.items() if len(way) == 1}
    for choice, passage in zip(answer["choices"], passages, strict=True):
        if passage and passage.n_healing == 0:
            crossing += 1
            name = tok.tokens[passage.ids[0]][len(rest) :]
            assert choice["logprobs"]["token_logprobs"][0] == pytest.approx(beyond[name], abs=1e-9)
    assert echo or crossing or prompt not in ("The que", "The ")


def test_a_single_token_may_be_asked_for_and_none(served):
    for prompt in ("The queen", "The que"):
        (choice,) = served.choices(prompt, max_tokens=1, seed=1, logprobs=0)
        assert len(choice["logprobs"]["tokens"]) == 1 and choice["finish_reason"] in ("length", "stop")
        (none,) = served.choices(prompt, max_tokens=0, echo=True, logprobs=0)
        assert none["text"] == prompt and len(none["logprobs"]["tokens"]) == len(served.poet.tokenizer.encode(prompt))


def test_penalties_of_the_server_count_what_is_new(served, monkeypatch):
    counted, take = [], Bias.take
    monkeypatch.setattr(Bias, "take", lambda self, ids: counted.append(list(ids)) or take(self, ids))
    answer = served.post("The queen", presence_penalty=0.1, seed=1, max_tokens=9).json()
    assert [len(ids) for ids in counted] == [*range(1, answer["usage"]["completion_tokens"] + 1)]
    raw = served.poet.tokenizer.decode_bytes(counted[-1]).decode(errors="ignore")
    assert raw.endswith(answer["choices"][0]["text"])


def test_a_chat_as_a_book_has_it_is_healed(served):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "The que"}], "seed": 3, "max_tokens": 12}
    answer = served.http.post("/v1/chat/completions", json=asked | {"logprobs": True}).json()
    (expected,) = served.poet.write("The que", **SAME | {"until": "auto"})
    assert "The que" + answer["choices"][0]["message"]["content"] == expected
    told = answer["choices"][0]["logprobs"]["content"]
    raw = bytes(byte for token in told for byte in token["bytes"] or [])
    assert raw.decode(errors="ignore").startswith(expected.removeprefix("The que"))


PROMPTS = ["The queen", "The que", "quee", "The ", "The  ", " ", "The queen,", "Été", "The queen\n", "", "zebra", "東"]


def test_a_page_heals_as_poet_does(tmp_path, bpe):
    for which in (QUEENS, bpe):
        at = save_random(tmp_path / f"{len(which.tokens)}.pt", which, block_size=12)
        v8, poet = engine(export(at, tmp_path / f"{len(which.tokens)}.html")), Poet(str(at), "cpu", "float32")
        for prompt in PROMPTS:
            read = poet.read(prompt)
            found = call(v8, "(text) => heal(poet.tokenizer, text)", prompt)
            assert (found["read"], found["own"]) == (read.read, list(read.own))
            for style in ({}, {"a": 0.7, "b": 0.3}):
                greedy = {"temperature": 0.0, "until": "tokens", "max_new_tokens": 40}
                named = ",".join(f"{name}:{share}" for name, share in style.items())
                (passage,) = written(poet, prompt, style=named, **greedy)
                found = call(v8, "write", prompt, greedy | {"style": style})
                assert found == {"ids": passage.ids.tolist(), "text": passage.text}


@pytest.mark.parametrize("block_size", [24, 8])
def test_a_page_finds_each_way_to_write_the_last_word_as_likely_as_brute_force(tmp_path, block_size):
    """In a window that has room for the last word, and in one that it fills."""
    path = save_random(tmp_path / "best.pt", QUEENS, scale=2, block_size=block_size, positions="rotary")
    v8, poet = engine(export(path, tmp_path / "poet.html")), Poet(str(path), "cpu", "float64")
    code = """(prompt, style) => { const found = [], given = Rest.prototype.given;
        Rest.prototype.given = function (z) { given.call(this, z); found.push([this.odds, Array.from(z, String)]); };
        for (const _ of poet.write(prompt, { max_new_tokens: 1, style })) {}
        Rest.prototype.given = given; return found[0]; }"""
    for prompt in ("The quee", "quee", "a queene", "zeb"):
        logits = torch.tensor([float(x.replace("Infinity", "inf")) for x in call(v8, code, prompt, {})[1]])
        first = marginals(covers(poet, prompt), ())
        assert set(first) == set(logits.isfinite().nonzero()[:, 0].tolist())
        assert logits.softmax(-1)[[*first]].tolist() == pytest.approx([*first.values()], abs=1e-5)
        for named, style in (("a", {"a": 1}), ("a:0.7,b:0.3", {"a": 0.7, "b": 0.3})):
            rest = poet.rest(poet.read(prompt), poet.blend_of(named))
            assert list(call(v8, code, prompt, style)[0]) == pytest.approx(rest.odds, abs=1e-4)


def test_a_pages_first_word_tells_what_else_it_could_have_been(path, tmp_path):
    v8 = engine(export(path, tmp_path / "poet.html"))
    code = """(prompt, settings) => [...poet.write(prompt, settings)].flatMap((parts) => parts ?? [])"""
    for seed in range(20):
        settings = {"seed": seed, "max_new_tokens": 3, "until": "tokens", "temperature": 1.0, "top_p": 1, "style": {}}
        for _, note in call(v8, code, "The que", settings)[:1]:
            assert 0 < note["p"] <= 1 and all(name for name, _ in note["others"])
            assert note["p"] + sum(p for _, p in note["others"]) <= 1 + 1e-9
