"""The server's connections: bounded in number, time and memory, whatever is sent."""

import contextlib
import socket
import time

import pytest
from conftest import save_random
from served import HEAD, Served, endless, rest_of, wait_until

from robopoet import portable


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_random(tmp_path_factory.mktemp("connections") / "best.pt", positions="rotary")


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "line": (b"GET /", b"x" * 4096),
    "headers": (b"GET / HTTP/1.1\r\n", b"a: " + b"b" * 4096 + b"\r\n"),
    "chunk extension": (CHUNKED + b"1;", b"x" * 4096),
    "trailers": (CHUNKED + b"0\r\n", b"a: " + b"b" * 4096 + b"\r\n"),
    "behind an answer": (b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n", b"x" * 4096),
    "requests": (b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 64),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_part_of_a_request_is_not_kept(path, kind):
    head, piece = ENDLESS[kind]
    with Served(path, client_s=1.0) as server:
        client, taken = server.raw(head), 0
        client.settimeout(2)
        with contextlib.suppress(OSError):  # ended, or no longer read
            while taken < 2**26:
                client.sendall(piece)
                taken += len(piece)
        assert taken < 2**24  # what the sockets of both sides hold
        client.close()
        assert server.choices(max_tokens=3)


def test_more_connections_than_the_process_may_open_lock_nobody_out(path, monkeypatch, capfd):
    monkeypatch.setattr(portable, "most_open_files", lambda: 128)
    with Served(path) as server:
        idle = [server.raw(b"") for _ in range(60)]
        assert server.choices(max_tokens=3)
        assert len(server.server.server_state.connections) <= 48
        idle[0].settimeout(5)  # less than client_s, after which all would end
        assert idle[0].recv(1) == b""  # the longest idle
        for client in idle:
            client.close()
    said = capfd.readouterr().err
    assert said.count("all 48 connections are taken") == 1 and "Traceback" not in said


def test_a_connection_beyond_those_with_requests_is_refused_and_they_go_on(path, monkeypatch):
    monkeypatch.setattr(portable, "most_open_files", lambda: 48)
    with Served(path, max_tokens=10**6) as server:
        endless(server)
        busy = [server.raw(server.request(max_tokens=10**6, stream=True)) for _ in range(8)]
        assert all(client.recv(100).startswith(b"HTTP/1.1 200") for client in busy)
        refused = server.raw(b"")
        with contextlib.suppress(ConnectionError):
            assert refused.recv(1) == b""
        assert all(client.recv(100) for client in busy)
        for client in busy:
            client.close()


def test_an_answer_that_nobody_reads_ends_with_its_connection(path, monkeypatch):
    with Served(path, client_s=0.3) as server:
        server.api.page = b"x" * 2**25
        for keeps in (b"close", b"keep-alive"):
            reader = socket.socket()
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect(("127.0.0.1", server.port))
            reader.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: %s\r\n\r\n" % keeps * 2)
            wait_until(lambda: server.server.server_state.connections)
            wait_until(lambda: not server.server.server_state.connections)
            reader.close()


def test_a_reader_that_was_slow_once_may_take_its_time_later(path):
    with Served(path, client_s=0.3, max_tokens=10**6) as server:
        endless(server)
        server.api.page = b"x" * 2**25  # more than the sockets of both sides hold: writing it pauses
        client, left = server.raw(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"), 2**25
        while left > 0:
            left -= len(client.recv(2**20))
        client.sendall(server.request(max_tokens=10**6, stream=True))
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert client.recv(4096)
        client.close()


def test_http_1_0_gets_a_stream_without_chunks(path):
    with Served(path) as server:
        client = server.raw(server.request(max_tokens=5, stream=True).replace(b"HTTP/1.1", b"HTTP/1.0"))
        head, _, body = rest_of(client).partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower() and body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
