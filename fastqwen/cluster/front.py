"""``fastqwen api`` and ``fastqwen web --controller``: the server's own routes and pages over all models of a cluster.

A request is read here as far as the name of its model; what follows is that model's own application, the one that ``serve`` has.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastqwen.cluster.config import CONTROLLER_PORT
from fastqwen.cluster.fleet import Fleet, ServedModel
from fastqwen.cluster.relayed import RelayedModel
from fastqwen.cluster.secret import read_token
from fastqwen.cluster.sockets import endpoint, split_address
from fastqwen.errors import EngineGone, Overloaded, UnknownModelName
from fastqwen.lifeline import end_with_starter
from fastqwen.logs import configure_logging
from fastqwen.server.answer.response_store import ResponseStore
from fastqwen.server.answer.state import MAX_RECENT_ERRORS
from fastqwen.server.app import MANY_NUMBERS, PROMPTS_OF_IDS
from fastqwen.server.config import ServerConfig
from fastqwen.server.dialects import kept_responses
from fastqwen.server.dialects.body import Body
from fastqwen.server.dialects.chat_batch import ChatBatchRequest
from fastqwen.server.dialects.classify import ClassifyRequest
from fastqwen.server.dialects.embeddings import CohereEmbedRequest, EmbeddingRequest
from fastqwen.server.dialects.messages import CountRequest, MessagesRequest
from fastqwen.server.dialects.pooling import PoolingRequest
from fastqwen.server.dialects.responses_request import ResponsesRequest
from fastqwen.server.dialects.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from fastqwen.server.dialects.scores import RerankRequest, ScoreRequest
from fastqwen.server.http import docs_page, errors, openapi
from fastqwen.server.http.body import read_body
from fastqwen.server.http.exposure import check_exposure
from fastqwen.server.http.guard import COUNTED_PATHS, Guard
from fastqwen.server.http.listen import DrainingServer, address_of, bind, run_loop
from fastqwen.server.http.pages import add_pages
from fastqwen.server.operator.prometheus import MetricsPage
from fastqwen.server.operator.status import figures_of
from fastqwen.version import __version__

log = logging.getLogger("fastqwen.cluster")

POSTED: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/chat/completions/batch": ChatBatchRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v2/embed": CohereEmbedRequest,
    "/v1/score": ScoreRequest,
    "/v1/rerank": RerankRequest,
    "/classify": ClassifyRequest,
    "/pooling": PoolingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
ASKED = ("/v1/stops", "/admin/history")  # of the model that ?model= names, else of the first


class _Named(msgspec.Struct):
    model: str | None = None


_name_in = msgspec.json.Decoder(_Named).decode


@dataclass
class FrontState:
    """The door of all models together."""

    fleet: Fleet
    config: ServerConfig
    num_active: int = 0
    draining: bool = False
    started_s: float = field(default_factory=time.time)
    recent_errors: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_RECENT_ERRORS))

    def admit(self) -> None:
        if self.draining:
            raise EngineGone("the server is shutting down and takes no new requests")
        if self.num_active >= self.config.max_concurrent_requests * max(1, self.fleet.num_replicas):
            raise Overloaded(f"{self.num_active} requests are running or waiting: try again in a moment")

    def note_error(self, message: str) -> None:
        self.recent_errors.append(message)

    def choose(self, name: str | None) -> ServedModel | RelayedModel:
        """Any name is a model's while it is the only one, unless strict. Raises UnknownModelName, or EngineGone while no
        worker is there, or none of those that have the name: another model must not answer for one that was killed."""
        there = self.fleet.there
        if name and name in there:
            return there[name]
        if not there:
            raise EngineGone(
                "no model is ready: no worker has registered with the controller"
                if not self.fleet.members
                else "no model is ready: its workers are loading, draining or gone"
            )
        if name and name in self.fleet.known_names:
            raise EngineGone(f"no worker of {name} is ready: they are loading, draining or gone")
        several = len({id(model) for model in there.values()}) > 1
        if several or (name and self.config.strict_model_name):
            asked = f"there is no model {name[:200]!r} here" if name else "several models are here: say which one"
            raise UnknownModelName(f"{asked}; served: {', '.join(there)}")
        return next(iter(there.values()))


def create_front(state: FrontState) -> ASGIApp:
    app = FastAPI(
        title="fastqwen",
        version=__version__,
        description="OpenAI-compatible API for the models of a cluster",
        docs_url=None,
        redoc_url=None,
    )
    app.router.redirect_slashes = False
    errors.install(app, state)
    for path, kind in POSTED.items():
        _add_post(app, state, path, kind)
    for path in ASKED:
        _add_get(app, state, path)
    kept_responses.add_routes(app, lambda: _response_stores(state))
    _add_models(app, state)
    _add_health(app, state)
    add_pages(app)
    docs_page.add_route(app)
    openapi.install(app)
    return Guard(app, state)


class _Handed(Response):
    """The rest of a request, by a model's own application. The body was read already and is given to it again."""

    def __init__(self, app: ASGIApp, body: bytes) -> None:
        self._app, self._body = app, body
        self.status_code = 200  # what FastAPI looks at in a response
        self.background = None
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waiting = [self._body]

        async def receive_again() -> Message:
            if waiting:
                return {"type": "http.request", "body": waiting.pop(), "more_body": False}
            return await receive()

        plain = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"content-encoding")]
        inner = {key: value for key, value in scope.items() if key not in ("app", "router", "endpoint", "route")}
        await self._app({**inner, "headers": plain, "path_params": {}}, receive_again, send)


