"""Clients that send their headers slowly, endlessly, wrongly, or not at all: uvicorn's protocol with a size and a clock."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 64 * 2**10


def _raw_answer(status: str, message: str) -> bytes:
    """For what never becomes a request."""
    body = b'{"error":{"message":"%s","type":"invalid_request_error","param":null,"code":null}}' % message.encode()
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


TOO_LARGE = _raw_answer("431 Request Header Fields Too Large", "the headers are larger than 64 KiB")
NOT_HTTP = _raw_answer("400 Bad Request", "this is not a valid HTTP request")


class BoundedHttp(HttpToolsProtocol):
    """Closes connections whose headers are not complete in time, or too large."""

    header_timeout_s = 10.0
    _header_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES and b"\r\n\r\n" not in data[:MAX_HEADER_BYTES]:
                self.transport.write(TOO_LARGE)
                self.transport.close()
                return
        super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        self.transport.write(NOT_HTTP)
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._header_bytes = 0
        self._timer = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        self.transport.close()


def bounded_http(header_timeout_s: float) -> type[asyncio.Protocol]:
    return type("BoundedHttp", (BoundedHttp,), {"header_timeout_s": header_timeout_s})
