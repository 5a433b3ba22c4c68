"""uvicorn's HTTP connections, with bounds on what uvicorn waits for without any: headers, and readers that stall."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from robopoet.serving.protocol import RequestError, error_body

HEADER_BYTES = 2**16


class Connection(HttpToolsProtocol):
    """A connection whose headers must come within config.timeout_keep_alive seconds and 64 KB.

    A response that stays unread for as long after its end is dropped. A request's scope has `abort` in its extensions:
    it ends the connection at once.
    """

    header_bytes = 0
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self.deadline.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        reads_headers = self.deadline is not None and not self.deadline.cancelled()
        self.header_bytes += len(data) if reads_headers else 0
        super().data_received(data)
        if not self.deadline.cancelled() and self.header_bytes > HEADER_BYTES:
            self.send_400_response(f"the headers have over {HEADER_BYTES:,} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {"abort": self.transport.abort}

    def on_headers_complete(self) -> None:
        self.deadline.cancel()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        if not self.pipeline:
            self._await_headers()
        super().on_response_complete()

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is not HTTP, in OpenAI's form."""
        body = error_body(RequestError(msg))
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def _await_headers(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.header_bytes = 0
        self.deadline = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
