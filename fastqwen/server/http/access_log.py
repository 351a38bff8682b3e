"""One line for each request once it is over, and an id for each: the client's own, or a new one. Pure ASGI, in front of all.

Probes and scrapes, which come every few seconds, get a line where their answer changes: else they are all that a log holds.
An id that a client or a proxy sends as X-Request-Id is returned and logged; so one request can be followed through both logs.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastqwen.server.http.sse import DIRECT_SEND

TOKENS = "fastqwen.tokens"  # in a request's scope: tells how many tokens its prompts and its answers have so far
POLLED = frozenset({"/health", "/health/ready", "/metrics"})
CLIENT_LEFT = 499  # as nginx writes it: nobody waited for the answer
_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.A)  # what a log and a header can hold as it is
_PHRASES = {CLIENT_LEFT: "Client Left", **{status.value: status.phrase for status in HTTPStatus}}

log = logging.getLogger("fastqwen.access")


class AccessLog:
    """``writes``: whether lines are wanted; ids are given in any case."""

    def __init__(self, app: ASGIApp, *, writes: bool) -> None:
        self._app = app
        self._writes = writes
        self._last_status: dict[str, int] = {}  # of what is polled, by its path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = time.monotonic()
        request_id = request_id_of(scope["headers"])
        header = (b"x-request-id", request_id.encode())
        status = CLIENT_LEFT

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        scope[TOKENS] = []  # what stands between may copy the scope
        scope[DIRECT_SEND] = send  # a stream's events need no look at each
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._writes and self._is_news(scope, status):
                _write(scope, status, request_id, time.monotonic() - start_s)

    def _is_news(self, scope: Scope, status: int) -> bool:
        path = scope["path"].rstrip("/")
        if path not in POLLED:
            return True
        before = self._last_status.get(path)
        self._last_status[path] = status
        return status != before


def request_id_of(headers: list[tuple[bytes, bytes]]) -> str:
    given = next((value.decode("latin-1") for name, value in headers if name == b"x-request-id"), "")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def note_tokens(scope: Scope, tokens: Callable[[], tuple[int, int]]) -> None:
    scope.setdefault(TOKENS, []).append(tokens)


def _write(scope: Scope, status: int, request_id: str, seconds: float) -> None:
    path = quote(scope["path"]) + ("?..." if scope.get("query_string") else "")  # some clients put their key there
    host, port = scope.get("client") or ("", 0)
    fields: dict[str, Any] = {
        "client": f"{host}:{port}",
        "method": scope["method"],
        "path": path,
        "status": status,
        "duration_s": round(seconds, 4),
        "request_id": request_id,
    }
    used = ""
    for tokens in scope.get(TOKENS, []):
        prompt, generated = tokens()
        fields |= {"prompt_tokens": prompt, "completion_tokens": generated}
        used = f", {prompt} + {generated} tokens"
    line = f'{fields["client"]} - "{scope["method"]} {path} HTTP/{scope.get("http_version", "1.1")}" {status}'
    log.info(
        "%s, %.3f s%s, id %s",
        f"{line} {_PHRASES.get(status, '')}".rstrip(),
        seconds,
        used,
        request_id,
        extra={"fields": fields},
    )
