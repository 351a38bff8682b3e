"""LLM: the engine in this process, for scripts and notebooks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

from tqdm import tqdm

from fastqwen.client.assemble import Assembler
from fastqwen.client.engine import Stream, error_of
from fastqwen.client.local_engine import LocalEngine
from fastqwen.client.model import LoadedModel, batch_config
from fastqwen.client.prepare import check_dimensions, prepare, prepare_embedding
from fastqwen.client.vectors import vector_of
from fastqwen.engine.core import EngineStats
from fastqwen.errors import BadRequest
from fastqwen.model_config import ModelConfig
from fastqwen.outputs import EmbeddingOutput, EmbeddingRequestOutput, Logprob, RequestOutput
from fastqwen.plan import EnginePlan
from fastqwen.records import EngineRequest, RequestDelta, SamplingParams
from fastqwen.text.template import Message

Prompt = str | list[int] | dict[str, Any]
BAR_FROM_PROMPTS = 2


class LLM:
    """
    llm = LLM("demo", max_model_len=2048)
    [output] = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=20))
    print(output.outputs[0].text)

    The keywords are EngineConfig's fields. Raises FastqwenError with one line that says what to change.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._loaded = LoadedModel(batch_config(model, options))
        self.config, self.text, self.facts = self._loaded.config, self._loaded.text, self._loaded.facts
        self.engine = LocalEngine(self._loaded.core, self._loaded.ready)
        self._ids = itertools.count()
        self._seeds = random.Random(self.config.seed)  # noqa: S311 not a secret

    @property
    def model(self) -> ModelConfig:
        """What the checkpoint says about itself."""
        return self.engine.ready.model

    @property
    def plan(self) -> EnginePlan:
        """What the device and the model allow."""
        return self.engine.ready.plan

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self.engine.stats()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams(**(self.text.default_sampling if self.text else {}))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. A prompt is a text, a list of ids, or {"prompt_token_ids": [...]}."""
        listed = _as_list(prompts)
        params = self._params_for(sampling_params, len(listed))
        texts_and_ids = [self._ids_of(prompt) for prompt in listed]
        priorities = list(priority) if priority is not None else [0] * len(listed)
        if len(priorities) != len(listed):
            raise BadRequest(f"{len(listed)} prompts, but {len(priorities)} priorities", "priority")
        job = _Job(self)
        for (text, token_ids), sampling, one in zip(texts_and_ids, params, priorities, strict=True):
            job.add(text, token_ids, sampling, one)
        with self.engine.stream(job.requests) as stream, _bar(len(listed), use_tqdm) as progress:
            for deltas in stream:
                num_finished = job.take(deltas, stream)
                if num_finished:
                    progress.update(num_finished)
                    speed = job.num_generated / max(progress.format_dict["elapsed"], 1e-9)
                    progress.set_postfix_str(f"{speed:.0f} tok/s")
        return job.outputs

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One conversation, or a list of them."""
        conversations = messages if messages and isinstance(messages[0], list) else [messages]
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
        prompts: list[Prompt] = [
            self.chat_token_ids(cast(list[Message], conversation), **options) for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        use_tqdm: bool = True,
        priority: int = 0,
    ) -> list[EmbeddingRequestOutput]:
        """One vector of length 1 per prompt: the last token's hidden state, cut to ``dimensions`` if given.

        Token ids are used as they are; a text is closed as the tokenizer's post-processor says. Raises BadRequest.
        """
        check_dimensions(dimensions, self.facts)
        requests: list[EngineRequest] = []
        for index, prompt in enumerate(_as_list(prompts)):
            text, ids = self._ids_of(prompt)
            if text is not None and self.text is not None:
                ids = self.text.tokenizer.closed_once(ids)
            name = str(next(self._ids))
            requests.append(prepare_embedding(name, ids, self.facts, field=f"prompts[{index}]", priority=priority))
        found: dict[str, RequestDelta] = {}
        with self.engine.stream(requests) as stream, _bar(len(requests), use_tqdm) as progress:
            for deltas in stream:
                for delta in deltas:
                    if delta.embedding is None:
                        raise error_of(delta.error)
                    found[delta.request_id] = delta
                    progress.update(1)
        return [
            EmbeddingRequestOutput(
                request_id=one.request_id,
                outputs=EmbeddingOutput(vector_of(found[one.request_id], dimensions).tolist()),
                prompt_token_ids=one.prompt_token_ids,
                num_cached_tokens=found[one.request_id].num_cached_tokens,
            )
            for one in requests
        ]

    def chat_token_ids(self, messages: list[Message], **options: Any) -> list[int]:
        """The prompt that the chat template makes. Raises BadRequest."""
        return self._loaded.chat_token_ids(messages, **options)

    def stream_chat(self, messages: list[Message], sampling_params: SamplingParams, **options: Any) -> Iterator[str]:
        """One answer's text, piece by piece. Closing the iterator early aborts the rest. Raises BadRequest."""
        job = _Job(self)
        job.add(None, self.chat_token_ids(messages, **options), sampling_params, 0)
        answer = job.outputs[0].outputs[0]
        with self.engine.stream(job.requests) as stream:
            for deltas in stream:
                before = len(answer.text)
                job.take(deltas, stream)
                if len(answer.text) > before:
                    yield answer.text[before:]

    def _params_for(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise BadRequest(f"{count} prompts, but {len(given)} sampling_params", "sampling_params")
        return list(given)

    def _ids_of(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, dict):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), [int(token_id) for token_id in prompt["prompt_token_ids"]]
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._loaded.need_text().tokenizer.encode(prompt, add_special_tokens=True)
        return None, [int(token_id) for token_id in prompt]


class _Job:
    """One call of ``generate``: what is asked of the engine, and what has come back."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._pending: dict[str, tuple[Assembler, RequestOutput]] = {}
        self.requests: list[EngineRequest] = []
        self.outputs: list[RequestOutput] = []
        self.num_generated = 0

    def add(self, text: str | None, token_ids: list[int], sampling: SamplingParams, priority: int) -> None:
        """Checked and prepared; nothing reaches the engine before all prompts of the call were accepted."""
        llm = self._llm
        request_id = str(next(llm._ids))
        requests = prepare(
            request_id,
            token_ids,
            sampling,
            llm.facts,
            seeds=llm._seeds,
            priority=priority,
            grammar=llm._loaded.grammar(sampling),
        )
        output = RequestOutput(request_id, text, token_ids, [], finished=False)
        tokenizer = None if llm.text is None else llm.text.tokenizer
        for index, request in enumerate(requests):
            assembler = Assembler(index, sampling, tokenizer, llm.facts.stop_token_ids)
            output.outputs.append(assembler.output)
            self._pending[request.request_id] = (assembler, output)
        if sampling.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
        self.requests += requests
        self.outputs.append(output)

    def take(self, deltas: list[RequestDelta], stream: Stream) -> int:
        """How many prompts these finished."""
        pending, num_finished = self._pending, 0
        self.num_generated += sum([len(delta.token_ids) for delta in deltas])
        for delta in deltas:
            entry = pending.get(delta.request_id)
            if entry is None:
                continue  # the abort that a stop string asked for
            assembler, output = entry
            piece = assembler.feed(delta)
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


def _bar(num_prompts: int, wanted: bool) -> tqdm[Any]:
    off = not wanted or num_prompts < BAR_FROM_PROMPTS
    return tqdm(total=num_prompts, unit="prompt", disable=off, dynamic_ncols=True)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [cast(list[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))
