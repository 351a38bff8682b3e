"""POST /v1/embeddings"""

from __future__ import annotations

import base64
from typing import Any

from fastqwen.client.engine import error_of
from fastqwen.client.prepare import check_dimensions, prepare_embedding, truncated
from fastqwen.client.vectors import vector_of
from fastqwen.errors import BadRequest
from fastqwen.records import EngineRequest, RequestDelta
from fastqwen.server.answer.metrics import RequestClock
from fastqwen.server.answer.state import ServerState, new_id
from fastqwen.server.dialects.openai import noted
from fastqwen.server.dialects.schema import EmbeddingRequest, as_list

MAX_INPUTS = 2048  # as OpenAI's


class Embeddings:
    """One request: each input's vector, in order."""

    def __init__(self, state: ServerState, body: EmbeddingRequest) -> None:
        self._state = state
        self._body = body
        self._id = new_id("embd")
        self._model = state.model_name(body.model)
        self._requests: list[EngineRequest] = []

    async def prepare(self) -> None:
        """Tokenise and check everything before anything runs. Raises BadRequest."""
        body, facts = self._body, self._state.facts()
        check_dimensions(body.dimensions, facts)
        inputs = as_list(body.input)
        if not inputs:
            raise BadRequest("input is empty, at least one text is needed", "input")
        if len(inputs) > MAX_INPUTS:
            raise BadRequest(f"input has {len(inputs)} texts, at most {MAX_INPUTS} are allowed in one request", "input")
        for index, one in enumerate(inputs):
            field = "input" if len(inputs) == 1 else f"input.{index}"
            self._requests.append(
                prepare_embedding(
                    f"{self._id}-{index}",
                    await self._ids(one, field) if isinstance(one, str) else self._cut(one),
                    facts,
                    field=field,
                    priority=body.priority,
                    cache_salt=self._state.salted(body.cache_salt),
                )
            )

    async def _ids(self, text: str, field: str) -> list[int]:
        special = self._body.add_special_tokens
        try:
            ids = await self._state.tokenize(text, add_special_tokens=special)
        except BadRequest as error:
            raise BadRequest(
                f"{field}: {error}", field if error.param == "prompt" else error.param, error.code
            ) from None
        return self._cut(self._state.text.tokenizer.closed_once(self._cut(ids)) if special else ids)

    def _cut(self, ids: list[int]) -> list[int]:
        return truncated(ids, self._body.truncate_prompt_tokens, self._state.facts(), answers=False)

    async def response(self) -> dict[str, Any]:
        found = await self._run()
        data = [
            {"object": "embedding", "index": index, "embedding": self._written(found[one.request_id])}
            for index, one in enumerate(self._requests)
        ]
        prompt = sum(len(one.prompt_token_ids) for one in self._requests)
        cached = sum(delta.num_cached_tokens for delta in found.values())
        return {
            "object": "list",
            "data": data,
            "model": self._model,
            "usage": {
                "prompt_tokens": prompt,
                "total_tokens": prompt,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
            **noted(self._state, self._body.warnings),
        }

    async def _run(self) -> dict[str, RequestDelta]:
        """Raises GenerationFailed if the engine cannot finish one of them; the others are aborted then."""
        metrics = self._state.metrics
        clocks = {one.request_id: RequestClock(metrics, len(one.prompt_token_ids), 1) for one in self._requests}
        found: dict[str, RequestDelta] = {}
        with self._state.engine.stream(self._requests) as stream:
            async for deltas in stream:
                for delta in deltas:
                    assert delta.finish_reason is not None
                    clocks[delta.request_id].finished(0, delta.finish_reason, 0)
                    if delta.embedding is None:
                        raise error_of(delta.error)
                    found[delta.request_id] = delta
        return found

    def _written(self, delta: RequestDelta) -> list[float] | str:
        vector = vector_of(delta, self._body.dimensions)
        if self._body.encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        floats: list[float] = vector.tolist()
        return floats
