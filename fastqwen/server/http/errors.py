"""Every failure in OpenAI's shape: {"error": {"message", "type", "param", "code"}}; on Anthropic's paths with its names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastqwen.errors import (
    BadRequest,
    EngineGone,
    FastqwenError,
    GenerationFailed,
    Overloaded,
    ReadersGone,
    UnknownModelName,
    UpstreamGone,
)
from fastqwen.server.http.codings import CODINGS
from fastqwen.server.http.door import Door

STATUS_OF_CODE = {
    "response_not_found": 404,
    "request_too_large": 413,
    "request_timeout": 408,
    "unsupported_content_encoding": 415,
}
# Status, type, param and code of what is no field's fault; the whole tree's root comes last.
DESCRIBED: dict[type[FastqwenError], tuple[Any, ...]] = {
    UnknownModelName: (404, "invalid_request_error", "model", "model_not_found"),
    Overloaded: (429, "rate_limit_error", None, "overloaded"),
    EngineGone: (503, "service_unavailable", None, "engine_unavailable"),
    ReadersGone: (503, "service_unavailable", None, "readers_unavailable"),
    UpstreamGone: (502, "bad_gateway", None, "upstream_gone"),
    GenerationFailed: (500, "server_error", None, "engine_error"),
    FastqwenError: (400, "invalid_request_error"),
}

ANTHROPICS_PATH = "/v1/messages"
ANTHROPICS_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip

log = logging.getLogger("fastqwen.server")


def error_body(message: str, kind: str, param: str | None = None, code: str | int | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def in_anthropics_words(status: int, body: dict[str, Any]) -> dict[str, Any]:
    kind = ANTHROPICS_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**body["error"], "type": kind}}


def error_response(
    status: int, body: dict[str, Any], path: str = "", more: Mapping[str, str] | None = None
) -> Response:
    """As the API has it that was asked at ``path``."""
    headers = dict(more or {})
    if path.startswith(ANTHROPICS_PATH):
        body = in_anthropics_words(status, body)
    if status in (429, 503):
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 415 and body["error"].get("code") == "unsupported_content_encoding":
        headers["Accept-Encoding"] = ", ".join(CODINGS)
    return JSONResponse(body, status, headers)


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body for any exception. Ours get no details, but a traceback in the log."""
    if isinstance(error, BadRequest):
        status = STATUS_OF_CODE.get(error.code or "", 400)
        return status, error_body(str(error), "invalid_request_error", error.param, error.code)
    for kind, (status, *said) in DESCRIBED.items():
        if isinstance(error, kind):
            return status, error_body(str(error), *said)
    log.error("a request failed because of a bug in fastqwen", exc_info=error)
    return 500, error_body(
        "the server failed on this request; its log says why", "server_error", None, "internal_error"
    )


def install(app: FastAPI, state: Door) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        status, body = describe(error)
        if status >= 500:
            state.note_error(body["error"]["message"])
        return error_response(status, body, request.url.path)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        headers = dict(error.headers or {})
        if headers.get("Allow") == "GET":
            headers["Allow"] = "GET, HEAD"  # as the guard has it
        return error_response(error.status_code, error_body(str(error.detail), kind), request.url.path, headers)

    async def on_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; it stands in the access log

    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(FastqwenError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)
