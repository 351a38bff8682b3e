"""A prompt's answers by beam search, in a Generation's place: whatever API asked, the beams come as its n answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from fastqwen.client.assemble import Piece
from fastqwen.client.beams import Beam, BeamSearch, BeamSearchParams
from fastqwen.client.engine import error_of
from fastqwen.errors import BadRequest
from fastqwen.records import ALL, RequestDelta, SamplingParams, TokenLogprobs
from fastqwen.server.answer.generation import Generation, GenerationOptions
from fastqwen.server.answer.metrics import RequestClock
from fastqwen.server.answer.state import ServerState

# What would bend each step's choice: a search compares the model's own probabilities.
BENDING: dict[str, tuple[Any, ...]] = {
    "logit_bias": (None, {}), "bad_words": ([],), "bad_word_ids": ([],), "allowed_token_ids": (None,), "min_tokens": (0,),
    "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "prompt_logprobs": (None,),
}  # fmt: skip


class BeamGeneration(Generation):
    """As many beams as answers were asked for. Nothing can be told of one before all have ended. Raises BadRequest."""

    def __init__(
        self,
        state: ServerState,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        options: GenerationOptions,
        *,
        length_penalty: float,
    ) -> None:
        for name, neutral in BENDING.items():
            if getattr(sampling, name) not in neutral:
                asked = "bad_words" if name == "bad_word_ids" else name
                raise BadRequest(f"{asked} cannot be combined with use_beam_search", asked)
        if options.grammar is not None:
            raise BadRequest(
                "structured output and tool choices cannot be combined with use_beam_search", "use_beam_search"
            )
        super().__init__(state, request_id, token_ids, sampling, options)
        self.warnings.append(
            "use_beam_search takes the likeliest answers: temperature, cuts and seed have no effect on it"
        )
        params = BeamSearchParams(
            beam_width=sampling.n,
            max_tokens=self._max_tokens,
            ignore_eos=sampling.ignore_eos,
            length_penalty=length_penalty,
        )
        self._search = BeamSearch(
            request_id,
            token_ids,
            params,
            state.facts(),
            stop_token_ids=sampling.stop_token_ids,
            priority=options.priority,
            cache_salt=state.salted(options.cache_salt),
        )

    async def pieces(self, first_index: int = 0) -> AsyncGenerator[tuple[int, Piece], None]:
        self._clock = clock = RequestClock(self._state.metrics, len(self.prompt_token_ids), len(self.choices))
        while requests := self._search.requests():
            told: dict[str, TokenLogprobs] = {}
            with self._state.engine.stream(requests) as stream:
                async for deltas in stream:
                    for delta in deltas:
                        if delta.finish_reason in ("error", "abort"):
                            raise error_of(delta.error)
                        for one in delta.logprobs or []:
                            told[delta.request_id] = one
            self._search.take(told)
        best = self._search.best()
        del self.choices[len(best) :]
        for choice, beam in zip(self.choices, best, strict=True):
            choice.guard = None
            piece = self._told(choice.assembler.feed(self._delta(choice.request.request_id, beam)))
            if choice.parser is not None:
                self._parse(choice, choice.parser, piece)
            clock.saw(choice.index, len(piece.token_ids), time.perf_counter())
            clock.finished(choice.index, piece.finish_reason or "stop", len(piece.token_ids))
            yield first_index + choice.index, piece

    @staticmethod
    def _told(piece: Piece) -> Piece:
        """The engine has nothing left of it that could be aborted."""
        piece.abort = False
        return piece

    def _delta(self, request_id: str, beam: Beam) -> RequestDelta:
        return RequestDelta(
            request_id=request_id,
            token_ids=list(beam.token_ids),
            logprobs=None if self._sampling.logprobs is None else self._logprobs(beam, self._sampling.logprobs),
            finish_reason=beam.finish_reason,
            stop_reason=beam.stop_reason,
        )

    @staticmethod
    def _logprobs(beam: Beam, count: int) -> list[TokenLogprobs]:
        """A search knows the likeliest 2 * width of each token: no more can be told."""
        end = None if count == ALL else count
        return [
            msgspec.structs.replace(one, top_ids=one.top_ids[:end], top_logprobs=one.top_logprobs[:end])
            for one in beam.logprobs
        ]
