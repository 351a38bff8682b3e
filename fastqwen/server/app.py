"""The routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp

from fastqwen.errors import BadRequest
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.chat import Chat
from fastqwen.server.dialects.completions import Completion
from fastqwen.server.dialects.embeddings import Embeddings
from fastqwen.server.dialects.messages import CountRequest, Messages, MessagesRequest, count_tokens
from fastqwen.server.dialects.responses import Responses, ResponsesRequest
from fastqwen.server.dialects.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
    parse,
)
from fastqwen.server.http import docs_page, errors, openapi
from fastqwen.server.http.body import read_body, unless_gone
from fastqwen.server.http.guard import Guard
from fastqwen.server.http.sse import EventStream
from fastqwen.server.operator import status
from fastqwen.version import __version__


def create_app(state: ServerState) -> ASGIApp:
    """Everything behind the guard, which decides who may ask at all."""
    app = FastAPI(
        title="fastqwen",
        version=__version__,
        description="OpenAI-compatible API for Qwen models",
        docs_url=None,  # FastAPI's own pages load their scripts from elsewhere; docs_page.py does not
        redoc_url=None,
    )
    app.router.redirect_slashes = False
    errors.install(app, state)
    _add_generation(app, state)
    _add_tokenizer(app, state)
    status.add_routes(app, state)
    docs_page.add_route(app)
    openapi.install(app)
    return Guard(app, state)


class Whole(Protocol):
    async def prepare(self) -> None: ...

    async def response(self) -> dict[str, Any]: ...


class Work(Whole, Protocol):
    def events(self) -> AsyncGenerator[bytes, None]: ...


def documented(kind: type[Body]) -> dict[str, Any]:
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
    stall_s = state.config.stall_timeout_s

    async def answer(request: Request, work: Work, stream: bool) -> Response:
        await work.prepare()
        if stream:
            return EventStream(work.events(), stall_timeout_s=stall_s)
        return await whole(request, work)

    @app.post("/v1/chat/completions", openapi_extra=documented(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        body = parse(ChatRequest, await read_body(request, state.config))
        return await answer(request, Chat(state, body, explain_cache=explains_cache(request)), body.stream)

    @app.post("/v1/completions", openapi_extra=documented(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = parse(CompletionRequest, await read_body(request, state.config))
        return await answer(request, Completion(state, body, explain_cache=explains_cache(request)), body.stream)

    @app.post("/v1/embeddings", openapi_extra=documented(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        body = parse(EmbeddingRequest, await read_body(request, state.config))
        work = Embeddings(state, body)
        await work.prepare()
        return await whole(request, work)

    @app.post("/v1/responses", openapi_extra=documented(ResponsesRequest))
    async def responses(request: Request) -> Response:
        body = parse(ResponsesRequest, await read_body(request, state.config))
        work = Responses(state, body, explain_cache=explains_cache(request))
        await work.prepare()
        if body.stream:
            return EventStream(work.events(), stall_timeout_s=stall_s, done=b"", error_name="error")
        return await whole(request, work)

    @app.post("/v1/messages", openapi_extra=documented(MessagesRequest))
    async def messages(request: Request) -> Response:
        body = parse(MessagesRequest, await read_body(request, state.config))
        work = Messages(state, body, explain_cache=explains_cache(request))
        await work.prepare()
        if body.stream:
            return EventStream(work.events(), stall_timeout_s=stall_s, done=b"", error_name="error")
        return await whole(request, work)

    @app.post("/v1/messages/count_tokens", openapi_extra=documented(CountRequest))
    async def counted(request: Request) -> dict[str, int]:
        return await count_tokens(state, parse(CountRequest, await read_body(request, state.config)))


def explains_cache(request: Request) -> bool:
    asked = request.query_params.get("explain_cache") or request.headers.get("x-explain-cache") or "0"
    return asked.lower() in ("1", "true", "yes")


async def whole(request: Request, work: Whole) -> Response:
    answer = await unless_gone(request, work.response())
    if answer is None:
        return Response(status_code=499)
    return Response(msgspec.json.encode(answer), media_type="application/json")


def _add_tokenizer(app: FastAPI, state: ServerState) -> None:
    @app.post("/tokenize", openapi_extra=documented(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = parse(TokenizeRequest, await read_body(request, state.config))
        state.model_name(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("give either prompt or messages", "prompt")
        for name in ("tools", "chat_template_kwargs"):
            if body.prompt is not None and getattr(body, name):
                raise BadRequest(f"{name} belongs to messages and has no effect on a prompt", name)
        if body.messages is not None:
            options = dict(body.chat_template_kwargs or {})
            if body.tools:
                options["tools"] = [tool.for_template() for tool in body.tools]
            tokens = await state.apply_template(
                [message.for_template() for message in body.messages],
                options,
                add_generation_prompt=body.add_generation_prompt,
            )
        else:
            tokens = await state.tokenize(body.prompt or "", add_special_tokens=body.add_special_tokens)
        return {"count": len(tokens), "max_model_len": state.limits().max_model_len, "tokens": tokens}

    @app.post("/detokenize", openapi_extra=documented(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        body = parse(DetokenizeRequest, await read_body(request, state.config))
        state.model_name(body.model)
        return {"prompt": state.text.tokenizer.decode(body.tokens)}
