"""Time serve.py with many clients beside Poet's own batch and llama.cpp's server, then storm it.

python -m bench.serve out/demo/best.pt
python sample.py out/demo/best.pt --export=demo.gguf && python -m bench.serve out/demo/best.pt --gguf=demo.gguf
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import configurator
import serve
from bench.common import markdown, origin, progress, write_result
from bench.peer import resident_mb
from bench.storm import post, storm
from robopoet.errors import ConfigError, bounds
from robopoet.machine import find_machine
from robopoet.writing.poet import Poet

CLIENTS = (1, 8, 32, 64)
LLAMA = """
import sys, time, xllamacpp
path, threads, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path, params.cpuparams.n_threads, params.n_parallel, params.n_ctx = path, threads, rows, 256 * rows
params.verbosity = -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(1e6)
"""


@dataclass(frozen=True)
class ServeBenchConfig:
    """The keys of bench.serve."""

    checkpoint: str = "out/demo/best.pt"  # the model
    gguf: str = ""  # the same model for llama.cpp's server, which takes part if this is given
    prompt: str = "To be or not to be"  # text to continue
    max_tokens: int = 120  # length of each text, in tokens
    seconds: float = 60.0  # for each number of clients
    requests: int = 5000  # requests that the storm sends
    threads: int = 2  # threads that each server may use
    dtype: str = "auto"  # our weights' dtype
    out: str = "serve_DEVICE"  # name of the result

    def problems(self) -> list[str]:
        """What is wrong with these values, a line each."""
        return bounds(self, "max_tokens seconds threads", 1) + bounds(self, "requests", 0)


@dataclass
class Heard:
    """What clients heard: tokens, and seconds to the first text and between texts."""

    tokens: int = 0
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    failed: int = 0


async def client(port: int, keys: dict[str, Any], end: float, heard: Heard, rng: random.Random) -> None:
    """Send streaming requests one after another until `end`."""
    while time.perf_counter() < end:
        sent = post(json.dumps(keys | {"seed": rng.randrange(2**30)}).encode())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        last, received, tail = time.perf_counter(), False, b""
        while part := await reader.read(2**16):
            now = time.perf_counter()
            if b'"text":"' in part:
                (heard.between_s if received else heard.first_s).append(now - last)
                last, received = now, True
            tail = (tail + part)[-4000:]
        writer.close()
        if b"[DONE]" in tail and b'"completion_tokens":' in tail:
            heard.tokens += int(tail.rpartition(b'"completion_tokens":')[2].split(b",")[0].rstrip(b"}"))
        else:
            heard.failed += 1


async def crowd(port: int, keys: dict[str, Any], clients: int, seconds: float) -> tuple[Heard, float]:
    """So many clients for so many seconds; returns what they heard, and the seconds until the last one ended."""
    heard, start = Heard(), time.perf_counter()
    rngs = [random.Random(i) for i in range(clients)]
    await asyncio.gather(*(client(port, keys, start + seconds, heard, rng) for rng in rngs))
    return heard, time.perf_counter() - start


def poet_speed(cfg: ServeBenchConfig, passages: int, seconds: float) -> float:
    """Tokens a second of Poet's own batch: this module as a process of its own, with as many threads as a server."""
    command = [sys.executable, "-m", "bench.serve", "--poet", cfg.checkpoint, cfg.dtype, cfg.prompt]
    command += [str(cfg.max_tokens), str(passages), str(seconds)]
    return float(subprocess.run(command, env=environment(cfg), capture_output=True, text=True, check=True).stdout)


def write_alone(path: str, dtype: str, prompt: str, max_tokens: str, passages: str, seconds: str) -> None:
    """Print Poet's tokens a second."""
    poet, tokens, start, seed = Poet(path, "cpu", dtype), 0, 0.0, 0
    while not start or time.perf_counter() - start < float(seconds):
        settings = {"temperature": 1.0, "top_p": 1.0, "until": "tokens", "max_new_tokens": int(max_tokens)}
        batch = poet.begin(prompt, int(passages), seed=seed, **settings)
        for _ in poet.stream(batch):
            pass
        tokens += sum(len(passage.ids) for passage in batch) if start else 0
        start, seed = start or time.perf_counter(), seed + 1  # the first batch warms up
    print(tokens / (time.perf_counter() - start))


def environment(cfg: ServeBenchConfig) -> dict[str, str]:
    """This process's, with the number of threads of a server."""
    return os.environ | {"OMP_NUM_THREADS": str(cfg.threads)}