def _add_post(app: FastAPI, state: FrontState, path: str, kind: type[Body]) -> None:
    async def route(request: Request) -> Response:
        body = bytes(await read_body(request, state.config, _max_numbers(state)))
        try:
            name = _name_in(body).model if body else None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            name = None  # the model's own application says what is wrong with it
        model = state.choose(name)
        if path in COUNTED_PATHS:
            model.admit()
        return _Handed(model.app, body)

    app.post(path, name=kind.__name__, openapi_extra=openapi.documented(kind))(route)


def _max_numbers(state: FrontState) -> int:
    longest = max((model.max_model_len or 0 for model in state.fleet.models.values()), default=0)
    return MANY_NUMBERS + PROMPTS_OF_IDS * longest


def _asked_model(state: FrontState, name: str | None) -> ServedModel:
    """The one that is named, else the first. Raises UnknownModelName for one of another server, which tells no figures."""
    own = [one for one, model in state.fleet.there.items() if isinstance(model, ServedModel)]
    model = state.choose(name or (own[0] if own else None))
    if isinstance(model, RelayedModel):
        raise UnknownModelName("that model's server tells nothing here")
    return model


def _response_stores(state: FrontState) -> list[ResponseStore]:
    return [model.state.responses for model in state.fleet.models.values()]


def _add_get(app: FastAPI, state: FrontState, path: str) -> None:
    async def route(request: Request, model: str | None = None) -> Response:
        return _Handed(_asked_model(state, model).app, b"")

    app.add_api_route(path, route, name=path)


def _add_models(app: FastAPI, state: FrontState) -> None:
    def described(name: str, model: ServedModel | RelayedModel) -> dict[str, Any]:
        if isinstance(model, RelayedModel):
            return {"id": name, "object": "model", "owned_by": "upstream", "replicas": len(model.replicas)}
        return {
            "id": name,
            "object": "model",
            "created": int(state.started_s),
            "owned_by": "fastqwen",
            "max_model_len": model.max_model_len,
            "default_sampling": model.state.text.default_sampling,
            "replicas": len(model.engine.replicas),
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(*one) for one in state.fleet.there.items()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        found = state.fleet.there.get(name)
        if found is None:
            raise UnknownModelName(f"there is no model {name[:200]!r} here; served: {', '.join(state.fleet.there)}")
        return described(name, found)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}


def _add_health(app: FastAPI, state: FrontState) -> None:
    @app.get("/health")
    async def health() -> Response:
        """This process lives."""
        return Response(status_code=200)

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """Some model can answer."""
        if state.draining:
            return JSONResponse({"status": "draining", "progress": 1.0, "message": "the server is shutting down"}, 503)
        try:
            ready_names = [name for name, one in state.fleet.there.items() if one.is_ready]
            if not ready_names:
                state.choose(None)
        except EngineGone as error:
            return JSONResponse({"status": "loading", "progress": 0.0, "message": str(error)}, 503)
        return JSONResponse({"status": "ready", "progress": 1.0, "message": ""})

    page = MetricsPage(lambda: {id(model): model.state for model in state.fleet.models.values()}.values())

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(page.text(), media_type=CONTENT_TYPE_LATEST)

    def workers() -> list[dict[str, Any]]:
        refused = state.fleet.refused
        return [{**msgspec.to_builtins(one), "refused": refused.get(one.key)} for one in state.fleet.members.values()]

    @app.get("/admin/data")
    async def data(model: str | None = None) -> dict[str, Any]:
        """One model's figures over all of its replicas, and all workers."""
        return {**figures_of(_asked_model(state, model).state), "workers": workers()}

    @app.get("/admin/cluster")
    async def cluster() -> dict[str, Any]:
        """Workers, their load and memory, and what this front end makes of them."""
        return {
            "controller_answers": not state.fleet.is_alone,
            "workers": workers(),
            "models": {name: _figures(model) for name, model in state.fleet.there.items()},
        }


def _figures(model: ServedModel | RelayedModel) -> dict[str, Any]:
    router = model.router if isinstance(model, RelayedModel) else model.engine.router
    replicas = model.replicas if isinstance(model, RelayedModel) else model.engine.replicas
    found: dict[str, Any] = {
        "replicas": {
            key: {
                "outstanding_tokens": round(router.outstanding(key)),
                "requests": router.num_requests(key),
                "state": replica.state,
                "draining": replica.is_draining,
            }
            for key, replica in replicas.items()
        }
    }
    if isinstance(model, RelayedModel):
        return found
    return {
        **found,
        "moved_requests": model.engine.num_moved,
        "prompt_tokens": router.num_prompt_tokens,
        "expected_cached_tokens": router.num_hit_tokens,
    }


def serve_front(config: ServerConfig, controller: str, token_file: Path | None) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    end_with_starter()
    configure_logging(config.log_format)
    check_exposure(config)
    token = read_token(token_file)
    address = endpoint(*split_address(controller, CONTROLLER_PORT, "--controller"))
    with bind(config.host, config.port) as bound:
        return run_loop(_serve(config, address, token, bound))


async def _serve(config: ServerConfig, controller: str, token: str, bound: socket.socket) -> int:
    fleet = Fleet(token, controller, config)
    state = FrontState(fleet, config)
    fleet.start()
    address = address_of(config, bound)
    log.info("Open %s to chat. API %s/v1, documentation %s/docs", address, address, address)
    try:
        await DrainingServer(create_front(state), state).serve(sockets=[bound])
    finally:
        await fleet.close()
    return 0
