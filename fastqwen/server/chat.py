"""POST /v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastqwen.client.assemble import Piece
from fastqwen.errors import BadRequest
from fastqwen.outputs import CompletionOutput, Logprob
from fastqwen.server.completions import finite, prompt_logprobs_json
from fastqwen.server.generation import Generation, GenerationFailed
from fastqwen.server.schema import ChatRequest
from fastqwen.server.state import ServerState, new_id
from fastqwen.server.usage import usage_of


class Chat:
    """One request. ``events`` streams it, ``response`` waits for the whole."""

    def __init__(self, state: ServerState, body: ChatRequest) -> None:
        self._state = state
        self._body = body
        self._id = new_id("chatcmpl")
        self._created = int(time.time())
        self._model = state.model_name(body.model)
        self._generation: Generation | None = None

    async def prepare(self) -> None:
        """Render, tokenise and check before anything runs. Raises BadRequest."""
        body = self._body
        if body.top_logprobs and not body.logprobs:
            raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
        limits = self._state.limits()
        changes: dict[str, Any] = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None}
        if body.max_completion_tokens is not None:
            changes["max_tokens"] = body.max_completion_tokens
        elif body.max_tokens is None:
            changes["max_tokens"] = None
        sampling = body.sampling(self._state.text.default_sampling, **changes)
        token_ids = await self._state.apply_template(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            options=body.chat_template_kwargs,
        )
        if len(token_ids) >= limits.max_model_len:
            raise BadRequest(
                f"the messages have {len(token_ids)} tokens, but the model's context is {limits.max_model_len} tokens, "
                "prompt and answer together: shorten the conversation",
                "messages",
                "context_length_exceeded",
            )
        self._generation = Generation(
            self._state, self._id, token_ids, sampling, priority=body.priority, cache_salt=body.cache_salt
        )

    async def response(self) -> dict[str, Any]:
        assert self._generation is not None
        outputs = await self._generation.finish()
        response = {
            **self._head("chat.completion"),
            "choices": [self._choice(output) for output in outputs],
            "usage": usage_of([self._generation]),
        }
        if self._body.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs_json(self._generation.prompt_logprobs)
        warnings = self._body.warnings()
        if warnings:
            response["warnings"] = warnings
        return response

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        assert self._generation is not None
        options = self._body.stream_options
        head = self._head("chat.completion.chunk")
        yield [
            self._chunk(head, index, {"role": "assistant", "content": ""})
            for index in range(len(self._generation.requests))
        ]
        async for index, piece in self._generation.pieces():
            if piece.finish_reason in ("error", "abort"):
                raise GenerationFailed(piece.error or "the request was aborted")
            chunk = self._piece_chunk(head, index, piece)
            if chunk is not None:
                if options is not None and options.continuous_usage_stats:
                    chunk["usage"] = usage_of([self._generation])
                yield [chunk]
        if options is not None and options.include_usage:
            yield [{**head, "choices": [], "usage": usage_of([self._generation])}]

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, output: CompletionOutput) -> dict[str, Any]:
        return {
            "index": output.index,
            "message": {"role": "assistant", "content": output.text},
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }

    def _piece_chunk(self, head: dict[str, Any], index: int, piece: Piece) -> dict[str, Any] | None:
        """None for a piece that holds nothing for the reader yet, such as half of a character."""
        if not piece.text and piece.logprobs is None and piece.finish_reason is None:
            return None
        delta = {"content": piece.text} if piece.text or piece.logprobs is not None else {}
        chunk = self._chunk(head, index, delta, piece.finish_reason)
        choice = chunk["choices"][0]
        if piece.logprobs is not None:
            choice["logprobs"] = self._logprobs(piece.logprobs)
        if piece.finish_reason is not None:
            choice["stop_reason"] = piece.stop_reason
        return chunk

    @staticmethod
    def _chunk(head: dict[str, Any], index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**head, "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}

    def _logprobs(self, listed: list[dict[int, Logprob]] | None) -> dict[str, Any] | None:
        if listed is None:
            return None
        return {"content": [self._token_logprobs(one) for one in listed]}

    def _token_logprobs(self, one: dict[int, Logprob]) -> dict[str, Any]:
        entries = [self._entry(token_id, logprob) for token_id, logprob in one.items()]
        count = self._body.top_logprobs or 0
        ranked = sorted(one.items(), key=lambda item: item[1].rank or 0)[:count]
        return {**entries[0], "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in ranked]}

    def _entry(self, token_id: int, logprob: Logprob) -> dict[str, Any]:
        data = self._state.text.tokenizer.token_bytes(token_id)
        return {"token": logprob.decoded_token or "", "logprob": finite(logprob.logprob), "bytes": list(data)}
