"""The routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp

from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects import kept_responses
from fastqwen.server.dialects.body import Body
from fastqwen.server.dialects.chat import Chat
from fastqwen.server.dialects.chat_batch import ChatBatchRequest, chat_batch
from fastqwen.server.dialects.checking import read_as
from fastqwen.server.dialects.classify import ClassifyRequest, classify
from fastqwen.server.dialects.completions import Completion
from fastqwen.server.dialects.embeddings import CohereEmbedRequest, EmbeddingRequest, cohere_embed, embed
from fastqwen.server.dialects.invocations import meant
from fastqwen.server.dialects.messages import CountRequest, Messages, MessagesRequest, count_tokens
from fastqwen.server.dialects.pooling import PoolingRequest, pool
from fastqwen.server.dialects.responses import Responses
from fastqwen.server.dialects.responses_request import ResponsesRequest
from fastqwen.server.dialects.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from fastqwen.server.dialects.scores import RerankRequest, ScoreRequest, rerank, score
from fastqwen.server.dialects.tokens import detokenize, tokenize, tokenizer_info
from fastqwen.server.http import docs_page, errors, openapi
from fastqwen.server.http.access_log import note_tokens
from fastqwen.server.http.body import read_body, unless_gone
from fastqwen.server.http.guard import Guard
from fastqwen.server.http.pages import add_pages
from fastqwen.server.http.sse import DONE, EventStream, encode
from fastqwen.server.operator import control, status
from fastqwen.server.operator.tools import add_tools
from fastqwen.version import __version__

B = TypeVar("B", bound=Body)
Answer = Callable[[Request, bytearray], Awaitable[Response]]  # to a body that was read

MANY_NUMBERS, PROMPTS_OF_IDS = 2**17, 8


def create_app(state: ServerState) -> ASGIApp:
    """Everything behind the guard, which decides who may ask at all."""
    return Guard(create_routes(state), state)


def create_routes(state: ServerState) -> FastAPI:
    """Of one model, for who guards them."""
    app = FastAPI(
        title="fastqwen",
        version=__version__,
        description="OpenAI-compatible API for Qwen models",
        openapi_url=None,  # written anew for each request, while docs_page.py does so once
        docs_url=None,  # and these load their scripts from elsewhere
        redoc_url=None,
        servers=[{"url": state.config.root_path}] if state.config.root_path else None,
    )
    app.router.redirect_slashes = False
    errors.install(app, state)
    _add_dialects(app, state)
    status.add_routes(app, state)
    control.add_routes(app, state)
    if state.mcp is not None:
        add_tools(app, state, state.mcp)
    add_pages(app)
    docs_page.add_route(app)
    openapi.install(app)
    return app


class Work(Protocol):
    """One request: checked by ``prepare`` before anything runs, then streamed or answered as a whole."""

    async def prepare(self) -> None: ...

    def events(self) -> AsyncGenerator[bytes, None]: ...

    async def response(self) -> dict[str, Any]: ...

    def tokens(self) -> tuple[int, int]:
        """Of the prompts and of the answers so far."""

    def failure(self, status: int, body: dict[str, Any]) -> bytes:
        """The event that ends a stream in which something went wrong."""


def _add_dialects(app: FastAPI, state: ServerState) -> None:
    answers: dict[str, Answer] = {}

    def add_post(path: str, name: str, kind: type[B], answer: Callable[[Request, B], Any]) -> None:
        async def answer_to(request: Request, body: bytearray) -> Response:
            checked = await read_as(state, kind, body)
            del body
            found = await answer(request, checked)
            return found if isinstance(found, Response) else _json(found)

        async def route(request: Request) -> Response:
            return await answer_to(request, await read_body(request, state.config, _max_numbers(state)))

        answers[path] = answer_to
        app.post(path, name=name, openapi_extra=openapi.documented(kind))(route)

    def add_work(path: str, name: str, kind: type[B], make: Callable[..., Work], done: bytes = DONE) -> None:
        """``done``: how a stream of this API ends."""

        async def answer(request: Request, body: Any) -> Response:
            work = make(state, body, explain_cache=_explains_cache(request))
            await work.prepare()
            note_tokens(request.scope, work.tokens)
            if body.stream:
                stall_timeout_s = state.config.stall_timeout_s
                return EventStream(work.events(), stall_timeout_s=stall_timeout_s, done=done, failure=work.failure)
            return await _whole(request, work.response())

        add_post(path, name, kind, answer)

    def add_whole(path: str, name: str, kind: type[B], make: Callable[[ServerState, Any], Any]) -> None:
        async def answer(request: Request, body: B) -> Response:
            return await _whole(request, make(state, body))

        add_post(path, name, kind, answer)

    add_work("/v1/chat/completions", "chat_completions", ChatRequest, Chat)
    add_whole("/v1/chat/completions/batch", "chat_batch", ChatBatchRequest, chat_batch)
    add_work("/v1/completions", "completions", CompletionRequest, Completion)
    add_work("/v1/responses", "responses", ResponsesRequest, Responses, done=b"")
    add_work("/v1/messages", "messages", MessagesRequest, Messages, done=b"")
    add_post("/v1/messages/count_tokens", "counted", CountRequest, lambda _, body: count_tokens(state, body))
    kept_responses.add_routes(app, lambda: [state.responses])
    add_whole("/v1/embeddings", "embeddings", EmbeddingRequest, embed)
    add_whole("/v2/embed", "cohere_embed", CohereEmbedRequest, cohere_embed)
    add_whole("/v1/score", "score", ScoreRequest, score)
    add_whole("/v1/rerank", "rerank", RerankRequest, rerank)
    add_whole("/classify", "classify", ClassifyRequest, classify)
    add_whole("/pooling", "pooling", PoolingRequest, pool)
    add_post("/tokenize", "tokenize", TokenizeRequest, lambda _, body: tokenize(state, body))
    add_post("/detokenize", "detokenize", DetokenizeRequest, lambda _, body: detokenize(state, body))

    @app.post("/invocations", include_in_schema=False)
    async def invocations(request: Request) -> Response:
        """SageMaker's one route for all: the body says which of the others is meant."""
        body = await read_body(request, state.config, _max_numbers(state))
        return await answers[meant(body, state.facts().model)](request, body)

    @app.get("/tokenizer_info")
    async def info() -> dict[str, Any]:
        """What a client must know to make prompts of its own."""
        return tokenizer_info(state)


def _max_numbers(state: ServerState) -> int:
    """Of a body: token ids of a few prompts as long as the model takes them, or of many short ones."""
    ready = state.engine.ready
    return MANY_NUMBERS if ready is None else MANY_NUMBERS + PROMPTS_OF_IDS * ready.plan.max_model_len


def _explains_cache(request: Request) -> bool:
    asked = request.query_params.get("explain_cache") or request.headers.get("x-explain-cache") or "0"
    return asked.lower() in ("1", "true", "yes")


async def _whole(request: Request, work: Any) -> Response:
    answer = await unless_gone(request, work)
    return Response(status_code=499) if answer is None else _json(answer)


def _json(answer: dict[str, Any]) -> Response:
    return Response(encode(answer), media_type="application/json")
