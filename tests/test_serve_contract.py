"""What vLLM and llama.cpp ask of their own servers, asked of ours: streams, log-probabilities, chats, refusals."""

import json
from collections import Counter

import pytest
from conftest import save_random
from served import Served
from test_chat import ask
from test_serve_clients import JSON

DOORS = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    path = save_random(tmp_path_factory.mktemp("contract") / "best.pt", positions="rotary")
    with Served(path, client_s=5.0) as server:
        yield server


def body(place, **keys):
    said = {"prompt": "the queen"} if place == DOORS[0] else {"messages": [{"role": "user", "content": "the queen"}]}
    return {"model": "tiny", **said, **keys}


def stream(server, place, **keys):
    with server.http.stream("POST", place, json=body(place, stream=True, **keys)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


# --- streams


@pytest.mark.parametrize("place", DOORS)
def test_a_streams_events_are_of_one_answer_and_each_choice_ends_once(served, place):
    events = stream(served, place, n=3, seed=1, max_tokens=30)
    for key in ("id", "object", "created", "model", "system_fingerprint"):
        assert len({event[key] for event in events}) == 1
    assert all(len(event["choices"]) == 1 and "usage" not in event for event in events)
    choices = [choice for event in events for choice in event["choices"]]
    ends = Counter(choice["index"] for choice in choices if choice["finish_reason"])
    assert ends == {0: 1, 1: 1, 2: 1}
    last = {choice["index"]: choice["finish_reason"] for choice in choices}
    assert all(last.values())  # nothing comes behind an end


def test_a_streams_texts_of_two_prompts_are_those_of_the_whole_answer(served):
    keys = {"prompt": [[1, 2, 3], [5, 6, 7]], "seed": 3, "max_tokens": 20, "n": 2}
    whole = [choice["text"] for choice in served.http.post(DOORS[0], json=body(DOORS[0], **keys)).json()["choices"]]
    texts = dict.fromkeys(range(4), "")
    for event in stream(served, DOORS[0], **keys):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert [*texts.values()] == whole


def test_tokens_and_offsets_are_not_held_back_or_cut_with_the_text_that_a_stop_may_end(served):
    keys = {"seed": 6, "max_tokens": 40, "logprobs": 0}
    plain = served.choices("the queen", **keys)[0]
    stop = plain["text"][9:11]
    whole = served.choices("the queen", **keys, stop=[stop, "qqq"])[0]
    parts = [event["choices"][0] for event in stream(served, DOORS[0], **keys, stop=[stop, "qqq"])]
    assert "".join(part["text"] for part in parts) == whole["text"] == plain["text"].partition(stop)[0]
    for key, values in whole["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][key]] == values
        assert plain["logprobs"][key][: len(values)] == values
    told = whole["logprobs"]
    assert [
        plain["text"][at:][: len(token)] for at, token in zip(told["text_offset"], told["tokens"], strict=True)
    ] == (told["tokens"])


# --- log-probabilities


@pytest.mark.parametrize("asked", [0, 1, 5])
@pytest.mark.parametrize("prompt", ["the queen", [3, 4, 5, 6]], ids=str)
def test_an_echo_tells_the_prompts_tokens_too(served, prompt, asked):
    choice = served.choices(prompt, echo=True, logprobs=asked, max_tokens=5, seed=1)[0]
    told = choice["logprobs"]
    text = prompt if isinstance(prompt, str) else served.poet.tokenizer.decode_bytes(prompt).decode()
    assert choice["text"].startswith(text) and "".join(told["tokens"][: len(prompt)]) == text
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    for token, logprob, top in zip(
        *([*told[key]][1:] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert logprob <= 0 and top[token] == logprob
        assert max(asked, 1) <= len(top) <= asked + 1 and max(top.values()) == max([logprob, *top.values()])


@pytest.mark.parametrize("asked", [0, 1, 20])
def test_a_chats_tokens_make_its_text(served, asked):
    keys = {"logprobs": True, "top_logprobs": asked, "temperature": 0, "max_tokens": 9, "until": "tokens"}
    [choice] = ask(served, "the queen", **keys).json()["choices"]
    told = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in told if token["bytes"]) == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == asked and token["logprob"] <= 0 for token in told)
    if asked:  # the likeliest comes first, and is the one that was taken
        assert [token["top_logprobs"][0]["token"] for token in told] == [token["token"] for token in told]
    assert ask(served, "a", max_tokens=2).json()["choices"][0]["logprobs"] is None


# --- chats


def test_an_answer_may_be_sent_back_with_all_that_it_has(served):
    said = [{"role": "user", "content": "the queen"}]
    [choice] = ask(served, messages=said, seed=1, max_tokens=9).json()["choices"]
    said += [choice["message"] | {"annotations": []}, {"role": "user", "content": "and", "extra_field": "0"}]
    again = ask(served, messages=said, seed=2, max_tokens=9)
    assert again.status_code == 200
    plain = [{"role": turn["role"], "content": turn["content"]} for turn in said]
    assert again.json()["choices"] == ask(served, messages=plain, seed=2, max_tokens=9).json()["choices"]


def test_a_content_in_parts_is_their_text(served):
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "queen", "cache_control": {}}]
    answers = [ask(served, content, seed=1).json() for content in (parts, "the queen")]
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"] == answers[1]["usage"]


# --- what is refused, and that the server lives


@pytest.mark.parametrize(
    "messages",
    [None, "a", [1], [{}], [{"role": 1}], [{"role": "user", "content": 1}], [{"role": "user", "content": "a"}, {}]],
    ids=str,
)
def test_messages_that_are_none_are_refused(served, messages):
    answer = ask(served, messages=messages)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"


@pytest.mark.parametrize("sent", [b"", b"not json{", b'["a"]', b"42", b"null", b'"a"'])
@pytest.mark.parametrize("place", DOORS)
def test_a_body_that_is_no_object_is_refused(served, place, sent):
    answer = served.http.post(place, content=sent, headers=JSON)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("place", DOORS)
@pytest.mark.parametrize(
    ("keys", "param"),
    [
        ({"seed": -(2**63) - 1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"grammar": "root ::= 'a'"}, "grammar"),
    ],
    ids=str,
)
def test_what_is_out_of_range_or_not_ours_is_refused_by_name(served, place, keys, param):
    answer = served.http.post(place, json=body(place, **keys))
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize("key", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [0, -1, 10**6])
def test_a_chats_limit_is_at_least_a_token_and_at_most_the_servers(served, key, value):
    error = ask(served, "a", **{key: value}).json()["error"]
    assert error["param"] == key and error["message"] == f"{key}: found {value:,}, must be at least 1 and at most 4,096"


def test_a_dead_engine_is_told(tmp_path):
    with Served(save_random(tmp_path / "best.pt")) as server:
        server.engine.stop()
        answer = server.http.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
