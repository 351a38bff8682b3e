"""POST /v1/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastqwen.client.assemble import Piece
from fastqwen.errors import BadRequest
from fastqwen.outputs import CompletionOutput, Logprob
from fastqwen.server.generation import Generation, GenerationFailed
from fastqwen.server.schema import CompletionRequest
from fastqwen.server.state import ServerState, new_id
from fastqwen.server.usage import usage_of

MAX_PROMPTS = 1024


class Completion:
    """One request: its prompts, each with n answers. ``events`` streams it, ``response`` waits for the whole."""

    def __init__(self, state: ServerState, body: CompletionRequest) -> None:
        self._state = state
        self._body = body
        self._id = new_id("cmpl")
        self._created = int(time.time())
        self._model = state.model_name(body.model)
        self._generations: list[Generation] = []

    async def prepare(self) -> None:
        """Tokenise and check everything before anything runs. Raises BadRequest."""
        body = self._body
        sampling = body.sampling(self._state.text.default_sampling, logprobs=body.logprobs)
        if body.echo and body.logprobs is not None:
            sampling.prompt_logprobs = body.logprobs
        for index, token_ids in enumerate(await self._prompts()):
            self._generations.append(
                Generation(
                    self._state,
                    f"{self._id}-{index}",
                    token_ids,
                    sampling,
                    priority=body.priority,
                    cache_salt=body.cache_salt,
                )
            )

    async def response(self) -> dict[str, Any]:
        from fastqwen.server.merge import gather

        await gather([generation.finish() for generation in self._generations])
        choices = []
        for prompt_index, generation in enumerate(self._generations):
            for output in generation.outputs:
                index = prompt_index * len(generation.outputs) + output.index
                choices.append(self._choice(index, generation, output))
        return {**self._head(), "choices": choices, "usage": usage_of(self._generations), **self._notes()}

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        from fastqwen.server.merge import merge

        options = self._body.stream_options
        echoed: set[int] = set()
        async for prompt_index, (output_index, piece) in merge([one.pieces() for one in self._generations]):
            if piece.finish_reason in ("error", "abort"):
                raise GenerationFailed(piece.error or "the request was aborted")
            generation = self._generations[prompt_index]
            index = prompt_index * len(generation.outputs) + output_index
            chunk = self._chunk(index, generation, piece, echo=self._body.echo and index not in echoed)
            echoed.add(index)
            if options is not None and options.continuous_usage_stats:
                chunk["usage"] = usage_of(self._generations)
            yield [chunk]
        if options is not None and options.include_usage:
            yield [{**self._head(), "choices": [], "usage": usage_of(self._generations)}]

    async def _prompts(self) -> list[list[int]]:
        prompt = self._body.prompt
        if isinstance(prompt, str):
            prompt = [prompt]
        if not prompt:
            raise BadRequest("the list of prompts is empty", "prompt")
        if len(prompt) > MAX_PROMPTS and not isinstance(prompt[0], int):
            raise BadRequest(f"{len(prompt)} prompts in one request, at most {MAX_PROMPTS} are allowed", "prompt")
        if isinstance(prompt[0], int):
            return [prompt]
        special = self._body.add_special_tokens
        return [
            await self._state.tokenize(one, add_special_tokens=special) if isinstance(one, str) else list(one)
            for one in prompt
        ]

    def _head(self) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}

    def _notes(self) -> dict[str, Any]:
        warnings = self._body.warnings()
        return {"warnings": warnings} if warnings else {}

    def _choice(self, index: int, generation: Generation, output: CompletionOutput) -> dict[str, Any]:
        text, logprobs = output.text, output.logprobs
        listed: list[dict[int, Logprob] | None] = list(logprobs or [])
        if self._body.echo:
            text = self._prompt_text(generation) + text
            listed = [*(generation.prompt_logprobs or []), *listed]
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(listed, generation) if self._body.logprobs is not None else None,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(generation.prompt_logprobs)
        return choice

    def _chunk(self, index: int, generation: Generation, piece: Piece, *, echo: bool) -> dict[str, Any]:
        listed: list[dict[int, Logprob] | None] = list(piece.logprobs or [])
        if echo:
            listed = [*(generation.prompt_logprobs or []), *listed]
        choice = {
            "index": index,
            "text": (self._prompt_text(generation) if echo else "") + piece.text,
            "logprobs": self._logprobs(listed, generation) if self._body.logprobs is not None else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        return {**self._head(), "choices": [choice]}

    def _prompt_text(self, generation: Generation) -> str:
        if isinstance(self._body.prompt, str):
            return self._body.prompt
        return self._state.text.tokenizer.decode(generation.prompt_token_ids)

    def _logprobs(self, listed: list[dict[int, Logprob] | None], generation: Generation) -> dict[str, Any]:
        """OpenAI's completions shape: parallel lists."""
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, float] | None] = []
        offsets: list[int] = []
        offset = 0
        for position, one in enumerate(listed):
            if one is None:
                token = self._state.text.tokenizer.token_text(generation.prompt_token_ids[position])
                chosen.append(None)
                top.append(None)
            else:
                first = next(iter(one.values()))
                token = first.decoded_token or ""
                chosen.append(finite(first.logprob))
                top.append(
                    {alternative.decoded_token or "": finite(alternative.logprob) for alternative in one.values()}
                )
            tokens.append(token)
            offsets.append(offset)
            offset += len(token)
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI uses this number for impossible tokens."""
    return max(logprob, -9999.0)


def prompt_logprobs_json(found: list[dict[int, Logprob] | None] | None) -> list[dict[str, Any] | None]:
    return [
        None
        if one is None
        else {
            str(token_id): {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token_id, entry in one.items()
        }
        for one in found or []
    ]
