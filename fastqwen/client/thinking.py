"""Thinking that takes too long or goes in circles is ended instead of running on: for a server's answers and a script's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fastqwen.client.assemble import Assembler, Piece
from fastqwen.outputs import CompletionOutput
from fastqwen.records import EngineRequest, Grammar, RequestDelta, TokenLogprobs
from fastqwen.text.answer import THINK_END, TextParser, prompt_opens_thinking
from fastqwen.text.formats import Formats
from fastqwen.text.tokenizer import Tokenizer

# Qwen's models were trained to answer after this sentence.
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{THINK_END}\n\n"
)

WINDOW_TOKENS = 12  # what counts as having been said before
LOOP_TOKENS = 192  # a cycle is a loop once it has repeated for so many tokens ...
LOOP_TIMES = 3  # ... and so many times
PROMPT_END_TOKENS = 12  # enough to see whether a prompt has opened the thinking block


@dataclass(frozen=True)
class ThinkingOptions:
    template_options: dict[str, Any] = field(default_factory=dict)
    budget_tokens: int | None = None
    recover_loops: bool = True
    end: str = EARLY_STOP  # what is said in the model's place
    warnings: list[str] = field(default_factory=list)


class ThinkingGuard:
    """One answer's thinking, token by token."""

    def __init__(self, options: ThinkingOptions) -> None:
        self.end = options.end
        self._budget = options.budget_tokens
        self._recover_loops = options.recover_loops
        self._tokens: list[int] = []
        self._last_seen: dict[tuple[int, ...], int] = {}
        self._period = 0
        self._repeated = 0

    @property
    def counts(self) -> bool:
        """Whether it ends thinking at a number of tokens."""
        return self._budget is not None

    def saw(self, token_ids: list[int]) -> str | None:
        """Why the thinking must end now, if it must."""
        for token_id in token_ids:
            self._tokens.append(token_id)
            if self._recover_loops and self._loops():
                return f"the thinking repeated itself every {self._period} tokens and was ended"
        if self._budget is not None and len(self._tokens) >= self._budget:
            return f"the thinking reached its budget of {self._budget} tokens and was ended"
        return None

    def _loops(self) -> bool:
        tokens, end = self._tokens, len(self._tokens)
        if self._period and tokens[-1] == tokens[-1 - self._period]:
            self._repeated += 1
        else:
            window = tuple(tokens[-WINDOW_TOKENS:])
            before = self._last_seen.get(window)
            self._period, self._repeated = (0, 0) if before is None else (end - before, 1)
        self._last_seen[tuple(tokens[-WINDOW_TOKENS:])] = end
        return bool(self._period) and self._repeated >= max(LOOP_TOKENS, LOOP_TIMES * self._period)


def prompt_end(token_ids: list[int], tokenizer: Tokenizer) -> str:
    """A prompt's last words, which say whether an answer behind it begins inside a thinking block."""
    return tokenizer.decode(token_ids[-PROMPT_END_TOKENS:]).rstrip()


def token_budget(budget: int | None, formats: Formats) -> ThinkingOptions | None:
    """What vLLM's ``thinking_token_budget`` asks for: so many tokens lie between the marks, and nothing is said before the last
    mark unless the operator has chosen something."""
    if budget is None or not formats.reasoning:
        return None
    return ThinkingOptions(budget_tokens=budget, end=formats.thinking_end or THINK_END)


def thinking_parser(token_ids: list[int], tokenizer: Tokenizer, formats: Formats) -> TextParser | None:
    """What says of an answer behind this prompt where its thinking is."""
    return formats.parser(opened=formats.reasoning and prompt_opens_thinking(prompt_end(token_ids, tokenizer)))


def singles(delta: RequestDelta) -> Iterator[RequestDelta]:
    """The same in deltas of one token each, so that a budget ends behind a token, however many came at once."""
    last = len(delta.token_ids) - 1
    if last < 1:
        yield delta
        return
    logprobs = delta.logprobs
    for index, token_id in enumerate(delta.token_ids[:last]):
        yield RequestDelta(
            request_id=delta.request_id,
            token_ids=[token_id],
            logprobs=None if logprobs is None else [logprobs[index]],
            prompt_logprobs=delta.prompt_logprobs if index == 0 else None,
            num_cached_tokens=delta.num_cached_tokens,
            waited_s=delta.waited_s if index == 0 else 0.0,
        )
    yield msgspec.structs.replace(
        delta,
        token_ids=delta.token_ids[last:],
        logprobs=None if logprobs is None else logprobs[last:],
        prompt_logprobs=None,
        waited_s=0.0,
    )


def end_thinking(answer: Assembler, piece: Piece, end: str, tokenizer: Tokenizer, request: EngineRequest) -> str:
    """Say ``end`` in the model's place; it joins ``piece``, which is the last one if one of the request's stop strings is in
    it. Gives the text, of which no more is said than ``request`` allows tokens.

    With log-probabilities its tokens have a log-probability of 0, and no alternatives: nothing else could have been said.
    """
    token_ids = tokenizer.encode(end)[: request.max_tokens - len(answer.output.token_ids)]
    certain = (
        [TokenLogprobs(token_id, 0.0, 1, [], []) for token_id in token_ids]
        if request.sampling.logprobs is not None
        else None
    )
    delta = RequestDelta(
        request_id="", token_ids=token_ids, logprobs=certain, num_cached_tokens=answer.num_cached_tokens
    )
    said = answer.feed(delta)
    piece.text += said.text
    piece.token_ids += said.token_ids
    if said.logprobs is not None:
        piece.logprobs = (piece.logprobs or []) + said.logprobs
    if said.finish_reason is not None:
        piece.finish_reason, piece.stop_reason, piece.abort = said.finish_reason, said.stop_reason, True
    return said.text


def continued(request: EngineRequest, output: CompletionOutput, *, max_model_len: int) -> EngineRequest | None:
    """Another sequence in place of ``request``: everything said so far is its prompt, which the prefix cache holds. None where
    there is no room for another token."""
    token_ids = request.prompt_token_ids + output.token_ids
    left = min(request.max_tokens - len(output.token_ids), max_model_len - len(token_ids))
    if left < 1:
        return None
    min_tokens = max(0, request.sampling.min_tokens - len(output.token_ids))
    return msgspec.structs.replace(
        request,
        request_id=f"{request.request_id}.1",
        prompt_token_ids=token_ids,
        # The prompt's log-probabilities were told by the first sequence.
        sampling=msgspec.structs.replace(request.sampling, min_tokens=min_tokens, prompt_logprobs=None),
        max_tokens=left,
        grammar=None if request.grammar is None else Grammar(request.grammar.text),
    )