@contextlib.contextmanager
def server(cfg: ServeBenchConfig, name: str) -> Iterator[tuple[int, int]]:
    """Run a server; yields its port and process id."""
    if name == "llama.cpp":
        command = [sys.executable, "-c", LLAMA, cfg.gguf, str(cfg.threads), str(max(CLIENTS))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        port = int(process.stdout.readline().strip().rpartition(":")[2] or 0)
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        keys = [f"--port={port}", f"--dtype={cfg.dtype}", "--name=bench"]
        command = [sys.executable, serve.__file__, cfg.checkpoint, *keys]
        process = subprocess.Popen(command, env=environment(cfg), stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if process.poll() is not None:
                raise ConfigError(f"{name}: its server did not start")
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()


def figures(heard: Heard, seconds: float) -> dict[str, Any]:
    """What clients heard, in numbers."""

    def percentiles(values: list[float]) -> dict[str, float]:
        median, high = np.percentile(values or [0.0], [50, 99]) * 1000
        return {"median": float(median), "p99": float(high)}

    return {
        "tokens_per_s": heard.tokens / seconds,
        "first_ms": percentiles(heard.first_s),
        "between_ms": percentiles(heard.between_s),
        "requests": len(heard.first_s),
        "failed": heard.failed,
    }


def main(cfg: ServeBenchConfig) -> None:
    """Let servers take turns for each number of clients, storm ours, print a table and write the result."""
    machine = find_machine("cpu", cfg.dtype, trains=False)
    keys = {"model": "bench", "prompt": cfg.prompt, "max_tokens": cfg.max_tokens, "temperature": 1.0, "top_p": 1.0}
    keys |= {"stream": True, "stream_options": {"include_usage": True}}
    llamas = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}  # off, as they are in ours
    names = ["RoboPoet", *(["llama.cpp"] if cfg.gguf else [])]
    cases, memory_mb = [], {}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(server(cfg, name)) for name in names}
        for name, (port, pid) in servers.items():
            asyncio.run(crowd(port, keys | (llamas if name == "llama.cpp" else {}), 4, 2))
            memory_mb[name] = {"start": resident_mb(pid, "VmRSS")}
        for clients in progress(CLIENTS, "numbers of clients"):
            case = {"clients": clients, "poet_tokens_per_s": poet_speed(cfg, clients, max(cfg.seconds / 4, 1))}
            for name, (port, _) in servers.items():
                asked = keys | (llamas if name == "llama.cpp" else {})
                case[name] = figures(*asyncio.run(crowd(port, asked, clients, cfg.seconds)))
            cases.append(case)
            print(json.dumps(case), file=sys.stderr, flush=True)
        for name, (_, pid) in servers.items():
            memory_mb[name]["end"] = resident_mb(pid, "VmRSS")
        port, pid = servers["RoboPoet"]
        stormed: dict[str, Any] = {"requests": cfg.requests}
        if cfg.requests:
            prompts = [cfg.prompt, "A", cfg.prompt * 20]
            asyncio.run(storm(port, "bench", prompts, cfg.requests // 10, 50))
            stormed["start_mb"] = resident_mb(pid, "VmRSS")
            stormed |= asyncio.run(storm(port, "bench", prompts, cfg.requests, 50))
            stormed["end_mb"] = resident_mb(pid, "VmRSS")
    result = origin("serve", machine) | {"model": Path(cfg.checkpoint).parent.name, "threads": cfg.threads}
    result |= {"max_tokens": cfg.max_tokens, "cases": cases, "memory_mb": memory_mb, "storm": stormed}
    print(table([result]))
    print(json.dumps(stormed))
    write_result(result, cfg.out)


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of these results: a row for each number of clients and server."""
    rows = []
    for case, name in ((case, name) for r in results for case in r["cases"] for name in r["memory_mb"]):
        found = case[name]
        times = [f"{found[key]['median']:,.1f} / {found[key]['p99']:,.1f}" for key in ("first_ms", "between_ms")]
        share = f"{found['tokens_per_s'] / case['poet_tokens_per_s']:.2f}"
        rows.append([str(case["clients"]), name, f"{found['tokens_per_s']:,.0f}", share, *times])
    header = ["clients", "server", "tokens/s", "of Poet's batch", "ms to the first text", "between texts"]
    return markdown(header, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--poet"]:
        write_alone(*sys.argv[2:])
    else:
        configurator.launch(main, ServeBenchConfig, positional="checkpoint")
