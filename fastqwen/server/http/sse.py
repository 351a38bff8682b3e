"""Server-sent events from an iterator of encoded chunks, with the client's disconnect as cancellation."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio
import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastqwen.server.http.body import client_leaves
from fastqwen.server.http.errors import describe

log = logging.getLogger("fastqwen.server")

encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
DIRECT_SEND = "fastqwen.direct_send"  # in the scope: the connection's own send
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(value: Any) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def named_event(kind: str, value: Any) -> bytes:
    """Anthropic's and the Responses API's events have a name."""
    return b"event: " + kind.encode() + b"\ndata: " + encode(value) + b"\n\n"


class EventStream(Response):
    """An ASGI response of ready-made events.

    A failure after the first event becomes an error event, which ``failure(status, body)`` writes as its API has it, and
    then there is no [DONE]: a client can tell a broken
    answer from a whole one. When the client is gone, or has not read for ``stall_timeout_s``, the iterator is closed,
    which aborts the work in the engine. Backpressure is the socket's: nothing is asked for while a write waits.

    The events between the first and the last go straight to the connection: what stands between (``DIRECT_SEND``) only
    wants to know when a response begins and ends, and would wrap every token's event again.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        stall_timeout_s: float,
        done: bytes = DONE,
        failure: Callable[[int, dict[str, Any]], bytes] = lambda status, body: event(body),
    ) -> None:
        self._events = events
        self._stall_timeout_s = stall_timeout_s
        self._done = done
        self._failure = failure
        self._sending_since_s = 0.0
        self.status_code = 200  # what FastAPI looks at in a response
        self.background = None
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with anyio.create_task_group() as group:

            async def watch_disconnect() -> None:
                await client_leaves(receive)
                group.cancel_scope.cancel()

            async def watch_stall() -> None:
                while True:
                    await anyio.sleep(self._stall_timeout_s / 4)
                    since_s = self._sending_since_s
                    if since_s and time.monotonic() - since_s > self._stall_timeout_s:
                        log.warning("a client has not read for %.0f s; its request is aborted", self._stall_timeout_s)
                        group.cancel_scope.cancel()

            async def write() -> None:
                try:
                    await self._send_all(send, scope.get(DIRECT_SEND, send))
                finally:
                    with anyio.CancelScope(shield=True):
                        await self._events.aclose()
                group.cancel_scope.cancel()

            group.start_soon(watch_disconnect)
            group.start_soon(watch_stall)
            # A task of its own: a token then wakes what is here, and not every layer between here and the connection.
            group.start_soon(write)

    async def _send_all(self, send: Send, send_event: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        last = self._done
        try:
            async for body in self._events:
                self._sending_since_s = time.monotonic()
                await send_event({"type": "http.response.body", "body": body, "more_body": True})
                self._sending_since_s = 0.0
        except Exception as error:
            last = self._failure(*describe(error))
        await send({"type": "http.response.body", "body": last, "more_body": False})
