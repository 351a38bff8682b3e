"""Beam search on top of an engine that samples: each step asks for every beam's likeliest next tokens.

Slow and exact: a step of the search is a request of one token for each beam, whose past is in the prefix cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from fastqwen.client.prepare import ModelFacts, check_priority, check_prompt
from fastqwen.errors import BadRequest
from fastqwen.outputs import BeamSearchOutput, BeamSearchSequence, Logprob
from fastqwen.records import EngineRequest, FinishReason, Sampling, TokenLogprobs
from fastqwen.text.tokenizer import Tokenizer

MAX_WIDTH = 64


class BeamSearchParams(msgspec.Struct):
    """``length_penalty`` p: beams are compared by their log-probability / length**p, length of prompt and answer.
    ``temperature`` changes nothing: beams are compared by the model's own probabilities. The order is vLLM's, whose further
    fields are taken at the values that mean nothing. Raises BadRequest."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: None = None
    skip_special_tokens: bool = True
    watermarking: bool | None = None
    allowed_token_ids: None = None

    def __post_init__(self) -> None:
        for name in ("structured_outputs", "watermarking", "allowed_token_ids"):
            if getattr(self, name):
                raise BadRequest(f"{name} cannot be combined with beam search, which takes the likeliest answers", name)
        if not 1 <= self.beam_width <= MAX_WIDTH:
            raise BadRequest(f"beam_width is {self.beam_width}, but must be at least 1 and at most {MAX_WIDTH}", "n")
        if self.max_tokens < 1:
            raise BadRequest(f"max_tokens is {self.max_tokens}, but must be at least 1", "max_tokens")


class Beam(NamedTuple):
    token_ids: tuple[int, ...] = ()  # behind the prompt
    logprobs: tuple[TokenLogprobs, ...] = ()
    cum_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None


class BeamSearch:
    """One prompt's. ``requests`` of a step, their answers to ``take``, until there are no more; then ``best``."""

    def __init__(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: BeamSearchParams,
        facts: ModelFacts,
        *,
        stop_token_ids: Sequence[int] = (),
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        check_prompt(prompt_ids, facts)
        check_priority(priority, facts)
        self.prompt_ids = prompt_ids
        self._id, self._params, self._priority, self._salt = request_id, params, priority, cache_salt
        self._ends = frozenset(stop_token_ids) | frozenset(() if params.ignore_eos else facts.stop_token_ids)
        self._steps_left = min(params.max_tokens, facts.max_model_len - len(prompt_ids))
        self._num_steps = 0
        self._beams = [Beam()]
        self._ended: list[Beam] = []

    def requests(self) -> list[EngineRequest]:
        """None are left once the search is over."""
        if not self._steps_left:
            return []
        arrival_s = time.monotonic()
        return [
            EngineRequest(
                request_id=self._name(index),
                prompt_token_ids=[*self.prompt_ids, *beam.token_ids],
                sampling=Sampling(temperature=0.0, logprobs=2 * self._params.beam_width),
                stop_token_ids=[],
                max_tokens=1,
                seed=0,
                priority=self._priority,
                cache_salt=self._salt,
                arrival_s=arrival_s,
            )
            for index, beam in enumerate(self._beams)
        ]

    def take(self, found: dict[str, TokenLogprobs]) -> None:
        """Each beam's next tokens, by the names of ``requests``."""
        grown: list[Beam] = []
        for index, beam in enumerate(self._beams):
            told = found[self._name(index)]
            for rank, (token_id, logprob) in enumerate(zip(told.top_ids, told.top_logprobs, strict=True), start=1):
                one = TokenLogprobs(token_id, logprob, rank, told.top_ids, told.top_logprobs)
                total = beam.cum_logprob + logprob
                if token_id in self._ends:
                    self._ended.append(
                        Beam((*beam.token_ids, token_id), (*beam.logprobs, one), total, "stop", token_id)
                    )
                else:
                    grown.append(Beam((*beam.token_ids, token_id), (*beam.logprobs, one), total))
        self._beams = sorted(grown, key=self._score, reverse=True)[: self._params.beam_width]
        self._num_steps += 1
        self._steps_left = self._steps_left - 1 if self._beams else 0

    def best(self) -> list[Beam]:
        """At most ``beam_width``, the best first."""
        cut = [beam._replace(finish_reason="length") for beam in self._beams]
        return sorted([*self._ended, *cut], key=self._score, reverse=True)[: self._params.beam_width]

    def _name(self, index: int) -> str:
        return f"{self._id}-{self._num_steps}-{index}"

    def _score(self, beam: Beam) -> float:
        length = len(self.prompt_ids) + len(beam.token_ids) - (beam.finish_reason == "stop")
        return float(beam.cum_logprob / length**self._params.length_penalty)


def sequences_of(search: BeamSearch, tokenizer: Tokenizer | None, *, include_stop: bool) -> BeamSearchOutput:
    """What vLLM's users get. ``include_stop``: the token that ended a beam is told with it."""
    return BeamSearchOutput([_sequence(beam, search.prompt_ids, tokenizer, include_stop) for beam in search.best()])


def _sequence(beam: Beam, prompt_ids: list[int], tokenizer: Tokenizer | None, include_stop: bool) -> BeamSearchSequence:
    kept = beam.token_ids if include_stop or beam.finish_reason != "stop" else beam.token_ids[:-1]
    tokens = [*prompt_ids, *kept]
    return BeamSearchSequence(
        tokens=tokens,
        logprobs=[_named(one, tokenizer) for one in beam.logprobs[: len(kept)]],
        cum_logprob=beam.cum_logprob,
        text=None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True),
        finish_reason=beam.finish_reason,
        stop_reason=beam.stop_reason,
    )


def _named(one: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The chosen token first, then the likeliest."""
    listed = [(one.token_id, one.logprob, one.rank)]
    listed += [(*pair, rank) for rank, pair in enumerate(zip(one.top_ids, one.top_logprobs, strict=True), start=1)]
    text = (lambda _: None) if tokenizer is None else tokenizer.token_text
    found: dict[int, Logprob] = {}
    for token_id, logprob, rank in listed:
        found.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
    return found
