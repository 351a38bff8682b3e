"""Every failure in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
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
from fastqwen.server.http.door import Door

STATUS_OF_CODE = {"request_too_large": 413, "request_timeout": 408}
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

log = logging.getLogger("fastqwen.server")


def error_body(message: str, kind: str, param: str | None = None, code: str | int | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, body: dict[str, Any]) -> JSONResponse:
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = "1"
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
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
    async def on_error(request: Request, error: Exception) -> JSONResponse:
        status, body = describe(error)
        if status >= 500:
            state.note_error(body["error"]["message"])
        if request.url.path.startswith("/v1/messages"):
            body = {"type": "error", **body}  # Anthropic's clients look for this key
        return error_response(status, body)

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse(error_body(str(error.detail), kind), error.status_code, error.headers)

    async def on_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; it stands in the access log

    app.add_exception_handler(ClientDisconnect, on_gone)
    app.add_exception_handler(FastqwenError, on_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_error)
