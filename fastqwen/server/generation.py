"""One prompt's way through the engine and back: n sequences, their texts, and what the metrics want to know."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from fastqwen.client.assemble import Assembler, Piece
from fastqwen.client.prepare import prepare
from fastqwen.errors import BadRequest
from fastqwen.outputs import CompletionOutput, Logprob
from fastqwen.records import SamplingParams
from fastqwen.server.state import ServerState


class Generation:
    """Iterate ``pieces`` once; afterwards ``outputs`` holds the whole answers. Raises BadRequest when made."""

    def __init__(
        self,
        state: ServerState,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        limits = state.limits()
        self._state = state
        self.prompt_token_ids = token_ids
        self.requests = prepare(
            request_id,
            token_ids,
            sampling,
            limits,
            seeds=state.seeds,
            priority=priority,
            cache_salt=cache_salt,
        )
        room = limits.max_model_len - len(token_ids)
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise BadRequest(
                f"the prompt has {len(token_ids)} tokens and max_tokens is {sampling.max_tokens}, together more than the "
                f"model's context of {limits.max_model_len} tokens: at most {room} can be generated",
                "max_tokens",
                "context_length_exceeded",
            )
        self._assemblers = {
            request.request_id: Assembler(index, sampling, state.text.tokenizer, limits.stop_token_ids)
            for index, request in enumerate(self.requests)
        }
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if sampling.prompt_logprobs is None else [None]
        )

    @property
    def outputs(self) -> list[CompletionOutput]:
        return [assembler.output for assembler in self._assemblers.values()]

    @property
    def num_cached_tokens(self) -> int:
        return max(assembler.num_cached_tokens for assembler in self._assemblers.values())

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index of the answer, what it gained) until each answer has its finish_reason."""
        clock = _Clock(self._state, len(self.prompt_token_ids))
        async for deltas in self._state.engine.stream(self.requests):
            for delta in deltas:
                assembler = self._assemblers[delta.request_id]
                if assembler.output.finish_reason is not None:
                    continue  # the abort that a stop string asked for
                piece = assembler.feed(delta)
                clock.saw(len(piece.token_ids))
                if piece.prompt_logprobs and assembler.output.index == 0 and self.prompt_logprobs is not None:
                    self.prompt_logprobs.extend(piece.prompt_logprobs)
                if piece.abort:
                    self._state.engine.abort([delta.request_id])
                if piece.finish_reason is not None:
                    clock.finished(piece.finish_reason, len(assembler.output.token_ids))
                yield assembler.output.index, piece

    async def finish(self) -> list[CompletionOutput]:
        """Run to the end without streaming. Raises GenerationFailed if the engine reports an error."""
        async for _, piece in self.pieces():
            if piece.finish_reason == "error":
                raise GenerationFailed(piece.error or "the engine failed")
            if piece.finish_reason == "abort":
                raise GenerationFailed(piece.error or "the request was aborted")
        return self.outputs


class GenerationFailed(Exception):
    """The engine accepted the request, but could not finish it."""


class _Clock:
    def __init__(self, state: ServerState, num_prompt_tokens: int) -> None:
        self._metrics = state.metrics
        self._start_s = self._last_s = time.perf_counter()
        self._first_s: float | None = None
        self._metrics.count(self._metrics.prompt_tokens, num_prompt_tokens)
        self._metrics.observe(self._metrics.request_prompt_tokens, num_prompt_tokens)

    def saw(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        now_s = time.perf_counter()
        if self._first_s is None:
            self._first_s = now_s
            self._metrics.observe(self._metrics.ttft_s, now_s - self._start_s)
        else:
            self._metrics.observe(self._metrics.itl_s, now_s - self._last_s)
        self._last_s = now_s
        self._metrics.count(self._metrics.generation_tokens, num_tokens)

    def finished(self, reason: str, num_tokens: int) -> None:
        self._metrics.finished(reason)
        self._metrics.observe(self._metrics.e2e_s, self._last_s - self._start_s)
        self._metrics.observe(self._metrics.request_generation_tokens, num_tokens)
        if self._first_s is not None and num_tokens > 1:
            self._metrics.observe(self._metrics.tpot_s, (self._last_s - self._first_s) / (num_tokens - 1))
