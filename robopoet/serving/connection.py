"""uvicorn's server and its HTTP connections, bounded in time and number.

h11 bounds what stands before, in and behind a body.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from robopoet.errors import warn
from robopoet.serving.protocol import RequestError, error_body

FULL_S = 60.0  # between two lines that say that all connections are taken


class Server(uvicorn.Server):
    """A server on whose socket `ending(socket)` goes on to answer, while it finishes what runs."""

    def __init__(
        self, config: uvicorn.Config, ending: Callable[[socket.socket], contextlib.AbstractContextManager[None]]
    ):
        super().__init__(config)
        self.ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End once all requests are answered, or their time is over."""
        is_busy = sockets and self.server_state.tasks
        with self.ending(sockets[0]) if is_busy else contextlib.nullcontext():
            await super().shutdown(sockets)


class Connection(H11Protocol):
    """A connection that ends unless a request's head arrives within config.timeout_keep_alive seconds.

    The same holds for a client that stops reading its response. most: connections; beyond them the one that has waited
    longest for a request ends, or the new one if all have requests.
    """

    said_full = -FULL_S

    def __init__(self, most: int, **given: Any):
        super().__init__(**given)
        self.most = most

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > self.most:
            others = [c for c in self.connections if isinstance(c, Connection) and c is not self]
            waiting = [(task.when(), c) for c in others if (task := c.timeout_keep_alive_task) is not None]
            _, ending = min(waiting, key=lambda pair: pair[0], default=(0.0, self))
            ending.transport.abort()
            ending._unset_keepalive_if_required()
            if time.monotonic() - Connection.said_full > FULL_S:
                Connection.said_full = time.monotonic()
                warn(f"all {self.most} connections are taken: those that wait for a request end, then new ones do")

    def data_received(self, data: bytes) -> None:
        """Hand on what came; unlike uvicorn's, this leaves the clock running until the head is whole."""
        self.conn.receive_data(data)
        self.handle_events()

    def on_response_complete(self) -> None:
        self._await_request()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.stalled.cancel()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP in OpenAI's form, unless a response has begun."""
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = error_body(RequestError("the request is not HTTP, or one of its parts is too long"))
            head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()
        self._await_request()

    def _await_request(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
