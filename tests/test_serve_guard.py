"""Who may use the server: hosts, origins, keys; and where it listens."""

import os
import signal
import socket
import threading

import pytest
from conftest import save_random
from scripts import Script
from served import Served

from robopoet.errors import ConfigError
from serve import ServeConfig, listen

BODY = '{"model": "tiny", "prompt": "a", "max_tokens": 3}'
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("guarded") / "best.pt")


@pytest.fixture(scope="module")
def served(path):
    with Served(path, allow_hosts=("poet.example",), allow_origins=("https://mine.example",)) as server:
        yield server


def send(served, headers, method="POST", place="/v1/completions"):
    return served.http.request(method, place, content=BODY if method == "POST" else None, headers=headers)


@pytest.mark.parametrize(
    ("headers", "status", "said"),
    [
        ({"content-type": "text/plain"}, 415, "content-type: found 'text/plain'"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "must be application/json"),
        ({"content-type": ""}, 415, "must be application/json"),
        (JSON | {"content-encoding": "gzip"}, 415, "content-encoding: found 'gzip'"),
        (JSON | {"origin": "https://evil.example"}, 403, "origin: found 'https://evil.example'"),
        (JSON | {"origin": "null"}, 403, "origin: found 'null'"),
        (JSON | {"origin": "http://localhost:1"}, 403, "origin: found"),
        (JSON | {"host": "rebound.example"}, 403, "host: found 'rebound.example'"),
        (JSON | {"host": "[::1"}, 403, "host: found"),
        (JSON | {"host": "localhost.evil.example:8000", "origin": "http://localhost.evil.example:8000"}, 403, "host"),
    ],
    ids=str,
)
def test_what_a_web_page_sends_unasked_is_refused(served, headers, status, said):
    answer = send(served, headers)
    assert answer.status_code == status and said in answer.json()["error"]["message"]


@pytest.mark.parametrize("place", ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_a_rebound_name_reads_nothing(served, place):
    assert send(served, {"host": "rebound.example"}, "GET", place).status_code == 403
    assert send(served, {"origin": "https://evil.example"}, "GET", place).status_code == 403
    assert send(served, {}, "GET", place).status_code == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1", "[::1]:8000", "poet.example", "Poet.example:1"]
)
def test_names_of_this_machine_and_allowed_ones_are_served(served, host):
    for headers in ({}, {"origin": f"http://{host}"}, {"origin": "https://mine.example"}):
        assert send(
            served, JSON | {"host": host, "content-type": "Application/JSON; charset=utf-8"} | headers
        ).is_success


ASKED = {"access-control-request-method": "POST", "access-control-request-headers": "content-type,authorization"}


@pytest.mark.parametrize("place", ["/v1/completions", "/v1/chat/completions"])
def test_a_browser_that_asks_for_a_page_before_it_sends_is_told(path, place):
    """It asks without a key, and then reads with the page why a wrong one is refused."""
    with Served(path, allow_origins=("https://mine.example",), api_key="k") as server:
        allowed = send(server, {"origin": "https://mine.example"} | ASKED, "OPTIONS", place)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://mine.example"
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert allowed.headers["access-control-allow-headers"] == "content-type,authorization"
        assert send(server, {"origin": "https://evil.example"} | ASKED, "OPTIONS", place).status_code == 400
        answer = send(server, JSON | {"origin": "https://mine.example"}, place=place)
        assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://mine.example"


def test_an_allowed_page_may_read_and_no_page_may_frame(served):
    answer = send(served, JSON | {"origin": "https://mine.example"})
    assert answer.headers["access-control-allow-origin"] == "https://mine.example"
    assert send(served, {}, "GET", "/").headers["x-frame-options"] == "DENY"


def test_every_page_may_use_a_server_that_allows_all(path):
    with Served(path, allow_origins=("*",)) as server:
        assert send(server, JSON | {"origin": "https://any.example"}).is_success


def test_a_wrong_place_is_not_redirected_by_the_host_header(served):
    answer = send(served, {"host": "127.0.0.1"}, "GET", "/v1/models/tiny/")
    assert answer.status_code == 404 and "location" not in answer.headers
    assert send(served, JSON, place="/v1/completions/").status_code == 404


@pytest.mark.parametrize("key", ["s3cret", "clé"])
def test_a_key_is_asked_for_as_openais_clients_send_it(path, monkeypatch, capfd, key):
    monkeypatch.setenv("ROBOPOET_API_KEY", key)
    with Served(path, host="0.0.0.0") as server:
        for wrong in (None, b"Bearer", b"Bearer wrong", b"Basic " + key.encode(), b"Bearer \xff"):
            headers = {b"authorization": wrong} if wrong else {}
            for place in ("/v1/models", "/v1/completions", "/v1/x", "/metrics"):
                method = "POST" if place == "/v1/completions" else "GET"
                answer = send(server, headers | {b"content-type": b"application/json"}, method, place)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        right = {b"authorization": b"bearer " + key.encode(), b"content-type": b"application/json"}
        assert send(server, right).is_success  # a scheme's case does not matter: RFC 9110, section 11.1
        right[b"authorization"] = b"Bearer " + key.encode()
        assert all(send(server, right, "GET", place).is_success for place in ("/v1/models", "/metrics"))
        assert send(server, right).is_success
        assert server.http.get("/health").is_success and server.http.get("/").is_success
        assert send(server, right | {b"host": b"rebound.example"}).status_code == 403
    assert key not in capfd.readouterr().err


def test_a_key_is_required_where_other_machines_reach_the_server(monkeypatch):
    monkeypatch.delenv("ROBOPOET_API_KEY", raising=False)
    for host in ("0.0.0.0", "::", "", "192.0.2.1", "poet.example"):
        (problem,) = ServeConfig(host=host).problems()
        assert problem.startswith(f"host: found {host}") and "ROBOPOET_API_KEY" in problem
        assert ServeConfig(host=host, api_key="k").problems() == []
    assert not any(ServeConfig(host=host).problems() for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))


def test_a_taken_port_or_an_unknown_host_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"^port: can't listen on 127\.0\.0\.1, port {port}: Address already in use;"
        ):
            listen(ServeConfig(port=port))
    for host in ("nowhere.invalid", "a" * 70, "::2"):
        with pytest.raises(ConfigError, match=r"^port: can't listen on .*--port=0 is a free one$"):
            listen(ServeConfig(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_bound_address_is_printed(path, host):
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip("this machine has no such address")
    ours, its = os.pipe()
    process = Script("serve.py", path, "--port=0", f"--host={host}", "--device=cpu", stdin=its, stdout=its, stderr=its)
    os.close(its)
    killer = threading.Timer(60, process.process.kill)
    killer.start()
    said = os.fdopen(ours)
    line = said.readline()
    port = int(line.rpartition(":")[2].removesuffix("/v1\n"))
    assert line == f"serving {path} at http://{f'[{host}]' if ':' in host else host}:{port}/v1\n" and port
    with socket.create_connection((host, port)) as client:
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")
    process.signal(signal.SIGTERM)
    with said:
        rest = said.read()
    assert process.wait() == 0 and "Traceback" not in rest
    killer.cancel()
