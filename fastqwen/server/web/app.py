"""``fastqwen web``: the chat page for any OpenAI-compatible server, which is asked from here and not by the browser.

No open proxy: only the paths below are passed on, and only to the addresses that the operator gave. Their keys stay here.
"""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp

from fastqwen.errors import EngineGone, FastqwenError, Overloaded, UpstreamGone
from fastqwen.logs import configure_logging
from fastqwen.server.config import WebConfig
from fastqwen.server.http import errors
from fastqwen.server.http.body import read_body, unless_gone
from fastqwen.server.http.exposure import check_exposure
from fastqwen.server.http.guard import Guard
from fastqwen.server.http.listen import DrainingServer, address_of, listening, run_loop
from fastqwen.server.http.pages import add_pages
from fastqwen.server.web.upstream import Relay, Upstream, Upstreams

OPERATORS_PATHS = ("/admin/data", "/admin/history", "/admin/plan", "/metrics")
JSON = "application/json"

log = logging.getLogger("fastqwen.server")


@dataclass
class WebState:
    config: WebConfig
    upstreams: Upstreams
    num_active: int = 0
    draining: bool = False
    _last_error: str = ""

    def admit(self) -> None:
        if self.draining:
            raise EngineGone("this page's server is shutting down and takes no new requests")
        if self.num_active >= self.config.max_concurrent_requests:
            raise Overloaded(f"{self.num_active} requests are running, no more are accepted: try again in a moment")

    def note_error(self, message: str) -> None:
        """The page keeps asking while a server is away: that is worth one line."""
        if message != self._last_error:
            log.warning("%s", message)
        self._last_error = message


def serve_page(config: WebConfig, upstreams: Upstreams) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    configure_logging(config.log_format)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each request that is passed on
    check_exposure(config)
    with listening(config) as bound:
        return run_loop(_serve(WebState(config, upstreams), bound))


async def _serve(state: WebState, bound: socket.socket) -> int:
    upstreams = state.upstreams
    try:
        address = address_of(state.config, bound)
        log.info("the page is at %s, for %s", address, ", ".join(one.url for one in upstreams.all))
        await _greet(state)
        await DrainingServer(create_web_app(state), state).serve(sockets=[bound])
    finally:
        await upstreams.close()
    return 0


async def _greet(state: WebState) -> None:
    """Says at once what the page would say: a wrong address or key is seen where it was typed."""
    try:
        status, models, _ = await state.upstreams.models(None)
    except FastqwenError as error:
        log.warning("%s The page goes on by itself once it answers.", error)
        return
    if status == 401:
        log.warning("the server wants an API key: visitors are asked for theirs, or give one with --api-key")
    else:
        log.info("models: %s", ", ".join(model["id"] for model in models) or "none yet")


def create_web_app(state: WebState) -> ASGIApp:
    app = FastAPI(title="fastqwen web", openapi_url=None, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    errors.install(app, state)
    _add_chat(app, state)
    _add_questions(app, state)
    add_pages(app)
    return Guard(app, state)


def _add_chat(app: FastAPI, state: WebState) -> None:
    async def asked(request: Request) -> tuple[Upstream, bytes, str | None]:
        """Which server the request is for, its body as that server wants it, and the visitor's key."""
        key = request.headers.get("authorization")
        return *await state.upstreams.choose(bytes(await read_body(request, state.config)), key), key

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        upstream, body, key = await asked(request)
        response = await unless_gone(request, upstream.open("POST", request.url.path, body=body, key=key))
        if response is None:
            return Response(status_code=499)
        kind = response.headers.get("content-type", "")
        if response.status_code == 200 and kind.startswith("text/event-stream"):
            return Relay(upstream, response, stall_timeout_s=state.config.stall_timeout_s)
        answer = await unless_gone(request, upstream.read(response))
        if response.status_code == 200 and "json" not in kind:
            raise UpstreamGone(
                f"{upstream.url} is no OpenAI-compatible API: its answer to a chat request is {kind or '?'}"
            )
        return _passed_on(response.status_code, kind, answer or b"", response.headers.get("retry-after"))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        upstream, body, key = await asked(request)
        return _passed_on(*await upstream.ask("POST", "/tokenize", body=body, key=key))


def _add_questions(app: FastAPI, state: WebState) -> None:
    upstreams = state.upstreams

    @app.get("/health")
    async def health() -> Response:
        """This process lives."""
        return Response(status_code=200)

    @app.get("/health/ready")
    async def ready(request: Request) -> Response:
        return _passed_on(*await upstreams.ready(request.headers.get("authorization")))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        status, found, refusal = await upstreams.models(request.headers.get("authorization"))
        body = msgspec.json.encode({"object": "list", "data": found}) if status == 200 else refusal
        return _passed_on(status, JSON, body)

    async def figures(request: Request) -> Response:
        """Of the first server: figures of several do not add up."""
        key = request.headers.get("authorization")
        return _passed_on(*await upstreams.first.ask("GET", request.url.path, key=key))

    for path in OPERATORS_PATHS:
        app.add_api_route(path, figures)


def _passed_on(status: int, kind: str, body: bytes, retry_after: str | None = None) -> Response:
    """What is shown of another server's answer: nothing that a browser would keep, follow or run."""
    plain = kind if kind.startswith((JSON, "text/plain")) else "text/plain; charset=utf-8"
    headers = {"retry-after": retry_after} if retry_after and retry_after.isascii() and retry_after.isdigit() else None
    return Response(body, status, headers, media_type=plain)
