"""What the server tells of itself: /metrics, counted anew from what clients were sent, and /health."""

import os
import random
import signal
import socket
import threading

import httpx
import pytest
from conftest import save_random
from served import PATIENCE_S, Served, endless, wait_until

import serve
from robopoet.serving.metrics import Histogram, Tally
from robopoet.writing.poet import Poet
from serve import ServeConfig


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("counted") / "best.pt", positions="rotary")


def told(server) -> dict[str, float]:
    """Each sample of /metrics."""
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def requests(found: dict[str, float]) -> dict[tuple[str, str], float]:
    """How many requests were answered: (route, status) -> number."""
    return {tuple(name.split('"')[1::2]): n for name, n in found.items() if name.startswith("robopoet_requests_total")}


def test_what_is_counted_is_what_clients_were_sent(path, capfd):
    with Served(path) as server:
        answers = [server.post(n=2, max_tokens=9, seed=i).json() for i in range(3)]
        said = {"model": "tiny", "messages": [{"role": "user", "content": "alas"}], "max_tokens": 5, "seed": 1}
        answers.append(server.http.post("/v1/chat/completions", json=said).json())
        *_, last = server.events(stream=True, stream_options={"include_usage": True}, max_tokens=7)
        answers.append(last)
        server.post(n=0), server.http.get("/v1/models"), server.http.get("/x/y"), server.http.get("/health")
        server.http.get("/health", headers={"origin": "https://evil.example"})
        found = told(server)
        assert requests(found) == {
            ("completions", "200"): 4,
            ("completions", "400"): 1,
            ("chat", "200"): 1,
            ("models", "200"): 1,
            ("health", "200"): 1,
            ("none", "404"): 1,
            ("none", "403"): 1,
        }
        for kind, key in (("prompt", "prompt_tokens"), ("generated", "completion_tokens")):
            assert found[f"robopoet_{kind}_tokens_total"] == sum(answer["usage"][key] for answer in answers)
        for name in ("first_token", "request"):
            assert found[f"robopoet_{name}_seconds_count"] == len(answers)
        assert 0 < found["robopoet_first_token_seconds_sum"] < found["robopoet_request_seconds_sum"]
        assert requests(told(server))["metrics", "200"] == 1
    assert ", left" not in capfd.readouterr().err


def test_what_runs_and_what_waits_is_told(path):
    with Served(path, max_rows=2, max_tokens=10**6) as server:
        endless(server)
        gauges = {f"robopoet_{name}": 0 for name in ("requests_running", "requests_waiting", "rows")}
        idle = gauges | {"robopoet_max_rows": 2}
        assert told(server).items() >= idle.items()
        clients = [server.raw(server.request(max_tokens=10**6, stream=True)) for _ in range(3)]
        busy = dict(zip(idle, (3, 1, 2, 2), strict=True))
        wait_until(lambda: told(server).items() >= busy.items())
        started = told(server)["robopoet_generated_tokens_total"]
        wait_until(lambda: told(server)["robopoet_generated_tokens_total"] > started)  # while they run
        for client in clients:
            client.close()
        wait_until(lambda: told(server).items() >= idle.items())
        found = told(server)
        assert requests(found)["completions", "200"] == 3
        assert found["robopoet_request_seconds_count"] == 0 < found["robopoet_first_token_seconds_count"]


def test_prometheus_own_parser_reads_what_was_counted(path):
    parser = pytest.importorskip("prometheus_client.parser")
    with Served(path) as server:
        server.post(max_tokens=4)
        families = {
            family.name: family for family in parser.text_string_to_metric_families(server.http.get("/metrics").text)
        }
    kinds = {name: family.type for name, family in families.items()}
    assert kinds == {
        "robopoet_requests": "counter",
        "robopoet_prompt_tokens": "counter",
        "robopoet_generated_tokens": "counter",
        "robopoet_requests_running": "gauge",
        "robopoet_requests_waiting": "gauge",
        "robopoet_rows": "gauge",
        "robopoet_max_rows": "gauge",
        "robopoet_first_token_seconds": "histogram",
        "robopoet_request_seconds": "histogram",
    }
    assert all(family.documentation for family in families.values())
    (sample,) = families["robopoet_requests"].samples
    assert sample.labels == {"route": "completions", "status": "200"} and sample.value == 1
    assert {s.name.rpartition("_")[2] for s in families["robopoet_request_seconds"].samples} == {
        "bucket",
        "sum",
        "count",
    }


def test_a_buckets_count_is_of_all_values_up_to_its_bound():
    bounds, rng, tally = (0.1, 0.5, 1.0, 2.5), random.Random(1), Tally()
    values = [*bounds, 0.0, 9.0, *(3 * rng.random() for _ in range(200))]
    tally.request_s = Histogram(bounds)
    for value in values:
        tally.request_s.observe(value)
    lines = [line.rpartition(" ") for line in tally.text().decode().splitlines() if "request_seconds" in line]
    found = {name.removeprefix("robopoet_request_seconds"): float(n) for name, _, n in lines if name[0] != "#"}
    expected = {f'_bucket{{le="{bound}"}}': sum(value <= bound for value in values) for bound in bounds}
    expected |= {'_bucket{le="+Inf"}': len(values), "_count": len(values), "_sum": pytest.approx(sum(values))}
    assert found == expected


# --- before a model is there, and while the server ends


def health(port: int) -> tuple[int, str]:
    """The status of GET /health, of its answer and in it; 0 where there is no answer."""
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=PATIENCE_S)
        return answer.status_code, answer.json()["status"]
    except httpx.TransportError:  # cut off between the one that stands in and the server
        return 0, ""


def test_a_server_whose_model_is_loading_says_so_and_then_serves(path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    may_load, url, seen = threading.Event(), f"http://127.0.0.1:{port}/v1", {}

    def load(*given):
        seen["loader"] = threading.current_thread()
        assert may_load.wait(PATIENCE_S)
        return Poet(*given)

    def look():
        wait_until(lambda: health(port)[0])
        seen["loading"] = health(port)
        seen["locked"] = httpx.get(f"{url}/models").status_code
        seen["refused"] = httpx.post(f"{url}/completions", json={}, headers=key)
        may_load.set()
        wait_until(lambda: health(port)[0] == 200)
        seen["models"] = httpx.get(f"{url}/models", headers=key).status_code
        seen["computes"] = seen["loader"].is_alive()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(serve, "Poet", load)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    key, looking = {"authorization": "Bearer k"}, threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        serve.main(ServeConfig(checkpoint=str(path), port=port, api_key="k", device="cpu", dtype="float32"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    looking.join()
    assert (seen["loading"], seen["locked"], seen["models"]) == ((503, "loading"), 401, 200)
    assert seen["refused"].status_code == 503 and seen["refused"].headers["retry-after"] == "1"
    assert "the model is loading" in seen["refused"].json()["error"]["message"]
    assert not seen["computes"], "a step of the engine took 2.6 times as long beside the threads of another"


def test_a_server_that_ends_says_so_while_what_runs_goes_on(path):
    with Served(path, max_tokens=10**6) as server:
        endless(server)
        client = server.raw(server.request(max_tokens=10**6, stream=True))
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        server.server.should_exit = True
        wait_until(lambda: health(server.port) == (503, "ending"))
        refused = httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json={})
        assert refused.status_code == 503 and "the server ends" in refused.json()["error"]["message"]
        assert all(client.recv(4096) for _ in range(20))
        client.close()
    assert health(server.port) == (0, "")
