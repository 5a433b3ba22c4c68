"""The HTTP side: routes, bodies within bounds, streams, and clients that leave."""

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from robopoet.errors import CheckpointError
from robopoet.serving.chat import read_chat
from robopoet.serving.engine import Engine
from robopoet.serving.guard import refusal
from robopoet.serving.metrics import Tally
from robopoet.serving.protocol import Limits, Reply, RequestError, Status, model_ids, read_request
from robopoet.weights import checkpoint, html
from robopoet.writing.poet import Poet

LARGE = 50_000  # bytes of a body that is parsed and tokenized beside the event loop
DISCARDED = 4  # times the most that a body may have, which are read before it is refused
LOADING = RequestError("the model is loading; send the request again", 503)
ENDED = RequestError("the server ends; send the request again", 503)
EVENT_S = 0.02  # between two events of a stream: sending each token by itself would take longer than generating it


class Api:
    """A model's API: `app` is the ASGI application.

    name: of the model. page: the HTML that GET / returns, if there is one.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits, tally: Tally, page: bytes = b""):
        self.engine, self.poet, self.name, self.limits, self.page = engine, engine.poet, name, limits, page
        self.tally = tally
        self.requests = 0  # that are being answered
        self.started = int(datetime.now(UTC).timestamp())
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            *([Route("/", self.index)] if page else []),
        ]
        handlers: dict[type[Exception], Callable[[Request, Any], Response]] = {
            RequestError: lambda request, e: refusal(e),
            HTTPException: _refuse_http,
            ClientDisconnect: lambda request, e: Response(status_code=400),  # nobody reads it
            Exception: lambda request, e: refusal(RequestError("the server failed", 500)),
        }
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        self.app.router.redirect_slashes = False

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await asyncio.to_thread(self.engine.stop)

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the model, and one id for each style."""
        return _json({"object": "list", "data": [self._model(id) for id in model_ids(self.poet, self.name)]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/ID."""
        if (id := request.path_params["id"]) not in model_ids(self.poet, self.name):
            raise RequestError(f"model: found {id[:100]!r}; GET /v1/models lists them", 404, "model_not_found")
        return _json(self._model(id))

    def _model(self, id: str) -> dict[str, Any]:
        return {"id": id, "object": "model", "created": self.started, "owned_by": "robopoet"}

    async def health(self, request: Request) -> Response:
        """GET /health: whether the engine lives, and how busy it is."""
        engine, alive = self.engine, self.engine.is_alive()
        busy = {"requests": self.requests, "rows": len(engine.rows.rows), "max_rows": engine.rows.max_rows}
        return _json({"status": "ok" if alive else "failed"} | busy, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: what Prometheus reads."""
        rows = self.engine.rows
        gauges = {
            "requests_running": (self.requests, "Requests that are being answered."),
            "requests_waiting": (self.engine.waiting_requests, "Requests of which a text waits for a row."),
            "rows": (len(rows.rows), "Rows of the batch that are taken."),
            "max_rows": (rows.max_rows, "Rows of the batch."),
        }
        return Response(self.tally.text(**gauges), media_type="text/plain; version=0.0.4")

    async def index(self, request: Request) -> Response:
        """GET /: the model as one HTML file."""
        return Response(self.page, media_type="text/html")

    async def completions(self, request: Request) -> "Completion":
        """POST /v1/completions."""
        return await self._generate(request, read_request)

    async def chat(self, request: Request) -> "Completion":
        """POST /v1/chat/completions."""
        return await self._generate(request, read_chat)

    async def _generate(self, request: Request, read: Callable[..., Reply]) -> "Completion":
        start = time.perf_counter()
        raw = await self._read(request)
        if self.requests >= self.limits.max_rows + self.limits.max_waiting:
            raise RequestError(f"{self.requests} requests are running or waiting; try again later", 429)
        arguments = raw, self.poet, self.name, self.limits
        self.requests += 1
        try:
            takes_long = len(raw) > LARGE or b"max_copy" in raw  # the first of these sorts the training text
            reply = await asyncio.to_thread(read, *arguments) if takes_long else read(*arguments)
            return Completion(self, reply, start)
        except BaseException:
            self.requests -= 1
            raise

    async def _read(self, request: Request) -> bytes:
        """A request's JSON; refused if too slow or too long: read to its end first, unless that is far off.

        A connection that ends while its client still sends may take the answer with it.
        """
        kind, coding = (request.headers.get(f"content-{key}", "") for key in ("type", "encoding"))
        if kind.partition(";")[0].strip().lower() != "application/json":  # a web page may send others unasked
            raise RequestError(f"content-type: found {kind[:100]!r}, must be application/json", 415)
        if coding not in ("", "identity"):
            raise RequestError(f"content-encoding: found {coding[:100]!r}, must be left out", 415)
        most, size = self.limits.max_body, 0
        parts: list[bytes] = []
        too_long = RequestError(f"request: has over {most:,} bytes", 413)
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", 0)) > DISCARDED * most:
                raise too_long
        try:
            async with asyncio.timeout(self.limits.client_s):
                async for part in request.stream():
                    size += len(part)
                    if size <= most:
                        parts.append(part)
                    elif size > DISCARDED * most:
                        raise too_long
        except TimeoutError:
            raise RequestError(f"request: took over {self.limits.client_s:g} s to arrive", 408) from None
        if size > most:
            raise too_long
        return b"".join(parts)


class Completion:
    """A response that generates while it is sent, and stops when its client leaves. start: when its request arrived."""

    def __init__(self, api: Api, reply: Reply, start: float):
        self.api, self.reply, self.choices, self.is_left = api, reply, [*reply.texts], False
        self.start, self.counted = start, 0  # tokens that the metrics have
        self.news, self.end = asyncio.Event(), asyncio.Event()
        reply.wake = self._gain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request, within the time that it has."""
        self.send, self.sent, self.is_whole = send, 0, False
        self.api.tally.prompt_tokens += self.reply.prompt_tokens
        watcher = asyncio.create_task(self._watch(receive))
        self.api.engine.submit(self.choices)
        try:
            async with asyncio.timeout(self.api.limits.request_s):
                if self.reply.streams:
                    await self._stream()
                elif response := await self._whole():
                    await response(scope, receive, self._send)
            if self.is_whole and not self.reply.error:
                self.api.tally.request_s.observe(time.perf_counter() - self.start)
        except TimeoutError:
            await self._cut(RequestError(f"the request took over {self.api.limits.request_s:g} s", 504), scope, receive)
        except asyncio.CancelledError:
            await self._cut(ENDED, scope, receive)
        finally:
            self.api.requests -= 1
            self.api.engine.cancel(self.choices)
            watcher.cancel()
            left = ", left" if self.is_left else f", {self.reply.error}" if self.reply.error else ""
            read, generated = self.reply.prompt_tokens, self.reply.completion_tokens
            scope["note"] = f"{len(self.choices)} texts, {read} tokens read, {generated} generated{left}"

    def _gain(self) -> None:
        """Count the tokens that were generated, and wake what sends them."""
        tally, generated = self.api.tally, self.reply.completion_tokens
        if generated and not self.counted:
            tally.first_token_s.observe(time.perf_counter() - self.start)
        tally.generated_tokens += generated - self.counted
        self.counted = generated
        self.news.set()
        if self.reply.is_done:
            self.end.set()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.is_left = not self.is_whole  # else it is uvicorn's word that all is sent
        self.api.engine.cancel(self.choices)
        self.news.set()
        self.end.set()

    async def _whole(self) -> Response | None:
        while not (self.reply.is_done or self.is_left):
            self.news.clear()
            await self.news.wait()
        if self.is_left:
            return None
        return refusal(self.reply.error) if self.reply.error else _json(self.reply.whole())

    async def _stream(self) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        done = False
        while not (done or self.is_left):
            await self.news.wait()
            self.news.clear()
            done = self.reply.is_done
            if body := self.reply.chunks():
                await self._send({"type": "http.response.body", "body": body, "more_body": not done})
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.end.wait(), EVENT_S)

    async def _send(self, message: Message) -> None:
        self.is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self.send(message)
        self.sent += 1

    async def _cut(self, error: RequestError, scope: Scope, receive: Receive) -> None:
        """End with an error, before the texts are whole."""
        self.reply.error = error
        if not self.sent:
            await refusal(error)(scope, receive, self._send)
        elif self.reply.streams:
            await self._send({"type": "http.response.body", "body": self.reply.chunks(), "more_body": False})


class StandIn:
    """Answers, where there is no model to ask, that it is "loading", or that the server is "ending"."""

    def __init__(self, status: Status):
        self.status = status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell /health the status, and refuse everything else."""
        if scope["type"] == "http":
            refused = refusal({"loading": LOADING, "ending": ENDED}[self.status])
            answer = _json({"status": self.status}, 503) if scope["path"] == "/health" else refused
            await answer(scope, receive, send)


class RequestLog:
    """Prints a line on stderr for each request, never what it says, and counts it.

    Answers those that the server's end cuts off.
    """

    def __init__(self, app: ASGIApp, tally: Tally):
        self.app, self.tally = app, tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and print its line when it is answered."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 0

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except asyncio.CancelledError:
            if not status:
                await refusal(ENDED)(scope, receive, noting)
        finally:
            note = f", {scope['note']}" if "note" in scope else ""
            path = scope["path"][:60].encode("unicode_escape").decode()
            told, endpoint = str(status or "unanswered"), scope.get("endpoint")
            self.tally.requests[endpoint.__name__ if endpoint else "none", told] += 1
            line = f"{scope['method']} {path} {told} in {time.perf_counter() - start:.3f} s{note}"
            print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def make_index(poet: Poet) -> bytes:
    """The model as one HTML file, or nothing if a page can't take it."""
    try:
        html.check(poet.model.config, poet.tokenizer)
        loaded = checkpoint.load_model(poet.path, torch.device("cpu"), torch.float32)
        return "".join(html.make_page(*loaded, "")).encode()
    except CheckpointError:
        return b""


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def _refuse_http(request: Request, e: HTTPException) -> Response:
    message = f"{request.method} {request.url.path[:100]}: {e.detail.lower()}"
    return refusal(RequestError(message, e.status_code), e.headers)
