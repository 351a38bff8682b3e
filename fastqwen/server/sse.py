"""Server-sent events from an iterator of JSON objects, with the client's disconnect as cancellation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from fastqwen.server.errors import describe
from fastqwen.server.state import ServerState

_encode = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(value: Any) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


class EventStream:
    """An ASGI response. Events that are ready together leave in one write.

    A failure after the first event becomes an error event, and then there is no [DONE]: a client can tell a broken
    answer from a whole one. When the client is gone the iterator is closed, which aborts the work in the engine.
    """

    def __init__(self, state: ServerState, events: AsyncIterator[list[Any]]) -> None:
        self._state = state
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        import anyio

        async with anyio.create_task_group() as group:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(watch)
            try:
                await self._send_all(send)
            finally:
                with anyio.CancelScope(shield=True):
                    await self._events.aclose()  # type: ignore[attr-defined]
            group.cancel_scope.cancel()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        last = DONE
        try:
            async for values in self._events:
                body = b"".join(event(value) for value in values)
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        except Exception as error:
            last = event(describe(error)[1])
        await send({"type": "http.response.body", "body": last, "more_body": False})
