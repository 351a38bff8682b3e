"""The routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import Receive, Scope, Send

from fastqwen.errors import BadRequest
from fastqwen.server import errors
from fastqwen.server.body import read_body
from fastqwen.server.chat import Chat
from fastqwen.server.completions import Completion
from fastqwen.server.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse,
)
from fastqwen.server.sse import EventStream
from fastqwen.server.state import ServerState
from fastqwen.version import __version__


def create_app(state: ServerState) -> FastAPI:
    app = FastAPI(title="fastqwen", version=__version__, description="OpenAI-compatible API for Qwen models")
    errors.install(app)
    _add_generation(app, state)
    _add_tokenizer(app, state)
    _add_status(app, state)
    return app


def _documented(kind: type[Body]) -> dict[str, Any]:
    """Bodies are read by our own parser, so their schema is told to the OpenAPI page by hand."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Replace references by what they refer to; request bodies are not recursive."""
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rsplit("/", 1)[1]])
            return {key: resolve(item) for key, item in value.items()}
        return [resolve(item) for item in value] if isinstance(value, list) else value

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def _add_generation(app: FastAPI, state: ServerState) -> None:
    async def answer(request: Request, make: Callable[[], Chat | Completion], stream: bool) -> Response:
        state.admit()
        work = make()
        state.num_active += 1
        try:
            await work.prepare()
            if stream:
                return _Counted(state, EventStream(state, work.events()))
            return await _unless_gone(request, work)
        finally:
            state.num_active -= 1

    @app.post("/v1/chat/completions", openapi_extra=_documented(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = parse(ChatRequest, await read_body(request, state.config.max_body_bytes))
        return await answer(request, lambda: Chat(state, body), body.stream)

    @app.post("/v1/completions", openapi_extra=_documented(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = parse(CompletionRequest, await read_body(request, state.config.max_body_bytes))
        return await answer(request, lambda: Completion(state, body), body.stream)


class _Counted(Response):
    """A stream counts as active until its last byte was sent."""

    def __init__(self, state: ServerState, stream: EventStream) -> None:
        self._state = state
        self._stream = stream
        self.status_code = 200
        self.background = None
        self.body = b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._state.num_active += 1
        try:
            await self._stream(scope, receive, send)
        finally:
            self._state.num_active -= 1


async def _unless_gone(request: Request, work: Chat | Completion) -> Response:
    """The whole answer, or nothing if the client leaves first: then the work is aborted."""
    import asyncio

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.create_task(work.response())
    leaving = asyncio.create_task(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return Response(msgspec.json.encode(answering.result()), media_type="application/json")
        return Response(status_code=499)
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


def _add_tokenizer(app: FastAPI, state: ServerState) -> None:
    @app.post("/tokenize", openapi_extra=_documented(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = parse(TokenizeRequest, await read_body(request, state.config.max_body_bytes))
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("give either prompt or messages", "prompt")
        if body.messages is not None:
            tokens = await state.apply_template(
                [message.for_template() for message in body.messages],
                add_generation_prompt=body.add_generation_prompt,
                options=body.chat_template_kwargs,
            )
        else:
            tokens = await state.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return {"count": len(tokens), "max_model_len": state.limits().max_model_len, "tokens": tokens}

    @app.post("/detokenize", openapi_extra=_documented(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        body = parse(DetokenizeRequest, await read_body(request, state.config.max_body_bytes))
        return {"prompt": state.text.tokenizer.decode(body.tokens)}


def _add_status(app: FastAPI, state: ServerState) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        ready = state.engine.ready
        entries = [
            {
                "id": name,
                "object": "model",
                "created": int(state.started_s),
                "owned_by": "fastqwen",
                "root": state.engine_config.model,
                "max_model_len": None if ready is None else ready.plan.max_model_len,
            }
            for name in state.names
        ]
        return {"object": "list", "data": entries}

    @app.get("/health")
    async def health() -> Response:
        """The API process lives."""
        return Response(status_code=200)

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        """The engine is loaded and has spoken lately."""
        done, total = state.engine.loading
        body = {"status": state.engine.state, "progress": done / total if total else 0.0, "message": ""}
        if state.draining:
            return JSONResponse({**body, "status": "draining", "message": "the server is shutting down"}, 503)
        if state.engine.state != "ready":
            return JSONResponse({**body, "message": state.why_not_ready()}, 503)
        if state.engine.silent_for_s > state.config.ready_within_s:
            silent = f"the engine has been silent for {state.engine.silent_for_s:.0f} s"
            return JSONResponse({**body, "status": "stuck", "message": silent}, 503)
        return JSONResponse({**body, "progress": 1.0})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(state.metrics.text(state.engine.stats), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}
