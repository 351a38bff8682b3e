"""One prompt's way through the engine and back: n sequences, their texts, and what the metrics want to know."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fastqwen.client.assemble import Assembler, Piece
from fastqwen.client.engine import Deltas, Stream, error_of
from fastqwen.client.prepare import prepare
from fastqwen.client.thinking import ThinkingGuard, ThinkingOptions, continued, end_thinking, singles
from fastqwen.errors import BadRequest
from fastqwen.outputs import CompletionOutput, Logprob
from fastqwen.records import ALL, EngineRequest, Grammar, RequestDelta, SamplingParams
from fastqwen.server.answer.cache_story import CacheStory
from fastqwen.server.answer.metrics import RequestClock
from fastqwen.server.answer.request_limits import check_limits
from fastqwen.server.answer.state import ServerState
from fastqwen.text.answer import THINK_END, Parts, TextParser


@dataclass(frozen=True)
class GenerationOptions:
    """What a route asks of a generation besides sampling. Without ``make_parser`` the text is the answer."""

    priority: int = 0
    cache_salt: str = ""
    grammar: Grammar | None = None
    make_parser: Callable[[], TextParser | None] = lambda: None
    whole_text: bool = False  # the text is the answer as it is, and the parser only says where its thinking is
    single_call: bool = False
    thinking: ThinkingOptions | None = None
    shortens: bool = False  # agents ask for their own model's length, whatever the context here
    no_answer: bool = False  # max_tokens 0: the prompt is computed, and the one token that ends it is nobody's


@dataclass
class Choice:
    """One of the n answers while it grows."""

    request: EngineRequest
    assembler: Assembler
    parser: TextParser | None
    guard: ThinkingGuard | None
    parts: Parts = field(default_factory=Parts)
    num_thinking_tokens: int = 0
    whole_text: bool = False

    index: int = field(init=False)  # asked for with every token

    def __post_init__(self) -> None:
        self.index = self.assembler.output.index

    @property
    def answer(self) -> Parts:
        """The whole, once it is there."""
        return (
            self.parts if self.parser is not None and not self.whole_text else Parts(content=self.assembler.output.text)
        )


class Generation:
    """Iterate ``pieces`` once; afterwards ``choices`` hold the whole answers. Raises BadRequest when made."""

    def __init__(
        self,
        state: ServerState,
        request_id: str,
        token_ids: list[int],
        sampling: SamplingParams,
        options: GenerationOptions,
    ) -> None:
        facts = state.facts()
        check_limits(state.config, sampling, facts.model.vocab_size)
        self._state = state
        self._options = options
        self._sampling = sampling
        self.prompt_token_ids = token_ids
        self.warnings: list[str] = [] if options.thinking is None else [*options.thinking.warnings]
        requests = prepare(
            request_id,
            token_ids,
            sampling,
            facts,
            seeds=state.seeds,
            priority=options.priority,
            cache_salt=state.salted(options.cache_salt),
            grammar=options.grammar,
        )
        self._max_model_len, self._max_tokens = facts.max_model_len, requests[0].max_tokens
        room = facts.max_model_len - len(token_ids)
        self._check_length(sampling.max_tokens, room)
        self.choices = [self._choice(request, index, facts.stop_token_ids) for index, request in enumerate(requests)]
        self._clock: RequestClock | None = None
        self.num_logprobs = 0  # of the prompt and all answers, alternatives among them
        self._running = {choice.request.request_id: choice for choice in self.choices}
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = (
            None if sampling.prompt_logprobs is None else [None]
        )

    def _check_length(self, max_tokens: int | None, room: int) -> None:
        """Clients ask for the same number of tokens however long the conversation has become."""
        if max_tokens is not None and max_tokens > self._max_model_len and not self._options.shortens:
            raise BadRequest(
                f"max_tokens is {max_tokens}, more than the model's whole context of {self._max_model_len} tokens: "
                f"at most {room} can be generated behind this prompt",
                "max_tokens",
                "context_length_exceeded",
            )
        if max_tokens is not None and max_tokens > room:
            self.warnings.append(
                f"max_tokens was shortened from {max_tokens} to {room}: the prompt leaves no more of the model's context "
                f"of {self._max_model_len} tokens"
            )

    @property
    def outputs(self) -> list[CompletionOutput]:
        return [choice.assembler.output for choice in self.choices]

    @property
    def num_cached_tokens(self) -> int:
        return max(choice.assembler.num_cached_tokens for choice in self.choices)

    @property
    def num_cache_written_tokens(self) -> int:
        """Of the prompt, once it is computed: the whole blocks that the prefix cache holds now and did not before."""
        state = self._state
        if not self.num_generated_tokens or not state.engine_config.enable_prefix_caching:
            return 0
        num_whole = len(self.prompt_token_ids) // state.block_size * state.block_size
        return max(0, num_whole - self.num_cached_tokens)

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(output.token_ids) for output in self.outputs)

    @property
    def parses_thinking(self) -> bool:
        """Whether thinking is told apart from the answer; then its tokens are counted."""
        return any(choice.parser is not None for choice in self.choices)

    @property
    def num_thinking_tokens(self) -> int:
        return sum(choice.num_thinking_tokens for choice in self.choices)

    async def pieces(self, first_index: int = 0) -> AsyncGenerator[tuple[int, Piece], None]:
        """(index of the answer, what it gained) until each answer has its finish_reason. Indices count from the given.

        Raises what ``error_of`` makes of a failure.
        """
        self._clock = clock = RequestClock(self._state.metrics, len(self.prompt_token_ids), len(self.choices))
        self._state.metrics.request_max_tokens.observe(self._max_tokens)
        with self._state.engine.stream([choice.request for choice in self.choices]) as stream, self._kept():
            async for deltas in stream:
                now_s = time.perf_counter()
                for delta in self._countable(deltas):
                    choice = self._running.get(delta.request_id)
                    if choice is None:
                        continue  # it was ended here, and its last words came too late
                    if delta.waited_s:
                        clock.waited_s = max(clock.waited_s, delta.waited_s)
                    piece = self._take(choice, delta, stream)
                    if piece.logprobs or piece.prompt_logprobs:
                        self._keep(piece)
                    if piece.token_ids:
                        clock.saw(choice.index, len(piece.token_ids), now_s)
                    if piece.finish_reason is not None:
                        del self._running[delta.request_id]
                        clock.finished(
                            choice.index,
                            piece.finish_reason,
                            len(choice.assembler.output.token_ids),
                            num_cached_tokens=choice.assembler.num_cached_tokens,
                            num_preemptions=delta.num_preemptions,
                        )
                        if piece.finish_reason in ("error", "abort"):
                            raise error_of(piece.error)
                        if piece.abort:
                            stream.abort([delta.request_id])
                    yield first_index + choice.index, piece

    def _countable(self, deltas: Deltas) -> Iterator[RequestDelta]:
        """Token by token, where a budget counts them."""
        for delta in deltas:
            choice = self._running.get(delta.request_id)
            if choice is not None and choice.guard is not None and choice.guard.counts:
                yield from singles(delta)
            else:
                yield delta

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._state.kept.release(self.num_logprobs)

    def _keep(self, piece: Piece) -> None:
        """Raises BadRequest or Overloaded."""
        num_new = sum(map(len, piece.logprobs or ())) + sum(map(len, piece.prompt_logprobs or ()))
        most = self._state.config.max_logprobs
        unbounded = most == ALL or most >= self._state.facts().model.vocab_size
        self._state.kept.keep(num_new, self.num_logprobs + num_new, unbounded=unbounded)
        self.num_logprobs += num_new

    async def finish(self) -> None:
        """Run to the end without streaming; raises as ``pieces`` does."""
        async with aclosing(self.pieces()) as pieces:
            async for _ in pieces:
                pass

    def timing(self) -> dict[str, float]:
        """Seconds, once the answer is there."""
        assert self._clock is not None, "pieces come first"
        return self._clock.timing()

    def told_times(self) -> dict[str, float] | None:
        """Of one answer, once it is there; None where there are several, or none was timed."""
        if self._clock is None or len(self.choices) > 1:
            return None
        return self._clock.told(self.num_generated_tokens)

    def end_story(self, story: CacheStory, *, explain: bool) -> dict[str, Any] | None:
        """Once the answer is there: keep it for later prompts. Gives the explanation for this one if that was asked."""
        output = self.outputs[0]
        thought = bool(self.choices[0].parts.reasoning) or THINK_END in output.text
        return self._state.cache_stories.end(
            story,
            output.token_ids,
            thought=thought,
            num_cached=self.num_cached_tokens,
            block_size=self._state.block_size,
            explain=explain,
            has_states=self._state.has_states,
        )

    def _choice(self, request: EngineRequest, index: int, stop_token_ids: list[int]) -> Choice:
        parser = self._options.make_parser()
        thinking = self._options.thinking
        return Choice(
            request=request,
            assembler=Assembler(
                index,
                self._sampling,
                self._state.text.tokenizer,
                stop_token_ids,
                stops_after="" if request.grammar is None else request.grammar.after,
            ),
            parser=parser,
            guard=None if parser is None or thinking is None else ThinkingGuard(thinking),
            whole_text=self._options.whole_text,
        )

    def _take(self, choice: Choice, delta: RequestDelta, stream: Stream) -> Piece:
        if self._options.no_answer and delta.finish_reason in ("stop", "length"):
            choice.assembler.num_cached_tokens = delta.num_cached_tokens
            delta = msgspec.structs.replace(
                delta, token_ids=[], logprobs=None, finish_reason="length", stop_reason=None
            )
        if choice.parser is None and self.prompt_logprobs is None:
            return choice.assembler.feed(delta)
        thinking = choice.parser is not None and choice.parser.thinking
        choice.num_thinking_tokens += len(delta.token_ids) if thinking else 0
        piece = choice.assembler.feed(delta)
        if piece.prompt_logprobs and choice.index == 0 and self.prompt_logprobs is not None:
            self.prompt_logprobs.extend(piece.prompt_logprobs)
        if choice.parser is not None:
            self._parse(choice, choice.parser, piece)
        if choice.guard is not None and piece.finish_reason is None:
            why = choice.guard.saw(delta.token_ids if thinking else [])
            if why is not None and choice.parser is not None and choice.parser.thinking:
                self._end_thinking(choice, piece, why, stream)
        return piece

    def _parse(self, choice: Choice, parser: TextParser, piece: Piece) -> None:
        if self._options.whole_text:
            parser.push(piece.text)
            return
        parts = parser.push(piece.text) if piece.text else Parts()
        if piece.finish_reason is not None:
            parts.add(parser.finish())
        if self._options.single_call and (choice.parts.calls or parts.calls):
            parts.calls = [] if choice.parts.calls else parts.calls[:1]
            piece.abort = piece.abort or piece.finish_reason is None
            piece.finish_reason = "stop"
        choice.parts.add(parts)
        if piece.finish_reason == "stop" and choice.parts.calls:
            piece.finish_reason = "tool_calls"
        choice.assembler.output.finish_reason = piece.finish_reason
        piece.parts = parts

    def _end_thinking(self, choice: Choice, piece: Piece, why: str, stream: Stream) -> None:
        """Say the sentence that ends the thinking in the model's place, and let it go on from there under a new id."""
        assert choice.parser is not None and choice.guard is not None
        text = end_thinking(
            choice.assembler,
            piece,
            choice.guard.end,
            self._state.text.tokenizer,
            choice.request,
        )
        choice.guard = None
        parts = choice.parser.push(text)
        if piece.parts is not None:
            choice.parts.add(parts)
            piece.parts.add(parts)
        if piece.finish_reason is not None:
            return
        self.warnings.append(why if len(self.choices) == 1 else f"choice {choice.index}: {why}")
        first, output = choice.request, choice.assembler.output
        stream.abort([first.request_id])
        following = continued(first, output, max_model_len=self._max_model_len)
        if following is None:
            piece.finish_reason = output.finish_reason = "length"
            return
        del self._running[first.request_id]
        choice.request = following
        self._running[following.request_id] = choice
        stream.add([following])


def parts_of(piece: Piece) -> Parts:
    return piece.parts if piece.parts is not None else Parts(content=piece.text)
