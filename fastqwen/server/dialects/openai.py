"""What OpenAI's chat and completions have in common: the head of an answer, its notes, usage, log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from fastqwen.client.prepare import spellings
from fastqwen.errors import BadRequest
from fastqwen.outputs import Logprob
from fastqwen.records import SamplingParams
from fastqwen.server.answer.beams import BeamGeneration
from fastqwen.server.answer.cache_story import CacheStory
from fastqwen.server.answer.generation import Generation, GenerationOptions
from fastqwen.server.answer.kept import ASIDE_FROM
from fastqwen.server.answer.state import ServerState, new_id
from fastqwen.server.dialects.schema import SamplingFields
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.server.http.sse import encode, event

# Of a whole answer: clients read them without asking whether they are there.
WITHOUT_MEANING: dict[str, Any] = {"system_fingerprint": None, "service_tier": None, "prompt_logprobs": None}


class OpenAIWork:
    """One request: ``prepare`` fills ``generations``."""

    def __init__(self, state: ServerState, body: SamplingFields, *, prefix: str, explain_cache: bool) -> None:
        self.generations: list[Generation] = []
        self._state = state
        self._body = body
        self._explain_cache = explain_cache
        self._id = new_id(prefix) if body.request_id is None else f"{prefix}-{body.request_id}"
        self._engine_id = new_id(prefix)  # which no client can give twice
        self._created = int(time.time())
        self._model = state.model_name(body.model)
        self._story: CacheStory | None = None
        self.warnings = body.warnings
        options = body.stream_options
        if options is not None and not body.stream:
            if options.include_usage or options.continuous_usage_stats:
                raise BadRequest("stream_options is for streams: set stream to true, or leave it out", "stream_options")
            self.warnings.tell("stream_options has no effect: stream is not true")
        forced = state.config.enable_force_include_usage
        self._final_usage = forced or (options is not None and options.include_usage)
        self._always_usage = forced or (self._final_usage and options is not None and options.continuous_usage_stats)

    @property
    def generation(self) -> Generation:
        assert self.generations, "prepare comes first"
        return self.generations[0]

    def check_named_tokens(self, *, asked: bool) -> None:
        """``asked``: log-probabilities were. Raises BadRequest."""
        body = self._body
        if not body.logprob_token_ids:
            return
        if not asked:
            raise BadRequest("logprob_token_ids needs logprobs", "logprob_token_ids")
        if body.use_beam_search:
            raise BadRequest("logprob_token_ids cannot be combined with use_beam_search", "logprob_token_ids")

    async def forbid_words(self, sampling: SamplingParams) -> None:
        """Texts to tokens, where texts of anybody's are encoded. Raises BadRequest."""
        words, sampling.bad_words = sampling.bad_words, []
        found = [await self._state.tokenize(one, add_special_tokens=False) for one in spellings(words)]
        sampling.bad_word_ids = [ids for ids in found if ids]

    def generated(
        self, number: int, token_ids: list[int], sampling: SamplingParams, options: GenerationOptions
    ) -> Generation:
        """The engine's work for one prompt. Raises BadRequest."""
        name = f"{self._engine_id}-{number}"
        if not self._body.use_beam_search:
            return Generation(self._state, name, token_ids, sampling, options)
        penalty = self._body.length_penalty
        return BeamGeneration(self._state, name, token_ids, sampling, options, length_penalty=penalty)

    def token_name(self, token_id: int, text: str | None) -> str:
        """What log-probabilities call a token."""
        by_id = self._body.return_tokens_as_token_ids or self._state.config.return_tokens_as_token_ids
        return f"token_id:{token_id}" if by_id else text or ""

    async def written(self, write: Callable[[], Iterable[dict[str, Any]]]) -> list[Any]:
        """Whole answers, spelled at once where their log-probabilities are many: as objects these take five times the room."""
        count = sum(one.num_logprobs for one in self.generations)
        return await self._state.kept.written(
            lambda: [msgspec.Raw(encode(one)) for one in write()] if count >= ASIDE_FROM else list(write()), count
        )

    def notes(self) -> dict[str, Any]:
        """Once the answer is there: what had no effect, and why the cache did not help more if that was asked."""
        for generation in self.generations:
            for warning in generation.warnings:
                self.warnings.tell(warning)
        notes = noted(self._state, self.warnings)
        if self._story is not None:
            explanation = self.generation.end_story(self._story, explain=self._explain_cache)
            if explanation is not None:
                notes["cache"] = explanation
                notes["timing"] = self.generation.timing()
        return notes

    def measured(self) -> dict[str, Any]:
        """Once the answer is there: its times, where the operator tells them."""
        if not self._state.config.enable_per_request_metrics or len(self.generations) > 1:
            return {}
        times = self.generation.told_times()
        return {} if times is None else {"metrics": times}

    def failure(self, status: int, body: dict[str, Any]) -> bytes:
        return event(body)

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def tokens(self) -> tuple[int, int]:
        """Of the prompts and of the answers so far."""
        prompt = sum(len(one.prompt_token_ids) for one in self.generations)
        return prompt, sum(one.num_generated_tokens for one in self.generations)

    def usage(self) -> dict[str, Any]:
        prompt, generated = self.tokens()
        thought = [one.num_thinking_tokens for one in self.generations if one.parses_thinking]
        details = {"completion_tokens_details": {"reasoning_tokens": sum(thought)}} if thought else {}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(one.num_cached_tokens for one in self.generations)},
            **details,
        }


def noted(state: ServerState, warnings: Warnings) -> dict[str, Any]:
    """What an answer says of its warnings, and the log."""
    state.log_warnings(warnings.listed)
    return {"warnings": warnings.listed} if warnings.listed else {}


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI uses this number for impossible tokens."""
    return max(logprob, -9999.0)


def prompt_logprobs_json(listed: list[dict[int, Logprob] | None] | None) -> list[dict[str, Any] | None]:
    return [
        None
        if one is None
        else {
            str(token_id): {"logprob": finite(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token_id, entry in one.items()
        }
        for one in listed or []
    ]
