"""From one sequence's deltas to its text: decoding, stop strings, log-probabilities with their tokens' texts."""

from __future__ import annotations

import msgspec

from fastqwen.outputs import CompletionOutput, Logprob
from fastqwen.records import Failure, FinishReason, RequestDelta, SamplingParams, TokenLogprobs
from fastqwen.text.answer import Parts
from fastqwen.text.detokenizer import Detokenizer
from fastqwen.text.tokenizer import Tokenizer


class Piece(msgspec.Struct, gc=False):  # one is made for each token: a dataclass takes 0.65 us, this 0.15
    """What one delta added for the reader. ``abort`` asks the caller to end the sequence in the engine."""

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[dict[int, Logprob]] | None = None
    prompt_logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: Failure | None = None
    abort: bool = False
    parts: Parts | None = None  # the text by its meaning, where the answer is parsed


class Assembler:
    """Feed it deltas until a piece has a finish_reason; ``output`` is the answer so far."""

    def __init__(
        self,
        index: int,
        sampling: SamplingParams,
        tokenizer: Tokenizer | None,
        stop_token_ids: list[int],
        *,
        stops_after: str = "",
    ) -> None:
        """``stops_after``: stop strings count only behind this text (``Grammar.after``)."""
        self.output = CompletionOutput(index=index)
        self.num_cached_tokens = 0
        self._sampling = sampling
        self._tokenizer = tokenizer
        self._end_ids = frozenset(stop_token_ids) - frozenset(sampling.stop_token_ids)
        self._detokenizer = None
        if tokenizer is not None and sampling.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                stop=sampling.stop_strings,
                include_stop=sampling.include_stop_str_in_output,
                skip_special_tokens=sampling.skip_special_tokens,
                min_tokens=sampling.min_tokens,
                stops_after=stops_after,
            )

    def feed(self, delta: RequestDelta) -> Piece:
        assert self.output.finish_reason is None, "a delta came after the end"
        if (
            len(delta.token_ids) == 1
            and delta.finish_reason is None
            and delta.logprobs is delta.prompt_logprobs is None
        ):
            return self._feed_token(delta)
        piece = Piece(
            prompt_logprobs=None if delta.prompt_logprobs is None else self._named(delta.prompt_logprobs),
            error=delta.error,
        )
        if (
            delta.token_ids and not self.output.token_ids
        ):  # one that goes on under another id finds its own past in the cache
            self.num_cached_tokens = delta.num_cached_tokens
        for position, token_id in enumerate(delta.token_ids):
            ends = delta.finish_reason == "stop" and position == len(delta.token_ids) - 1
            piece.token_ids.append(token_id)
            if delta.logprobs is not None:
                piece.logprobs = (piece.logprobs or []) + self._named([delta.logprobs[position]])
            piece.text += self._text_of(token_id, ends)
            if self._detokenizer is not None and self._detokenizer.stopped_by is not None:
                break
        self._close(piece, delta)
        self._append(piece, delta)
        return piece

    def _feed_token(self, delta: RequestDelta) -> Piece:
        """What ``feed`` does, for the delta that nearly all are: one token and nothing else."""
        [token_id] = delta.token_ids
        if not self.output.token_ids:
            self.num_cached_tokens = delta.num_cached_tokens
        detokenizer = self._detokenizer
        piece = Piece(token_ids=[token_id], error=delta.error)
        if detokenizer is not None:
            piece.text = detokenizer.push(token_id)
            if detokenizer.stopped_by is not None:
                self._close(piece, delta)
        self._append(piece, delta)
        return piece

    def _text_of(self, token_id: int, ends: bool) -> str:
        if self._detokenizer is None or (ends and not self._sampling.include_stop_str_in_output):
            return ""
        return self._detokenizer.push(token_id)

    def _close(self, piece: Piece, delta: RequestDelta) -> None:
        stopped_by = None if self._detokenizer is None else self._detokenizer.stopped_by
        if stopped_by is None and delta.finish_reason is not None and self._detokenizer is not None:
            piece.text += self._detokenizer.finish()
            stopped_by = self._detokenizer.stopped_by
        if stopped_by is not None:
            piece.finish_reason, piece.stop_reason = "stop", stopped_by
            piece.abort = delta.finish_reason is None
        elif delta.finish_reason is not None:
            piece.finish_reason = delta.finish_reason
            piece.stop_reason = None if delta.stop_reason in self._end_ids else delta.stop_reason

    def _append(self, piece: Piece, delta: RequestDelta) -> None:
        output = self.output
        # Through a name of its own a text grows in place; an attribute's would be copied for each token.
        text, output.text = output.text, ""
        text += piece.text
        output.text = text
        output.token_ids += piece.token_ids
        output.finish_reason, output.stop_reason = piece.finish_reason, piece.stop_reason
        if piece.logprobs is not None:
            if output.logprobs is None:
                output.logprobs = []
            output.logprobs += piece.logprobs
            chosen = sum(one.logprob for one in (delta.logprobs or [])[: len(piece.token_ids)])
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + chosen

    def _named(self, logprobs: list[TokenLogprobs]) -> list[dict[int, Logprob]]:
        return [self._alternatives(one) for one in logprobs]

    def _alternatives(self, one: TokenLogprobs) -> dict[int, Logprob]:
        """The chosen token first, then the most likely ones, as vLLM orders them."""
        found = {one.token_id: Logprob(one.logprob, one.rank, self._token_text(one.token_id))}
        ranks = one.top_ranks or range(1, len(one.top_ids) + 1)
        for rank, token_id, logprob in zip(ranks, one.top_ids, one.top_logprobs, strict=True):
            found.setdefault(token_id, Logprob(logprob, rank, self._token_text(token_id)))
        return found

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)
