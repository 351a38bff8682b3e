"""GET /v1/responses/{id}: an answer that is remembered, once more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import FastAPI

from fastqwen.errors import BadRequest
from fastqwen.server.answer.response_store import ResponseStore


def add_routes(app: FastAPI, stores: Callable[[], Iterable[ResponseStore]]) -> None:
    """``stores``: of all models that answer here."""

    def found(response_id: str) -> dict[str, Any]:
        """Raises BadRequest."""
        for store in stores():
            whole = store.whole(response_id)
            if whole is not None:
                return whole
        raise BadRequest(f"Response with id {response_id[:100]!r} not found.", "response_id", "response_not_found")

    @app.get("/v1/responses/{response_id}")
    async def kept_response(response_id: str) -> dict[str, Any]:
        """One of the last answers of /v1/responses that were to be stored."""
        return found(response_id)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> dict[str, Any]:
        """No answer is computed in the background, so that there is nothing to cancel."""
        found(response_id)
        raise BadRequest("Cannot cancel a synchronous response.", "response_id")
