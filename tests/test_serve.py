"""The server: its texts against Poet, its log-probabilities against the full forward pass."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from conftest import REPO

from bench.storm import storm
from configurator import ConfigError
from model import GPT, GPTConfig
from robopoet.serving import engine as engines
from robopoet.serving.rows import Rows
from robopoet.text.tokenizer import END, CharTokenizer
from robopoet.weights import checkpoint
from robopoet.writing.generate import prepack
from robopoet.writing.passage import Passage
from robopoet.writing.poet import Poet
from serve import ServeConfig, make_server, model_name

PATIENCE_S = 60


def make_checkpoint(folder, positions: str):
    """Random weights large enough that the text varies."""
    torch.manual_seed(3)
    tok = CharTokenizer("\n !abcdefghijklmnopqrstuvwxyz", [END, "<|alice|>", "<|bard|>", "<|unk|>"])
    shape = {"block_size": 16, "vocab_size": tok.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**shape, positions=positions))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)
    path = folder / "best.pt"
    checkpoint.save(path, {**checkpoint.model_entries(model), "tokenizer": tok.to_json()})
    return path


class Served:
    """A server in a thread of this process."""

    def __init__(self, path, dtype="float64", **keys):
        self.poet = Poet(str(path), "cpu", dtype)
        self.server = make_server(self.poet, ServeConfig(checkpoint=str(path), name="tiny", port=0, **keys))
        self.engine = self.server.config.app.app.router.lifespan_context.__self__.engine

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=PATIENCE_S)
        return self

    def __exit__(self, *raised):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()

    def post(self, prompt="o romeo", **keys):
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": prompt} | keys)

    def choices(self, prompt="o romeo", **keys):
        answer = self.post(prompt, **keys)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    def events(self, prompt="o romeo", **keys):
        with self.http.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": prompt, **keys}) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines[:-1]]

    def raw(self, sent: bytes) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.port))
        client.settimeout(PATIENCE_S)
        client.sendall(sent)
        return client

    def request(self, **keys) -> bytes:
        body = json.dumps({"model": "tiny", "prompt": "o romeo"} | keys).encode()
        return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)


def wait_until(holds):
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


@pytest.fixture(scope="module", params=["learned", "rotary"])
def served(request, tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("served"), request.param)
    with Served(path, client_s=5.0) as server:
        yield server


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("bounded"), "rotary")


def endless(server):
    """Let no text end by itself."""
    server.poet.forbidden = torch.tensor(list(server.poet.tokenizer.specials.values()))
    return server


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
    first, second = (served.post(max_tokens=40).json() for _ in range(2))
    assert first["choices"] != second["choices"]
    again = served.post(max_tokens=40, seed=first["seed"]).json()
    assert again["choices"] == first["choices"] and again["system_fingerprint"] == first["system_fingerprint"]


def test_defaults_finish_reasons_and_usage(served):
    seed = next(i for i in range(99) if len(served.choices(seed=i, logprobs=0)[0]["logprobs"]["tokens"]) == 16)
    answer = served.post(seed=seed).json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    expected = served.poet.write("o romeo", seed=seed, temperature=1.0, top_p=1.0, until="tokens", max_new_tokens=16)
    assert "o romeo" + choice["text"] == expected[0] and choice["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 16, "total_tokens": 23}
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
    assert len(events) > 9 and all(event["usage"] is None for event in events)
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


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_has_the_same_bits_alone_or_in_a_crowd(tmp_path, positions, dtype):
    probes = [
        {"prompt": "o romeo", "max_tokens": 60, "seed": 1, "logprobs": 5, "echo": True},
        {"prompt": "the quick brown fox jumps", "max_tokens": 40, "seed": 2, "logprobs": 1, "top_p": 0.9},
        {"prompt": "a", "max_tokens": 50, "seed": 3, "logprobs": 0, "style": "bard:2,alice", "temperature": 0.7},
    ]
    crowd = [
        {"prompt": "x" * (1 + 3 * i), "max_tokens": 5 + 7 * i, "temperature": i % 4 / 2, "top_k": i % 5, "min_p": 0.01}
        for i in range(29)
    ]
    with Served(make_checkpoint(tmp_path, positions), dtype, max_rows=33) as server:
        alone = [server.choices(**probe) for probe in probes]
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            others = [pool.submit(server.choices, **keys) for keys in crowd]
            for _ in range(3):
                together = [pool.submit(server.choices, **probe) for probe in probes]
                assert [future.result() for future in together] == alone
            for other in others:
                other.result()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [32, 192, 320])
def test_a_rows_logits_are_the_same_bits_in_any_company(dtype, width):
    torch.manual_seed(1)
    shape = {"block_size": 96, "vocab_size": 501, "n_layer": 2, "n_head": 2, "n_embd": width}
    model = GPT(GPTConfig(**shape, positions="rotary")).to(getattr(torch, dtype)).eval()
    prepack(model)
    texts = [torch.randint(501, (1 + 5 * i,)).tolist() for i in range(13)]

    def logits_of(company: list[int]) -> list[torch.Tensor]:
        rows, found = Rows(model, 16, 400), []
        added = [rows.add(texts[i], None)[0] for i in company]
        for step in range(100):
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
    wrong = {("GET", "/v1/completions"): 405, ("POST", "/v1/models"): 405, ("GET", "/x"): 404, ("GET", "/"): 404}
    for (method, place), status in {**wrong, ("GET", "/v1/models/x"): 404}.items():
        answer = served.http.request(method, place)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert model_name("out/mine/best.pt") == "mine" and model_name("openai/gpt2") == "gpt2"


@pytest.mark.parametrize(
    "keys, param, said",
    [
        ({"foo": 1}, "foo", "unknown field `foo`"),
        ({"max_new_tokens": 1}, "max_new_tokens", "unknown field"),
        ({"temperature": -1}, "temperature", "found -1"),
        ({"temperature": "hot"}, "temperature", "got `str`"),
        ({"top_p": 0}, "top_p", "found 0"),
        ({"top_k": -1}, "top_k", "found -1"),
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
        ({"logit_bias": {"1": 2}}, "logit_bias", "does not have it"),
        ({"presence_penalty": 0.1}, "presence_penalty", "does not have it"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "does not have it"),
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


def test_neutral_values_are_taken(served):
    neutral = {"suffix": None, "best_of": 1, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}
    nothing = dict.fromkeys("max_tokens n stop seed stream logprobs echo temperature top_p style until".split())
    assert len(served.choices("a", **neutral | nothing, user="me")) == 1
    assert len(served.choices("a", n=2, best_of=2)) == 2


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"[" * 50_000, b'{"a":' * 50_000, b'{"model": "tiny", "prompt": "\xff"}',
             b'{"model": "tiny", "prompt": "\\ud800"}', b'{"prompt": "a"}', b'{"model": "gpt-4", "prompt": "a"}']
)  # fmt: skip
def test_what_is_no_request_is_refused(served, body):
    answer = served.http.post("/v1/completions", content=body)
    assert answer.status_code in (400, 404) and answer.json()["error"]["message"]
    assert served.choices("a")


# --- what clients do to a server


def test_a_storm_is_answered_rightly_or_refused(served):
    found = asyncio.run(storm(served.port, "tiny", ["o romeo", "alas poor yorick " * 3, "a"], 200, 25))
    assert found["wrong"] == [] and sum(found["well"].values()) == 200 and len(found["well"]) == 4
    wait_until(lambda: served.http.get("/health").json() | {"max_rows": 0} == {
        "status": "ok", "requests": 0, "rows": 0, "max_rows": 0})  # fmt: skip


def test_a_client_that_leaves_frees_its_row_and_the_others_go_on(path):
    with Served(path, max_tokens=10**6) as server:
        endless(server)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            other = pool.submit(server.choices, seed=1, max_tokens=2000)
            client = server.raw(server.request(max_tokens=10**6, stream=True))
            silent = server.raw(server.request(max_tokens=10**6))
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            wait_until(lambda: len(server.engine.rows.rows) >= 2)
            client.close()
            silent.close()
            assert len(other.result()[0]["text"]) == 2000
        wait_until(lambda: not server.engine.rows.rows and not server.engine.running)
        assert server.choices(seed=1, max_tokens=20)


def test_a_cancelled_text_is_gone_after_one_step(path):
    poet = Poet(str(path), "cpu", "float64")
    engine = engines.Engine(poet, 4, 1000)
    gained = []
    settings = dataclasses.replace(Passage(poet.tokenizer, engines.Settings()).settings, until="tokens")
    engine.loop = type("Loop", (), {"is_closed": lambda self: True})()
    choices = [engines.Choice([1, 2, 3], "a", settings, i, 300, None, False, gained.append) for i in range(2)]
    for choice in choices:
        choice.weights = torch.tensor([1.0])
    engine.inbox.put(choices)
    with torch.inference_mode():
        for _ in range(3):
            engine._receive(), engine._admit(), engine._step()
        assert len(engine.rows.rows) == 2
        engine.cancel(choices[:1])
        engine._receive()
        assert len(engine.rows.rows) == 1 and engine.running == choices[1:]


def test_an_error_in_one_text_or_step_stops_no_other(served, monkeypatch, capfd):
    push = Passage.push

    def failing(self, id, logprob=None):
        if self.prompt == "boom":
            raise RuntimeError("boom")
        return push(self, id, logprob)

    alone = served.choices("alas", seed=9, max_tokens=60)
    monkeypatch.setattr(Passage, "push", failing)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        good = [pool.submit(served.choices, "alas", seed=9, max_tokens=60) for _ in range(4)]
        bad = [pool.submit(served.post, "boom") for _ in range(4)]
        assert all(future.result() == alone for future in good)
        assert {future.result().status_code for future in bad} == {500}
    assert bad[0].result().json()["error"]["type"] == "server_error"
    with served.http.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": "boom", "stream": True}) as e:
        assert "server_error" in e.read().decode()
    step = Rows.step
    monkeypatch.setattr(Rows, "step", lambda self: 1 / 0)
    assert served.post("alas").status_code == 500
    monkeypatch.setattr(Rows, "step", step)
    assert served.choices("alas", seed=9, max_tokens=60) == alone
    assert "boom" in capfd.readouterr().err


def test_bounds_refuse_in_form(path):
    with Served(path, max_rows=1, max_waiting=1, max_body=2000, request_s=1.0, max_tokens=10**6) as server:
        endless(server)
        assert server.post("a" * 3000).status_code == 413
        chunked = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        client = server.raw(chunked + b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(3):
                client.sendall(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 413")
        clients = [server.raw(server.request(max_tokens=10**6)) for _ in range(2)]
        wait_until(lambda: server.http.get("/health").json()["requests"] == 2)
        busy = server.post()
        assert busy.status_code == 429 and busy.headers["retry-after"] == "1"
        assert busy.json()["error"]["type"] == "rate_limit_error"
        assert [client.recv(100)[:12] for client in clients] == [b"HTTP/1.1 504"] * 2  # each had a second
        with server.http.stream(
            "POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True, "max_tokens": 10**6}
        ) as late:
            assert "took over 1 s" in late.read().decode().splitlines()[-2]
        wait_until(lambda: not server.engine.rows.rows)


def test_clients_that_dawdle_are_cut_and_hold_no_row(path):
    with Served(path, client_s=0.3, max_tokens=10**6) as server:
        endless(server)
        silent, slow = server.raw(b""), server.raw(b"POST /v1/completions HTTP/1.1\r\nhost")
        body = server.raw(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        assert silent.recv(100) == slow.recv(100) == b""
        assert body.recv(100).startswith(b"HTTP/1.1 408")
        large = server.raw(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                large.sendall(b"x: " + b"y" * 10_000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"the headers have over" in large.recv(1000)
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(server.request(max_tokens=10**6, stream=True, logprobs=5))
        wait_until(lambda: len(server.engine.rows.rows) == 1)
        wait_until(lambda: not server.engine.rows.rows)  # it reads nothing
        assert server.raw(b"\x00\x01\r\n\r\n").recv(100).startswith(b"HTTP/1.1 400")
        assert server.choices(max_tokens=5)


def test_the_log_has_a_line_for_each_request_and_no_prompt(served, capfd):
    served.post("my secret", max_tokens=3, seed=1)
    served.http.get("/v1/models")
    wait_until(lambda: True)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "POST /v1/completions 200 in" in lines[0] and "9 tokens read, 3 generated" in lines[0]
    assert not any("secret" in line for line in lines)


def test_config_problems_are_named(path):
    assert ServeConfig(name="a:b", port=-1, max_rows=0, client_s=-1).problems() != []
    assert ServeConfig().problems() == []


def test_a_missing_package_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"serve\.py needs uvicorn: pip install"):
        make_server(Poet(str(path), "cpu", "float32"), ServeConfig())
