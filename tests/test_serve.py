"""The server: its texts against Poet, its log-probabilities against the full forward pass."""

import concurrent.futures
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, LLAMA, REPO, save_random
from served import Served

from model import GPT, GPTConfig
from robopoet.serving.protocol import model_name
from robopoet.text.tokenizer import END
from robopoet.writing.decode import Rows, prepack_matrices


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory):
    path = save_random(tmp_path_factory.mktemp("served") / "best.pt", **KINDS[request.param])
    with Served(path, client_s=5.0) as server:
        yield server


# --- texts


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0},
        {"temperature": 0, "style": "bard"},
        {"temperature": 0, "style": "bard:3,alice"},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 9, "min_p": 0.01, "seed": 11},
        {"repetition_penalty": 1.4, "no_repeat_ngram": 2, "seed": 3, "stop": ["q", "zz"]},
        {"until": "line", "seed": 5, "style": "alice"},
        {"until": "auto", "seed": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["o romeo", "the quick brown fox jumps over the lazy dog", "a", ""])
def test_texts_are_poets(served, prompt, given):
    settings = {"until": "tokens", "top_p": 1.0, "temperature": 1.0, "max_new_tokens": 60, "seed": 1} | given
    expected = [text[len(prompt) :] for text in served.poet.write(prompt, 3, **settings)]
    found = served.choices(prompt, **{"n": 3, "max_tokens": 60, "seed": 1} | given)
    assert [choice["text"] for choice in found] == expected
    assert [choice["index"] for choice in found] == [0, 1, 2]


def test_a_prompts_line_ends_and_byte_order_mark_change_no_text(served):
    prompt, keys = "o romeo\nthe queen\n", {"max_new_tokens": 40, "seed": 1}
    (expected,) = served.poet.write(prompt, **keys)
    (answer,) = served.choices(prompt, echo=True, max_tokens=40, seed=1)
    for ends in ("\r\n", "\r"):
        typed = "\ufeff" + prompt.replace("\n", ends)
        assert served.poet.write(typed, **keys) == [expected]
        assert served.choices(typed, echo=True, max_tokens=40, seed=1) == [answer]
        passages = served.poet.begin(typed, 1)
        assert [passage.prompt for passage in passages] == [prompt]


def test_max_copy_is_poets_too(served, monkeypatch):
    """By a training text in which each single letter follows any two words; the rest is Copies' own."""
    letters = frozenset(bytes([letter]) for letter in range(ord("a"), ord("z") + 1))
    monkeypatch.setitem(served.poet.__dict__, "originality", SimpleNamespace(followers=lambda words, count: letters))
    monkeypatch.setattr(served.poet, "_copies", {})
    prompt, keys = "to be or ", {"n": 3, "seed": 4}
    settings = {"until": "tokens", "top_p": 1.0, "temperature": 1.0, "max_new_tokens": 40, "seed": 4}
    found = [choice["text"] for choice in served.choices(prompt, **keys, max_tokens=40, max_copy=3)]
    assert found == [text[len(prompt) :] for text in served.poet.write(prompt, 3, **settings, max_copy=3)]
    assert found != [choice["text"] for choice in served.choices(prompt, **keys, max_tokens=40)]
    forbidden = served.poet.tokenizer.encode("\n !") + list(served.poet.tokenizer.specials.values())
    monkeypatch.setattr(served.poet, "forbidden", torch.tensor(forbidden))
    (stuck,) = served.choices(prompt, max_tokens=40, max_copy=3)
    assert (stuck["text"], stuck["finish_reason"]) == ("", "stop")


def test_prompts_are_texts_or_ids_and_each_choice_has_its_own_stream(served):
    ids = served.poet.tokenizer.encode("o romeo")
    one, two = (served.choices(prompt, seed=9, n=2, max_tokens=30) for prompt in ("o romeo", "alas"))
    both = served.choices(["o romeo", "alas"], seed=9, n=2, max_tokens=30)
    assert [c["text"] for c in both] == [c["text"] for c in one + two]
    assert one[0]["text"] != one[1]["text"]
    assert served.choices(ids, seed=9, n=2, max_tokens=30) == one
    assert [c["text"] for c in served.choices([ids, ids], seed=9, max_tokens=30)] == [one[0]["text"]] * 2
    styled = served.http.post("/v1/completions", json={"model": "tiny:bard", "prompt": "alas", "seed": 9}).json()
    assert styled["choices"] == served.choices("alas", style="bard", seed=9) != served.choices("alas", seed=9)


