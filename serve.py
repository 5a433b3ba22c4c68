"""Serve a trained model over HTTP, as programs expect it: OpenAI's completions.

python serve.py out/demo/best.pt
curl localhost:8000/v1/completions -H 'content-type: application/json' \
    -d '{"model": "demo", "prompt": "JULIET", "max_tokens": 60}'
"""

import functools
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import configurator
from configurator import ConfigError, bounds
from robopoet import portable
from robopoet.errors import CheckpointError, DataError
from robopoet.serving.engine import Engine
from robopoet.serving.protocol import Limits
from robopoet.weights import checkpoint, html
from robopoet.writing.poet import Dtype, Poet

OWN_FILES = 32  # that a process has open beside its connections


@dataclass(frozen=True)
class ServeConfig(Limits):
    """The keys of serve.py."""

    # model
    checkpoint: str = "out/demo/best.pt"  # ours, nanoGPT's, a Hugging Face folder, or a Hub name such as gpt2
    name: str = ""  # of the model in the API; its folder's unless given
    # server
    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: on all, for anyone who can reach this machine
    port: int = 8000  # 0: a free one
    # machine
    device: str = "auto"  # auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps
    dtype: Dtype = "auto"  # of the weights; auto: the fastest

    def problems(self) -> list[str]:
        """What is wrong with these values, one per line."""
        found = super().problems() + bounds(self, "port", 0, 65_535)
        if ":" in self.name:
            found.append(f"name: found {self.name!r}, must have no colon, which parts a model from its style")
        return found


def model_name(checkpoint: str) -> str:
    """The name of a checkpoint's folder, or of the folder itself: out/mine/best.pt is mine."""
    path = Path(checkpoint)
    name = path.absolute().parent.name if path.suffix == ".pt" else path.name
    return name.replace(":", "-") or "model"


def make_page(poet: Poet) -> bytes:
    """The model as one HTML file, or nothing if it is too large for a page."""
    try:
        html.check(poet.model.config)
        loaded = checkpoint.load_model(poet.path, torch.device("cpu"), torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            html.export(*loaded, "", Path(folder) / "poet.html")
            return (Path(folder) / "poet.html").read_bytes()
    except CheckpointError:
        return b""


def make_server(poet: Poet, cfg: ServeConfig) -> Any:
    """A uvicorn.Server for this model; raises ConfigError where a package is missing."""
    try:
        import uvicorn

        from robopoet.serving.api import Api
        from robopoet.serving.connection import Connection
    except ImportError as e:
        raise ConfigError(f"serve.py needs {e.name}: pip install starlette uvicorn h11") from None
    most = max(8, (portable.most_open_files() - OWN_FILES) // 2)
    engine = Engine(poet, cfg.max_rows, poet.model.config.block_size + cfg.max_tokens)
    api = Api(engine, cfg.name or model_name(cfg.checkpoint), cfg, make_page(poet))
    config = uvicorn.Config(
        api.app,
        cfg.host,
        cfg.port,
        http=functools.partial(Connection, most),
        backlog=max(1, most // 4),  # asyncio accepts so many before one of them is counted
        ws="none",
        timeout_keep_alive=cfg.client_s,
        timeout_graceful_shutdown=cfg.grace_s,
        access_log=False,
        log_level="warning",
        server_header=False,
    )
    return uvicorn.Server(config)


def main(cfg: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs."""
    poet = Poet(cfg.checkpoint, cfg.device, cfg.dtype)
    _ = poet.sha256  # read once, before the first request
    server = make_server(poet, cfg)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended
        signal.signal(number, lambda *_: None)
    print(f"serving {poet.path} at http://{cfg.host}:{cfg.port}/v1", file=sys.stderr)
    server.run()
    if not server.started:
        raise SystemExit(2)


if __name__ == "__main__":
    configurator.launch(main, ServeConfig, DataError, CheckpointError, positional="checkpoint")
