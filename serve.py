"""Serve a trained model over HTTP, as programs expect it: OpenAI's completions and chats.

python serve.py out/demo/best.pt
curl localhost:8000/v1/completions -H 'content-type: application/json' \
    -d '{"model": "demo", "prompt": "JULIET", "max_tokens": 60}'
"""

import contextlib
import functools
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import configurator
from robopoet import portable
from robopoet.errors import ConfigError, bounds
from robopoet.serving.engine import Engine
from robopoet.serving.protocol import Limits, Status, model_name
from robopoet.writing.poet import Dtype, Poet

API_KEY = "ROBOPOET_API_KEY"  # the environment variable that may hold the key
OWN_FILES = 32  # files that a server has open beside its connections, at most


@dataclass(frozen=True)
class ServeConfig(Limits):
    """The keys of serve.py."""

    # model
    checkpoint: str = "out/demo/best.pt"  # ours, nanoGPT's, GGUF, a Hugging Face folder or Hub name, or smollm2
    name: str = ""  # what the API calls the model (default: its folder's name)
    # server
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0 is all of this machine's, and needs an api_key
    port: int = 8000  # port to listen on (0: any that is free)
    api_key: str = ""  # clients must send it as a Bearer token; better in the environment, as ROBOPOET_API_KEY
    allow_hosts: tuple[str, ...] = ()  # names of this machine that clients use, beside localhost; repeatable
    allow_origins: tuple[str, ...] = ()  # web pages that may use the API, such as https://my.example; repeatable
    # machine
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Dtype = "auto"  # dtype of the weights; auto: the fastest here

    @property
    def key(self) -> str:
        """The API key, "" if there is none."""
        return self.api_key or os.environ.get(API_KEY, "")

    def problems(self) -> list[str]:
        """What is wrong with these values, one per line."""
        found = super().problems() + bounds(self, "port", 0, 65_535)
        if not self.key and not is_loopback(self.host):
            advice = f"set {API_KEY} in the environment (or --api_key), or listen on 127.0.0.1"
            found.append(f"host: found {self.host}, where other machines may reach it; {advice}")
        if ":" in self.name:
            found.append(f"name: found {self.name!r}, must have no colon, which parts a model from its style")
        return found


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(cfg: ServeConfig) -> socket.socket:
    """A socket that listens on the address; raises ConfigError if that can't be had."""
    try:
        found = socket.getaddrinfo(cfg.host, cfg.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as e:
        reason = (getattr(e, "strerror", None) or str(e)).partition(" (while")[0]
        raise ConfigError(
            f"port: can't listen on {cfg.host}, port {cfg.port}: {reason}; --port=0 is a free one"
        ) from None


def make_server(cfg: ServeConfig, poet: Poet | None, status: Status = "loading") -> Any:
    """A uvicorn.Server to run on a listening socket: for this model or, without one, to tell everybody this status.

    Raises ConfigError where a package is missing.
    """
    try:
        import uvicorn
        from starlette.middleware.cors import CORSMiddleware

        from robopoet.serving.api import Api, RequestLog, StandIn, make_index
        from robopoet.serving.connection import Connection, Server
        from robopoet.serving.guard import Guard
        from robopoet.serving.metrics import Tally
    except ImportError as e:
        raise ConfigError(f"serve.py needs {e.name}: pip install starlette uvicorn h11") from None
    most = max(8, (portable.most_open_files() - OWN_FILES) // 2)
    app, tally = StandIn(status), Tally()
    if poet:
        name = cfg.name or model_name(cfg.checkpoint)
        app = Api(Engine(poet, cfg.max_rows), name, cfg, tally, make_index(poet)).app
    guarded = Guard(app, [cfg.host, *cfg.allow_hosts], cfg.allow_origins, cfg.key)
    limits: dict[str, Any] = {  # uvicorn takes more kinds than it says
        "http": functools.partial(Connection, most),
        "timeout_keep_alive": cfg.client_s,
        "timeout_graceful_shutdown": cfg.grace_s,
    }
    config = uvicorn.Config(
        RequestLog(CORSMiddleware(guarded, cfg.allow_origins, ("GET", "POST"), ("*",)), tally),
        **limits,
        backlog=max(1, most // 4),  # asyncio accepts so many before one of them is counted
        ws="none",
        access_log=False,
        log_level="warning",
        server_header=False,
        headers=[("x-frame-options", "DENY"), ("x-content-type-options", "nosniff")],
    )
    return Server(config, functools.partial(standing_in, cfg, "ending")) if poet else uvicorn.Server(config)


@contextlib.contextmanager
def standing_in(cfg: ServeConfig, status: Status, listener: socket.socket) -> Iterator[None]:
    """Meanwhile, tell everybody that the model is "loading", or the server "ending"."""
    server = make_server(cfg, None, status)
    thread = threading.Thread(target=server.run, args=([listener.dup()],), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()


def main(cfg: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs."""
    listener = listen(cfg)
    # A thread that computes keeps PyTorch's other threads to itself until it ends. If the main thread computed, there
    # would be more of them than cores once the engine steps, and each step would wait for them to wake.
    with standing_in(cfg, "loading", listener), ThreadPoolExecutor(1) as loader:
        poet = loader.submit(Poet, cfg.checkpoint, cfg.device, cfg.dtype).result()
        _ = poet.sha256  # hashing takes a while: now, not in the first request
        server = loader.submit(make_server, cfg, poet).result()
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn handles both, and raises them again when it has ended
        signal.signal(number, lambda *_: None)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]" if ":" in host else host
    print(f"serving {poet.path} at http://{address}:{port}/v1", file=sys.stderr)
    server.run([listener])


if __name__ == "__main__":
    configurator.launch(main, ServeConfig, positional="checkpoint")
