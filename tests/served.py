"""A server in a thread of the tests' process."""

import json
import socket
import threading
import time

import httpx
import torch

from robopoet.writing.poet import Poet
from serve import ServeConfig, listen, make_server

PATIENCE_S = 60
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


class Served:
    """A server in a thread of this process."""

    def __init__(self, path, dtype="float64", **keys):
        self.poet = Poet(str(path), "cpu", dtype)
        cfg = ServeConfig(checkpoint=str(path), name="tiny", **{"port": 0} | keys)
        assert cfg.problems() == []
        self.listener, self.server = listen(cfg), make_server(cfg, self.poet)
        app = self.server.config.app
        while not hasattr(app, "router"):
            app = app.app
        self.api = app.router.lifespan_context.__self__
        self.engine = self.api.engine

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()
        self.port = self.listener.getsockname()[1]
        wait_until(lambda: self.server.started)
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
        return HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body)


def rest_of(client: socket.socket) -> bytes:
    """What comes until the connection ends."""
    return b"".join(iter(lambda: client.recv(4096), b""))


def endless(server):
    """Let no text end by itself."""
    server.poet.forbidden = torch.tensor(list(server.poet.tokenizer.specials.values()))
    return server


def wait_until(holds):
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
