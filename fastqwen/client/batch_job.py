"""Prompts that a script gives at once: as ids, as engine requests, and the answers as they come back."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

from fastqwen.client.assemble import Assembler, Piece
from fastqwen.client.model import LoadedModel
from fastqwen.client.prepare import prepare, truncated
from fastqwen.client.thinking import ThinkingGuard, continued, end_thinking, singles, thinking_parser
from fastqwen.errors import BadRequest
from fastqwen.outputs import Logprob, RequestOutput
from fastqwen.records import EngineRequest, RequestDelta, SamplingParams
from fastqwen.text.answer import TextParser

Prompt = str | list[int] | Mapping[str, Any]
# What a prompt's dict may hold beside text or ids, if it is empty.
_OF_OTHER_MODELS = ("multi_modal_data", "mm_processor_kwargs", "multi_modal_uuids", "prompt_embeds", "encoder_prompt")
_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(list[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def text_and_ids(prompt: Prompt, loaded: LoadedModel) -> tuple[str | None, list[int]]:
    """The text, if one was given, and its ids. Raises BadRequest."""
    if isinstance(prompt, Mapping):
        for name in _OF_OTHER_MODELS:
            if prompt.get(name):
                raise BadRequest(f"{name}: this model reads text only", "prompts")
        unknown = sorted(str(key) for key in prompt.keys() - {*_OF_OTHER_MODELS, *_KEYS} if prompt[key] is not None)
        if unknown:
            raise BadRequest(f"a prompt has no {unknown[0]!r}: known are {', '.join(_KEYS)}", "prompts")
        if prompt.get("prompt_token_ids") is not None:
            return prompt.get("prompt"), [int(token_id) for token_id in prompt["prompt_token_ids"]]
        prompt = prompt.get("prompt", ())
    if isinstance(prompt, str):
        return prompt, loaded.need_text().tokenizer.encode(prompt, add_special_tokens=True)
    if not isinstance(prompt, Sequence):
        raise BadRequest(
            "a prompt is a text, a list of token ids, or a dict with prompt or prompt_token_ids", "prompts"
        )
    return None, [int(token_id) for token_id in prompt]


def salt_of(prompt: Prompt) -> str:
    """Only prompts of the same salt share what was computed."""
    return str(prompt.get("cache_salt") or "") if isinstance(prompt, Mapping) else ""


class Ways(Protocol):
    """Where a request can be ended early, and another one go on in its place."""

    def abort(self, request_ids: list[str]) -> None: ...

    def add(self, requests: list[EngineRequest]) -> None: ...


@dataclass
class _Answer:
    """One sequence while it grows."""

    request: EngineRequest
    assembler: Assembler
    output: RequestOutput
    parser: TextParser | None = None  # says where the thinking is, if that has a budget
    guard: ThinkingGuard | None = None


class BatchJob:
    """One call of ``generate``: what is asked of the engine, and what has come back."""

    def __init__(self, loaded: LoadedModel, ids: itertools.count[int], seeds: random.Random, *, salt: str = "") -> None:
        self._loaded, self._ids, self._seeds, self._salt = loaded, ids, seeds, salt
        self._pending: dict[str, _Answer] = {}
        self.requests: list[EngineRequest] = []
        self.outputs: list[RequestOutput] = []
        self.num_generated = 0

    def add(
        self, text: str | None, token_ids: list[int], sampling: SamplingParams, priority: int, *, salt: str = ""
    ) -> None:
        """Checked and prepared; nothing reaches the engine before all prompts of the call were accepted."""
        loaded = self._loaded
        request_id = str(next(self._ids))
        token_ids = truncated(token_ids, sampling.truncate_prompt_tokens, loaded.facts)
        tokenizer = None if loaded.text is None else loaded.text.tokenizer
        requests = prepare(
            request_id,
            token_ids,
            sampling,
            loaded.facts,
            seeds=self._seeds,
            priority=priority,
            cache_salt=self._salt + salt,
            grammar=loaded.grammar(sampling),
            tokenizer=tokenizer,
        )
        thinking = loaded.thinking(sampling)
        output = RequestOutput(request_id, text, token_ids, [], finished=False)
        for index, request in enumerate(requests):
            assembler = Assembler(index, sampling, tokenizer, loaded.facts.stop_token_ids)
            output.outputs.append(assembler.output)
            answer = self._pending[request.request_id] = _Answer(request, assembler, output)
            if thinking is not None and tokenizer is not None:
                answer.parser = thinking_parser(token_ids, tokenizer, loaded.formats)
                answer.guard = ThinkingGuard(thinking)
        if sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        self.requests += requests
        self.outputs.append(output)

    def join(self, other: BatchJob) -> None:
        """Its prompts as well, behind these."""
        self._pending.update(other._pending)
        self.requests += other.requests
        self.outputs += other.outputs

    def take(self, deltas: list[RequestDelta], stream: Ways) -> int:
        """How many prompts these finished."""
        pending, num_finished = self._pending, 0
        self.num_generated += sum([len(delta.token_ids) for delta in deltas])
        for delta in deltas:
            answer = pending.get(delta.request_id)
            if answer is None:
                continue  # the abort that a stop string asked for
            if answer.guard is not None and len(delta.token_ids) > 1:
                num_finished += sum(self.take([one], stream) for one in singles(delta))
                continue
            assembler, output = answer.assembler, answer.output
            piece = assembler.feed(delta)
            if answer.guard is not None and answer.parser is not None and piece.finish_reason is None:
                self._watch(answer, answer.parser, answer.guard, piece, stream)
            if piece.prompt_logprobs is not None and assembler.output.index == 0:
                known: list[dict[int, Logprob] | None] = output.prompt_logprobs or [None]
                output.prompt_logprobs = known + list(piece.prompt_logprobs)
            if piece.finish_reason is not None:
                if piece.abort:
                    stream.abort([delta.request_id])
                del pending[delta.request_id]
                output.num_cached_tokens = max(output.num_cached_tokens, assembler.num_cached_tokens)
                output.finished = all(one.finish_reason is not None for one in output.outputs)
                num_finished += output.finished
        return num_finished

    def _watch(self, answer: _Answer, parser: TextParser, guard: ThinkingGuard, piece: Piece, stream: Ways) -> None:
        """Of one token. Where thinking must end, the answer goes on as another sequence."""
        thinking = parser.thinking
        parser.push(piece.text)
        why = guard.saw(piece.token_ids if thinking else [])
        if why is None or not parser.thinking:
            return
        answer.guard = None
        request, output = answer.request, answer.assembler.output
        tokenizer = self._loaded.need_text().tokenizer
        end_thinking(answer.assembler, piece, guard.end, tokenizer, request)
        if piece.finish_reason is not None:
            return
        stream.abort([request.request_id])
        following = continued(request, output, max_model_len=self._loaded.facts.max_model_len)
        if following is None:
            piece.finish_reason = output.finish_reason = "length"
            return
        del self._pending[request.request_id]
        answer.request = following
        self._pending[following.request_id] = answer
        self.requests.append(following)
        stream.add([following])
