"""LLM: the engine in this process, for scripts and notebooks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from fastqwen.client.batch_job import BatchJob, Prompt, as_list, salt_of, text_and_ids
from fastqwen.client.beams import BeamSearch, BeamSearchParams, sequences_of
from fastqwen.client.conversation import for_template
from fastqwen.client.engine import error_of
from fastqwen.client.local_engine import LocalEngine
from fastqwen.client.model import LoadedModel, Template, batch_config
from fastqwen.client.numbers import metrics_of
from fastqwen.client.pooled import cut_of
from fastqwen.client.pooling_calls import PoolingCalls
from fastqwen.client.progress import bar, refuse_lora
from fastqwen.client.sleeping import SleepingEngine
from fastqwen.client.user_tokenizer import UserTokenizer
from fastqwen.engine.core import EngineStats
from fastqwen.errors import BadRequest
from fastqwen.model_config import ModelConfig
from fastqwen.outputs import (
    BeamSearchOutput,
    Histogram,
    Metric,
    RequestOutput,
)
from fastqwen.plan import EnginePlan
from fastqwen.records import EngineRequest, RequestDelta, SamplingParams
from fastqwen.text.template import Message


class LLM(PoolingCalls):
    """
    llm = LLM("demo", max_model_len=2048)
    [output] = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=20))
    print(output.outputs[0].text)

    The keywords are EngineConfig's fields; vLLM's are taken where they say what holds here. Raises FastqwenError with
    one line that says what to change.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._loaded = LoadedModel(batch_config(model, options))
        self.config, self.text, self.facts = self._loaded.config, self._loaded.text, self._loaded.facts
        self._sleeping = SleepingEngine(self._loaded, LocalEngine)
        self._ids = itertools.count()
        self._seeds = random.Random(self.config.seed)  # noqa: S311 not a secret
        self._queued = self._job()

    @property
    def engine(self) -> LocalEngine:
        """Raises BadRequest while it sleeps."""
        return self._sleeping.engine

    @property
    def model(self) -> ModelConfig:
        """What the checkpoint says about itself."""
        return self._loaded.ready.model

    @property
    def plan(self) -> EnginePlan:
        """What the device and the model allow."""
        return self._loaded.ready.plan

    def stats(self) -> EngineStats:
        """What the engine has done so far."""
        return self._sleeping.stats()

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams(**(self.text.default_sampling if self.text else {}))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. A prompt is a text, a list of ids, or {"prompt_token_ids": [...]}."""
        job = self._prepared(
            prompts,
            sampling_params,
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )
        return self._finished(job, use_tqdm)

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        **options: Any,
    ) -> list[str]:
        """Prompts that run in ``wait_for_completion``; the names of their outputs. ``options`` as in ``generate``."""
        job = self._prepared(prompts, sampling_params, lora_request=lora_request, priority=priority, **options)
        self._queued.join(job)
        return [output.request_id for output in job.outputs]

    def enqueue_chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> list[str]:
        """Conversations, as ``chat`` takes them, for ``wait_for_completion``."""
        prompts, params = self._rendered(
            messages,
            sampling_params,
            self._loaded.template(chat_template, chat_template_content_format),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.enqueue(prompts, params, lora_request, priority, **options)

    def wait_for_completion(
        self, output_type: Any = None, *, use_tqdm: bool | Callable[..., Any] = True
    ) -> list[RequestOutput]:
        """The answers to all that was enqueued, in its order. ``output_type``: there is but the one."""
        job, self._queued = self._queued, self._job()
        return self._finished(job, use_tqdm) if job.requests else []

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One conversation, or a list of them; contents are texts or lists of text parts. Raises BadRequest.

        ``chat_template`` is a Jinja template, or a file with one, for this call; ``chat_template_content_format`` says how
        it gets contents (EngineConfig).
        """
        prompts, params = self._rendered(
            messages,
            sampling_params,
            self._loaded.template(chat_template, chat_template_content_format),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(
            prompts,
            params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            priority=priority,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool | Callable[..., Any] = False,
        concurrency_limit: int | None = None,
        priority: int = 0,
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt, by a search that is slow and exact (client/beams.py).

        ``concurrency_limit``: prompts that are searched for at once; the engine has a limit of its own.
        """
        refuse_lora(lora_request)
        searches = [
            BeamSearch(str(next(self._ids)), ids, params, self.facts, priority=priority, cache_salt=self._salt)
            for _, ids in (text_and_ids(prompt, self._loaded) for prompt in as_list(prompts))
        ]
        at_once = concurrency_limit or len(searches) or 1
        with bar(len(searches), use_tqdm) as progress:
            for start in range(0, len(searches), at_once):
                part = searches[start : start + at_once]
                while requests := [one for search in part for one in search.requests()]:
                    told = {name: delta.logprobs[0] for name, delta in self._run(requests).items() if delta.logprobs}
                    for search in part:
                        if search.requests():
                            search.take(told)
                progress.update(len(part))
        tokenizer = None if self.text is None else self.text.tokenizer
        stopped = params.include_stop_str_in_output
        return [sequences_of(search, tokenizer, include_stop=stopped) for search in searches]

    def chat_token_ids(self, messages: list[Message], **options: Any) -> list[int]:
        """The prompt that the chat template makes. Raises BadRequest."""
        return self._loaded.chat_token_ids(messages, **options)

    def stream_chat(self, messages: list[Message], sampling_params: SamplingParams, **options: Any) -> Iterator[str]:
        """One answer's text, piece by piece. Closing the iterator early aborts the rest. Raises BadRequest."""
        job = self._job()
        job.add(None, self.chat_token_ids(messages, **options), sampling_params, 0)
        answer = job.outputs[0].outputs[0]
        with self.engine.stream(job.requests) as stream:
            for deltas in stream:
                before = len(answer.text)
                job.take(deltas, stream)
                if len(answer.text) > before:
                    yield answer.text[before:]

    def get_tokenizer(self) -> UserTokenizer:
        """The model's, under the names that transformers' users know. Raises BadRequest where there is none."""
        return UserTokenizer(self._loaded.need_text())

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """No prompt finds what was computed before; the blocks are given to others when they are needed."""
        return self._sleeping.reset_prefix_cache()

    def get_metrics(self) -> list[Metric | Histogram]:
        """What the engine has done so far, under vLLM's names."""
        return metrics_of(self.stats(), {"model_name": self.config.served_names[0]})

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give the memory of weights and cache back until ``wake_up``: how much, says ``level`` (client/sleeping.py)."""
        self._sleeping.sleep(level, mode, busy=not self._sleeping.is_sleeping and self.engine.has_work)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """Load again what ``sleep`` gave back; whether all of it is awake. ``tags``: all wakes, whichever is asked for first."""
        return self._sleeping.wake_up()

    def is_sleeping(self) -> bool:
        return self._sleeping.is_sleeping

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> LLM:
        """From an object whose fields are options, such as fastqwen.vllm.EngineArgs."""
        return cls(**vars(engine_args))

    @property
    def _salt(self) -> str:
        return self._sleeping.salt

    def _job(self) -> BatchJob:
        return BatchJob(self._loaded, self._ids, self._seeds, salt=self._salt)

    def _run(
        self, requests: list[EngineRequest], use_tqdm: bool | Callable[..., Any] = False
    ) -> dict[str, RequestDelta]:
        """Each request's last delta. Raises what ended one of them."""
        found: dict[str, RequestDelta] = {}
        with self.engine.stream(requests) as stream, bar(len(requests), use_tqdm) as progress:
            for deltas in stream:
                for delta in deltas:
                    if delta.finish_reason in ("error", "abort"):
                        raise error_of(delta.error)
                    if delta.finish_reason is not None:
                        found[delta.request_id] = delta
                        progress.update(1)
        return found

    def _prepared(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> BatchJob:
        """All prompts checked, and none begun. Raises BadRequest."""
        refuse_lora(lora_request)
        listed = as_list(prompts)
        params = self._params_for(sampling_params, len(listed))
        texts_and_ids = [text_and_ids(prompt, self._loaded) for prompt in listed]
        cut = cut_of(tokenization_kwargs)
        if cut is not None:
            params = [msgspec.structs.replace(one, truncate_prompt_tokens=cut) for one in params]
        if mm_processor_kwargs:
            raise BadRequest("mm_processor_kwargs: this model reads text only", "prompts")
        priorities = [priority or 0] * len(listed) if priority is None or isinstance(priority, int) else list(priority)
        if len(priorities) != len(listed):
            raise BadRequest(f"{len(listed)} prompts, but {len(priorities)} priorities", "priority")
        job = self._job()
        for prompt, (text, token_ids), sampling, one in zip(listed, texts_and_ids, params, priorities, strict=True):
            job.add(text, token_ids, sampling, one, salt=salt_of(prompt))
        return job

    def _finished(self, job: BatchJob, use_tqdm: bool | Callable[..., Any]) -> list[RequestOutput]:
        with self.engine.stream(job.requests) as stream, bar(len(job.outputs), use_tqdm) as progress:
            for deltas in stream:
                num_finished = job.take(deltas, stream)
                if num_finished:
                    progress.update(num_finished)
                    speed = job.num_generated / max(progress.format_dict["elapsed"], 1e-9)
                    progress.set_postfix_str(f"{speed:.0f} tok/s")
        return job.outputs

    def _rendered(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        template: Template,
        *,
        continue_final_message: bool,
        chat_template_kwargs: dict[str, Any] | None,
        **options: Any,
    ) -> tuple[list[Prompt], list[SamplingParams]]:
        """A prompt for each conversation, and its parameters. Raises BadRequest."""
        conversations = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
        params = self._params_for(sampling_params, len(conversations))
        options.update(chat_template_kwargs or {})
        if continue_final_message:
            options.update(continue_final_message=True, add_generation_prompt=False)
        tokenizer = self._loaded.need_text().tokenizer
        prompts: list[Prompt] = []
        for conversation, one in zip(conversations, params, strict=True):
            switches = {**options, **self._loaded.thinking_switch(one)}
            ids = template.encode(tokenizer, for_template(conversation), **switches)
            prompts.append({"prompt": tokenizer.decode(ids), "prompt_token_ids": ids})
        return prompts, params

    def _params_for(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise BadRequest(f"{count} prompts, but {len(given)} sampling_params", "sampling_params")
        return list(given)