def test_without_a_seed_one_is_drawn_and_told(served):
    first, second = (served.post(max_tokens=40, n=4).json() for _ in range(2))
    assert first["choices"] != second["choices"]
    again = served.post(max_tokens=40, n=4, seed=first["seed"]).json()
    assert again["choices"] == first["choices"] and again["system_fingerprint"] == first["system_fingerprint"]


def test_without_a_seed_the_same_prompt_is_drawn_anew_each_time_and_with_one_it_is_not(served):
    keys = {"n": 2, "max_tokens": 40, "temperature": 2.0}
    drawn = served.post(["o romeo"] * 3, **keys).json()
    pairs = [[choice["text"] for choice in drawn["choices"][i : i + 2]] for i in (0, 2, 4)]
    assert pairs[0] != pairs[1] != pairs[2] != pairs[0]
    for i, pair in enumerate(pairs):  # each can be had again
        assert [choice["text"] for choice in served.choices(seed=drawn["seed"] + i, **keys)] == pair
    seeded = [choice["text"] for choice in served.choices(["o romeo"] * 3, seed=drawn["seed"], **keys)]
    assert seeded == pairs[0] * 3


def test_defaults_finish_reasons_and_usage(served):
    seed = next(i for i in range(99) if len(served.choices(seed=i, logprobs=0)[0]["logprobs"]["tokens"]) == 16)
    answer = served.post(seed=seed).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    expected = served.poet.write("o romeo", seed=seed, temperature=1.0, top_p=1.0, until="tokens", max_new_tokens=16)
    assert "o romeo" + choice["text"] == expected[0] and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 16, "total_tokens": 23}
    assert served.post("", max_tokens=1).json()["usage"]["prompt_tokens"] == 0
    letter = choice["text"].strip()[3]
    (stopped,) = served.choices(seed=seed, stop=letter)
    assert stopped["text"] == choice["text"].split(letter)[0] and stopped["finish_reason"] == "stop"
    ended = [c for c in served.choices(n=64, max_tokens=300, seed=2) if c["finish_reason"] == "stop"]
    assert ended and all(END not in c["text"] for c in ended)
    assert served.choices(max_tokens=0, echo=True)[0]["text"] == "o romeo"


