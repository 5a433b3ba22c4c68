"""A storm of requests to a server of completions: a third of them malformed, cut off or slow to read.

Each is answered rightly or refused in form: a well-formed one has the same text as when it was sent alone.
"""

import asyncio
import collections
import json
import random
from typing import Any

from bench.common import progress

MALFORMED = [b"", b"{", b"[" * 10_000, b'{"model": 1}', b"\xff\xfe", b'{"prompt": "a", "model": "NAME", "n": -1}']
MALFORMED += [
    b'{"prompt": "a", "model": "NAME", "x": 1}',
    b'{"prompt": [999999999], "model": "NAME"}',
    b"a" * 2_000_000,
]


def post(body: bytes) -> bytes:
    """A POST of /v1/completions whose connection ends with the answer."""
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n%s" % (len(body), body)


async def answer(port: int, sent: bytes, pause_s: float = 0.0) -> tuple[int, bytes]:
    """Send bytes and read to the end, pausing between reads; returns the status (0: none) and the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024 if pause_s else 2**16)
    try:
        writer.write(sent)
        received = b""
        while part := await asyncio.wait_for(reader.read(256 if pause_s else 2**16), 120):
            received += part
            await asyncio.sleep(pause_s)
    except ConnectionError:  # refused before all of a long body was read
        pass
    finally:
        writer.close()
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head[9:12] or 0), body


async def leave(port: int, sent: bytes, after_s: float) -> None:
    """Send bytes and end the connection a moment later."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    await asyncio.sleep(after_s)
    writer.transport.abort()


def texts(body: bytes) -> list[str]:
    """The texts of a response; of a stream, its chunks joined, from a body in chunked encoding."""
    if b"data: " not in body:
        return [choice["text"] for choice in json.loads(body)["choices"]]
    joined, stream = collections.defaultdict(str), b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        stream, body = stream + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    for line in stream.splitlines():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                joined[choice["index"]] += choice["text"]
    assert b"data: [DONE]" in stream
    return [joined[index] for index in sorted(joined)]


def variants(model: str, prompts: list[str]) -> list[dict[str, Any]]:
    """Well-formed requests of many kinds."""
    rng, found = random.Random(1), []
    for seed in range(24):
        keys = {"model": model, "prompt": rng.choice(prompts), "seed": seed, "max_tokens": rng.choice([1, 16, 40, 120])}
        keys |= {"temperature": rng.choice([0, 0.7, 1.3]), "top_p": rng.choice([1, 0.9]), "n": rng.choice([1, 1, 3])}
        keys |= {"stream": rng.random() < 0.5, "top_k": rng.choice([0, 20]), "logprobs": rng.choice([None, 2])}
        found.append(keys)
    return found


async def storm(port: int, model: str, prompts: list[str], count: int, at_once: int) -> dict[str, Any]:
    """Send `count` requests, `at_once` at a time; returns how many of each kind went well, and what went wrong."""
    bodies = [post(json.dumps(keys).encode()) for keys in variants(model, prompts)]
    expected = [texts((await answer(port, body))[1]) for body in bodies]
    well, wrong = collections.Counter(), []

    async def one(number: int) -> None:
        rng = random.Random(number)
        kind, i = rng.choice(["whole"] * 6 + ["malformed", "cut", "slow"]), rng.randrange(len(bodies))
        try:
            if kind == "malformed":
                status, body = await answer(port, post(rng.choice(MALFORMED).replace(b"NAME", model.encode())))
                assert status in (400, 404, 413) and json.loads(body)["error"]["message"], status
            elif kind == "cut":
                await leave(port, bodies[i][: rng.choice([20, -5, len(bodies[i])])], rng.random() / 20)
            else:
                status, body = await answer(port, bodies[i], 0.002 if kind == "slow" else 0.0)
                assert status == 200 and texts(body) == expected[i], (status, i)
            well[kind] += 1
        except Exception as e:
            wrong.append(f"{kind} {number}: {type(e).__name__} {e}"[:200])

    numbers = progress(range(count), "requests")

    async def client() -> None:
        for number in numbers:
            await one(number)

    await asyncio.gather(*(client() for _ in range(at_once)))
    return {"well": dict(well), "wrong": wrong}
