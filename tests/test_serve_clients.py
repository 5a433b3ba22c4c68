"""What clients do to a server: leave, dawdle, flood it, and send what is no request."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import socket
import sys
import time

import pytest
import torch
from conftest import save_random
from served import HEAD, Served, endless, rest_of, wait_until

from bench.storm import storm
from robopoet.errors import ConfigError
from robopoet.serving import api as apis
from robopoet.serving import engine as engines
from robopoet.serving.api import Completion
from robopoet.serving.protocol import read_request
from robopoet.writing.decode import Rows
from robopoet.writing.healing import Prompt
from robopoet.writing.passage import Passage
from robopoet.writing.poet import Poet
from serve import ServeConfig, make_server

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module", params=["learned", "rotary"])
def served(request, tmp_path_factory):
    path = save_random(tmp_path_factory.mktemp("served") / "best.pt", positions=request.param)
    with Served(path, client_s=5.0) as server:
        yield server


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("bounded") / "best.pt", positions="rotary")


def test_a_storm_is_answered_rightly_or_refused(served):
    found = asyncio.run(storm(served.port, "tiny", ["o romeo", "alas poor yorick " * 3, "a"], 100, 25))
    assert found["wrong"] == [] and sum(found["well"].values()) == 100 and len(found["well"]) == 4
    wait_until(lambda: served.http.get("/health").json() | {"max_rows": 0} == {
        "status": "ok", "requests": 0, "rows": 0, "max_rows": 0})  # fmt: skip


def test_a_stream_ends_with_its_text_however_far_apart_its_events_are(served, monkeypatch):
    (expected,) = served.choices(max_tokens=40, seed=2)
    monkeypatch.setattr(apis, "EVENT_S", 1e6)
    monkeypatch.setattr(engines, "TELL_S", 1e6)
    events = served.events(max_tokens=40, seed=2, stream=True)
    assert len(events) <= 3  # the first token, what came while it was sent, and the rest
    assert "".join(event["choices"][0]["text"] for event in events) == expected["text"]


def test_a_stream_ends_once_where_its_texts_are_whole_before_its_head_is_sent(served):
    asked = {"model": "tiny", "prompt": "a", "echo": True, "max_tokens": 3, "stream": True}
    reply, sent = read_request(json.dumps(asked).encode(), served.poet, "tiny", served.api.limits), []

    async def send(message):
        sent.append(message.get("body", b""))
        while not reply.is_done:
            await asyncio.sleep(0.001)

    served.api.requests += 1
    asyncio.run(Completion(served.api, reply, time.perf_counter())({}, asyncio.Event().wait, send))
    assert b"".join(sent).count(b"data: [DONE]") == 1 and sent[-1].endswith(b"data: [DONE]\n\n")


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
    engine = engines.Engine(poet, 4)
    gained, prompt = [], Prompt("a", [1, 2, 3], [1, 2, 3])
    settings = dataclasses.replace(Passage(poet.tokenizer, engines.Settings()).settings, until="tokens")
    engine.loop = type("Loop", (), {"is_closed": lambda self: True})()
    choices = [engines.Choice(prompt, settings, i, 300, None, False, gained.append) for i in range(2)]
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


def test_a_client_that_leaves_before_its_request_has_arrived_is_no_failure(served, capfd):
    served.raw(HEAD + b"content-length: 100\r\n\r\n{").close()
    wait_until(lambda: " 400 in " in capfd.readouterr().err)


def test_a_client_that_sends_too_much_reads_why_when_it_has_sent_it(path):
    with Served(path, max_body=2000) as server:
        client = server.raw(HEAD + b"content-length: 6000\r\n\r\n")
        for _ in range(6):
            time.sleep(0.02)
            client.sendall(b"a" * 1000)
        assert b"request: has over 2,000 bytes" in rest_of(client)


def test_a_body_of_just_the_limit_is_read(path):
    with Served(path, max_body=200) as server:
        for size, status in ((200, 200), (201, 413)):
            body = server.request(max_tokens=1).partition(b"\r\n\r\n")[2].ljust(size)
            assert server.http.post("/v1/completions", content=body, headers=JSON).status_code == status


def test_refused_requests_do_not_count_as_running(path):
    with Served(path) as server:
        assert server.post(max_tokens=-1).status_code == 400
        assert server.http.get("/health").json()["requests"] == 0


def test_bounds_refuse_in_form(path):
    with Served(path, max_rows=1, max_waiting=1, max_body=2000, request_s=1.0, max_tokens=10**6) as server:
        endless(server)
        assert server.post("a" * 3000).status_code == 413
        assert "number of styles: found 2" in server.post(style="alice,bard").json()["error"]["message"]
        chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n"
        client = server.raw(chunked + b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(8):
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
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)  # else it takes megabytes to fill
        endless(server)
        silent, slow = server.raw(b""), server.raw(b"POST /v1/completions HTTP/1.1\r\nhost")
        body = server.raw(HEAD + b"content-length: 50\r\n\r\n{")
        assert silent.recv(100) == slow.recv(100) == b""
        assert body.recv(100).startswith(b"HTTP/1.1 408")
        large = server.raw(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                large.sendall(b"x: " + b"y" * 10_000 + b"\r\n")
        with contextlib.suppress(ConnectionError):
            assert b"is too long" in large.recv(1000)
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
    lines = []  # a line of an earlier test may come late

    def ours() -> list[str]:
        lines.extend(capfd.readouterr().err.splitlines())
        return [line for line in lines if "9 tokens read" in line or "GET /v1/models" in line]

    wait_until(lambda: len(ours()) == 2)
    line = next(line for line in ours() if "POST" in line)
    assert "POST /v1/completions 200 in" in line and "9 tokens read, 3 generated" in line
    assert not any("secret" in line for line in lines)


def test_config_problems_are_named(path):
    assert ServeConfig(name="a:b", port=-1, max_rows=0, client_s=-1).problems() != []
    assert ServeConfig().problems() == []


def test_a_missing_package_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"serve\.py needs uvicorn: pip install"):
        make_server(ServeConfig(), Poet(str(path), "cpu", "float32"))


def test_the_servers_end_cuts_requests_with_an_error_and_no_traceback(path, capfd):
    with Served(path, grace_s=0.3, client_s=30.0, max_tokens=10**6) as server:
        endless(server)
        streams = [server.raw(server.request(max_tokens=10**6, stream=True)) for _ in range(4)]
        wholes = [server.raw(server.request(max_tokens=10**6, n=8)) for _ in range(4)]
        half = server.raw(server.request()[:-5])
        wait_until(lambda: server.api.requests == 8 and all(hasattr(text, "passage") for text in server.engine.running))
        assert all(client.recv(100).startswith(b"HTTP/1.1 200") for client in streams)
    for client in (*wholes, half):
        head, _, body = rest_of(client).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") and json.loads(body)["error"]["type"] == "server_error"
    for client in streams:
        rest = rest_of(client)
        assert b'data: {"error":{"message":"the server ends' in rest and rest.endswith(b"\r\n0\r\n\r\n")
    assert "Traceback" not in capfd.readouterr().err