def test_a_stream_has_the_same_text_and_log_probabilities(served):
    keys = {"max_tokens": 40, "seed": 6, "n": 3, "logprobs": 2, "echo": True, "temperature": 0.8}
    whole = served.post(**keys).json()
    events = served.events(**keys, stream=True, stream_options={"include_usage": True})
    *events, last = events
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert len(events) > 3 and all(event["usage"] is None for event in events)
    for choice in whole["choices"]:
        parts = [p for event in events for p in event["choices"] if p["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        for key, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][key]] == values


@pytest.mark.parametrize("style", ["", "alice", "alice:1,bard:3"])
def test_log_probabilities_are_the_full_forward_passs(served, style):
    poet, tok = served.poet, served.poet.tokenizer
    text = "the queen"
    (choice,) = served.choices(text, logprobs=5, echo=True, max_tokens=3, style=style, seed=1, temperature=2)
    told = choice["logprobs"]
    ids = tok.encode(text) + [
        {**{c: i for i, c in enumerate(tok.chars)}, **tok.specials}[t] for t in told["tokens"][9:]
    ]
    assert len(ids) == len(told["tokens"]) and "".join(told["tokens"]).replace(END, "") == choice["text"]
    blend = poet.blend_of(style) or {None: 1.0}
    mixed = 0
    for tag, share in blend.items():
        window = ids if tag is None else [tag, *ids]
        logits = poet.model(torch.tensor([window]), torch.tensor([window]))[0][0, :-1]
        mixed = mixed + share * logits.log_softmax(-1)
    expected = mixed.log_softmax(-1)
    assert (told["token_logprobs"][0] is None) == (style == "")
    start = 1 if style == "" else 0
    for row, id, logprob, top in zip(
        expected, ids[start:], told["token_logprobs"][start:], told["top_logprobs"][start:], strict=True
    ):
        assert math.isclose(row[id].item(), logprob, abs_tol=1e-9)
        assert sorted({*row.topk(5).values.tolist(), row[id].item()}) == pytest.approx(sorted(top.values()), abs=1e-9)
    assert told["text_offset"] == list(range(len(ids)))


def test_a_prompts_log_probabilities_need_its_whole_window(served):
    assert len(served.choices("a" * 16, echo=True, logprobs=0, max_tokens=1)[0]["logprobs"]["tokens"]) == 17
    assert len(served.choices("a" * 16, echo=True, logprobs=1, max_tokens=0)[0]["logprobs"]["tokens"]) == 16
    refused = served.post("a" * 17, echo=True, logprobs=1)
    assert refused.status_code == 400 and "reads at most 16" in refused.json()["error"]["message"]


# --- alone or in a crowd


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_has_the_same_bits_alone_or_in_a_crowd(tmp_path, kind, dtype):
    probes = [
        {"prompt": "o romeo", "max_tokens": 60, "seed": 1, "logprobs": 5, "echo": True},
        {"prompt": "the quick brown fox jumps", "max_tokens": 40, "seed": 2, "logprobs": 1, "top_p": 0.9},
        {"prompt": "a", "max_tokens": 50, "seed": 3, "logprobs": 0, "style": "bard:2,alice", "temperature": 0.7},
    ]
    crowd = [
        {"prompt": "x" * (1 + 3 * i), "max_tokens": 5 + 7 * i, "temperature": i % 4 / 2, "top_k": i % 5, "min_p": 0.01}
        for i in range(29)
    ]
    with Served(save_random(tmp_path / "best.pt", **KINDS[kind]), dtype, max_rows=33) as server:
        alone = [server.choices(**probe) for probe in probes]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            others = [pool.submit(server.choices, **keys) for keys in crowd]
            for _ in range(2):
                together = [pool.submit(server.choices, **probe) for probe in probes]
                assert [future.result() for future in together] == alone
            for other in others:
                other.result()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [32, 192, 320])
@pytest.mark.parametrize("kind", [KINDS["rotary"], LLAMA], ids=["rotary", "llama"])
def test_a_rows_logits_are_the_same_bits_in_any_company(dtype, width, kind):
    torch.manual_seed(1)
    shape = {"block_size": 64, "vocab_size": 501, "n_layer": 2, "n_head": 2, "n_embd": width}
    model = GPT(GPTConfig(**shape, **kind)).to(getattr(torch, dtype)).eval()
    prepack_matrices(model)
    texts = [torch.randint(501, (1 + 5 * i,)).tolist() for i in range(13)]

    def logits_of(company: list[int]) -> list[torch.Tensor]:
        rows, found = Rows(model, 16), []
        added = [rows.add(texts[i], None)[0] for i in company]
        for step in range(50):
            logits = rows.step()
            found.append(logits[added[0].place])
            for row in added:
                rows.push(row, (7 * step + texts[0][0]) % 501)
            if step == 20 and len(added) > 1:
                rows.drop(added.pop(1))  # the last one takes its place
        return found

    alone = logits_of([4])
    for company in ([4, 0], [4, 1, 2, 3], [4, 12, 11, 10, 9], [4, *range(4), *range(5, 13)]):
        assert all(torch.equal(a, b) for a, b in zip(alone, logits_of(company), strict=True))


@pytest.mark.slow
def test_a_text_has_the_same_bits_without_avx512():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", __file__, "-k", "same_bits and not without"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


# --- what is refused


def test_routes_and_wrong_ones(served):
    ids = [model["id"] for model in served.http.get("/v1/models").json()["data"]]
    assert ids == ["tiny", "tiny:alice", "tiny:bard"]
    assert served.http.get("/v1/models/tiny:alice").json()["id"] == "tiny:alice"
    assert served.http.get("/health").json()["status"] == "ok"
    wrong = {("GET", "/v1/completions"): 405, ("POST", "/v1/models"): 405, ("GET", "/x"): 404, ("POST", "/"): 405}
    page = served.http.get("/")
    if served.poet.model.config.norm == "rmsnorm":
        assert page.status_code == 404  # a page can't compute a Llama
        wrong["POST", "/"] = 404
    else:
        assert page.headers["content-type"].startswith("text/html") and "<title>Alice and Bard</title>" in page.text
    for (method, place), status in {**wrong, ("GET", "/v1/models/x"): 404}.items():
        answer = served.http.request(method, place)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert model_name("out/mine/best.pt") == "mine" and model_name("openai/gpt2") == "gpt2"


@pytest.mark.parametrize(
    "keys, param, said",
    [
        ({"foo": 1}, "foo", "unknown field `foo`"),
        ({"max_new_tokens": 1}, "max_new_tokens", "unknown field"),
        ({"max_copy": 2}, "max_copy", "found 2"),
        ({"max_copy": 8}, None, "does not say which text it was trained on"),
        ({"temperature": -1}, "temperature", "found -1"),
        ({"temperature": "hot"}, "temperature", "got `str`"),
        ({"top_p": 0}, "top_p", "found 0"),
        ({"top_k": -2}, "top_k", "found -2"),
        ({"n": 0}, "n", "found 0"),
        ({"n": 10**9}, "n", "found 1,000,000,000"),
        ({"max_tokens": -1}, "max_tokens", "found -1"),
        ({"max_tokens": 10**7}, "max_tokens", "at most 4,096"),
        ({"logprobs": 6}, "logprobs", "at most 5"),
        ({"seed": -1}, "seed", "found -1"),
        ({"stop": [""]}, "stop", "must not be empty"),
        ({"stop": ["a"] * 21}, "stop", "at most 20"),
        ({"until": "noon"}, "until", "noon"),
        ({"style": "bob"}, "style", "must be one of the model's: alice, bard"),
        ({"model": "tiny:bard", "style": "alice"}, "style", "give one"),
        ({"prompt": None}, "prompt", "must be a text"),
        ({"prompt": "<|bard|>alas"}, "prompt", "begins with <|bard|>"),
        ({"prompt": []}, "prompt", "must be a text"),
        ({"prompt": ["a", 1]}, "prompt", "must be a text"),
        ({"prompt": [33]}, "prompt", "token ids from 0 to 32"),
        ({"prompt": [-1]}, "prompt", "token ids from 0 to 32"),
        ({"prompt": [[]]}, "prompt", "token ids from 0 to 32"),
        ({"prompt": {"a": 1}}, "prompt", "got `object`"),
        ({"prompt": "a" * 20_000}, "prompt", "at most 16,384"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
        ({"prompt": ["a", "b"], "n": 65}, "prompt", "at most 128"),
        ({"suffix": "x"}, "suffix", "does not have it"),
        ({"best_of": 3}, "best_of", "does not have it"),
        ({"logit_bias": {"33": 2}}, "logit_bias", "from 0 to 32"),
        ({"logit_bias": {"a": 2}}, "logit_bias", "got `str`"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "at most 100"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias", "at most 300"),
        ({"presence_penalty": 2.1}, "presence_penalty", "at most 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "at least -2"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "x", "unknown field"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_key_is_refused_by_name(served, keys, param, said):
    answer = served.http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **keys})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and said in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    "keys", [{"presence_penalty": 2.0, "frequency_penalty": 0.7}, {"frequency_penalty": -1.0}, {"logit_bias": {"9": 9}}]
)
def test_penalties_and_biases_are_those_of_a_loop_over_full_forward_passes(served, keys):
    poet, ids, first = served.poet, served.poet.tokenizer.encode("o romeo"), 7
    while len(ids) < 16:
        logits = poet.model(torch.tensor([ids]))[0][0, -1]
        for id in range(len(logits)):
            count = ids[first:].count(id)
            logits[id] -= keys.get("frequency_penalty", 0) * count + keys.get("presence_penalty", 0) * (count > 0)
            logits[id] += keys.get("logit_bias", {}).get(str(id), 0)
        logits[poet.forbidden] = -math.inf
        ids.append(int(logits.argmax()))
    found = [served.choices(max_tokens=9, temperature=0, **more)[0]["text"] for more in (keys, {})]
    assert found[0] == poet.tokenizer.decode_bytes(ids[first:]).decode() != found[1]
    assert [choice["text"] for choice in served.choices(max_tokens=9, temperature=0, n=2, **keys)] == found[:1] * 2


def test_neutral_values_are_taken(served):
    neutral = {"suffix": None, "best_of": 1, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}
    nothing = dict.fromkeys("max_tokens n stop seed stream logprobs echo temperature top_p style until".split())
    assert len(served.choices("a", **neutral | nothing, user="me", top_k=-1)) == 1
    assert len(served.choices("a", n=2, best_of=2)) == 2


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"[" * 50_000, b'{"a":' * 50_000, b'{"model": "tiny", "prompt": "\xff"}',
             b'{"model": "tiny", "prompt": "\\ud800"}', b'{"prompt": "a"}', b'{"model": "gpt-4", "prompt": "a"}']
)  # fmt: skip
def test_what_is_no_request_is_refused(served, body):
    answer = served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"]
    assert served.choices("a")
