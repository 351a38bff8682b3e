"""LLM: the engine in this process, for scripts and notebooks."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import msgspec
from tqdm import tqdm

from fastqwen.client.batch_job import BatchJob, Prompt, as_list, salt_of, text_and_ids
from fastqwen.client.beams import BeamSearch, BeamSearchParams, sequences_of
from fastqwen.client.conversation import for_template
from fastqwen.client.engine import Ready, error_of
from fastqwen.client.local_engine import LocalEngine
from fastqwen.client.model import LoadedModel, Template, batch_config
from fastqwen.client.numbers import metrics_of
from fastqwen.client.pooled import Pooled, PoolingJob, cut_of
from fastqwen.client.user_tokenizer import UserTokenizer
from fastqwen.engine.core import EngineStats
from fastqwen.errors import BadRequest
from fastqwen.model_config import ModelConfig
from fastqwen.outputs import (
    BeamSearchOutput,
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Histogram,
    Metric,
    PoolingOutput,
    PoolingRequestOutput,
    RequestOutput,
    ScoringRequestOutput,
)
from fastqwen.plan import EnginePlan
from fastqwen.records import EngineRequest, PoolingParams, RequestDelta, SamplingParams
from fastqwen.text.template import Message

BAR_FROM_PROMPTS = 2


class LLM:
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
        self.engine = LocalEngine(self._loaded.core, self._loaded.ready)
        self._ids = itertools.count()
        self._seeds = random.Random(self.config.seed)  # noqa: S311 not a secret
        self._num_resets = 0
        self._asleep: Ready | None = None

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
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. A prompt is a text, a list of ids, or {"prompt_token_ids": [...]}."""
        _refuse_lora(lora_request)
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

        ``chat_template`` is a Jinja template, or a file with one, for this call. Texts reach templates in one piece, so
        ``chat_template_content_format`` has no other form to choose.
        """
        if chat_template_content_format not in ("auto", "string"):
            raise BadRequest("templates of text models get text: leave chat_template_content_format out", "messages")
        conversations = messages if messages and isinstance(messages[0], (list, tuple)) else [messages]
        options = {"tools": tools, "add_generation_prompt": add_generation_prompt, **(chat_template_kwargs or {})}
        if continue_final_message:
            options.update(continue_final_message=True, add_generation_prompt=False)
        template = None if chat_template is None else self._loaded.template(chat_template)
        prompts = [self._chat_prompt(conversation, template, options) for conversation in conversations]
        return self.generate(
            prompts,
            sampling_params,
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
        _refuse_lora(lora_request)
        searches = [
            BeamSearch(str(next(self._ids)), ids, params, self.facts, priority=priority, cache_salt=self._salt)
            for _, ids in (text_and_ids(prompt, self._loaded) for prompt in as_list(prompts))
        ]
        at_once = concurrency_limit or len(searches) or 1
        with _bar(len(searches), use_tqdm) as progress:
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

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: None = None,
        priority: int = 0,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """One vector of length 1 per prompt: the last token's hidden state, cut to ``dimensions`` if given.

        Token ids are used as they are; a text is closed as the tokenizer's post-processor says. Raises BadRequest.
        """
        if dimensions is not None or truncate_prompt_tokens is not None:
            given = {"dimensions": dimensions, "truncate_prompt_tokens": truncate_prompt_tokens}
            pooling_params = _params_with(pooling_params, {name: one for name, one in given.items() if one is not None})
        found = self._pooled(
            prompts, pooling_params, "embed", use_tqdm, lora_request, tokenization_kwargs, priority=priority
        )
        return [one.as_output(EmbeddingRequestOutput, EmbeddingOutput(one.numbers)) for one in found]

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[ClassificationRequestOutput]:
        """Each label's probability, of a model with a sequence-classification head (its names: ``model.classifier.labels``).

        With ``use_activation=False`` the head's own numbers. Raises BadRequest for a model without one.
        """
        found = self._pooled(prompts, pooling_params, "classify", use_tqdm, lora_request, tokenization_kwargs)
        return [one.as_output(ClassificationRequestOutput, ClassificationOutput(one.numbers)) for one in found]

    def reward(
        self,
        prompts: Prompt | Sequence[Prompt],
        /,
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """The classification head's own numbers: of a reward model one, the text's reward. Raises BadRequest."""
        plain = _params_with(pooling_params, {"use_activation": False})
        return self._tensors(self._pooled(prompts, plain, "classify", use_tqdm, lora_request, tokenization_kwargs))

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        truncate_prompt_tokens: int | None = None,
        use_tqdm: bool | Callable[..., Any] = True,
        pooling_params: PoolingParams | None = None,
        lora_request: None = None,
        instruction: str | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well each of ``data_2`` answers ``data_1``, or its own of ``data_1``.

        A model that reads pairs says it itself, in the prompt that it was trained with (client/scores.py), which has
        ``instruction`` in it, or that ``chat_template`` makes of the roles query and document; of any other model it is the
        cosine of both texts' embeddings. Raises BadRequest.
        """
        _refuse_lora(lora_request)
        cut = truncate_prompt_tokens if truncate_prompt_tokens is not None else cut_of(tokenization_kwargs)
        asked = _params_with(pooling_params, {} if cut is None else {"truncate_prompt_tokens": cut})
        assert isinstance(asked, PoolingParams)
        first, second = (
            ([data_1] if isinstance(data_1, str) else data_1),
            ([data_2] if isinstance(data_2, str) else data_2),
        )
        return self._pooling_job(use_tqdm).scores(
            first, second, asked, instruction=instruction, chat_template=chat_template
        )

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        lora_request: None = None,
        pooling_task: str | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        """What ``embed`` or ``classify`` gives, as tensors; ``pooling_task`` says which of them, and with ``token_embed`` or
        ``token_classify`` a tensor holds a line for each token. Raises BadRequest."""
        if pooling_task is None and isinstance(pooling_params, PoolingParams):
            pooling_task = pooling_params.task
        return self._tensors(
            self._pooled(prompts, pooling_params, pooling_task, use_tqdm, lora_request, tokenization_kwargs)
        )

    def _pooling_job(self, use_tqdm: bool | Callable[..., Any], priority: int = 0) -> PoolingJob:
        run = functools.partial(self._run, use_tqdm=use_tqdm)
        return PoolingJob(self._loaded, self._ids, run, salt=self._salt, priority=priority)

    def _pooled(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: PoolingParams | Sequence[PoolingParams] | None,
        task: str | None,
        use_tqdm: bool | Callable[..., Any],
        lora_request: None,
        tokenization_kwargs: dict[str, Any] | None,
        *,
        priority: int = 0,
    ) -> list[Pooled]:
        _refuse_lora(lora_request)
        cut = cut_of(tokenization_kwargs)
        if cut is not None:
            params = _params_with(params, {"truncate_prompt_tokens": cut})
        job = self._pooling_job(use_tqdm, priority)
        return job.of(prompts, job.task(task), params)

    @staticmethod
    def _tensors(found: list[Pooled]) -> list[PoolingRequestOutput]:
        import torch

        return [one.as_output(PoolingRequestOutput, PoolingOutput(torch.tensor(one.numbers))) for one in found]

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

    def reset_prefix_cache(self) -> bool:
        """No prompt finds what was computed before; the blocks are given to others when they are needed."""
        self._num_resets += 1
        return True

    def get_metrics(self) -> list[Metric | Histogram]:
        """What the engine has done so far, under vLLM's names."""
        return metrics_of(self.stats(), {"model_name": self.config.served_names[0]})

    def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and cache back until ``wake_up``. At ``level`` 1 the weights wait in host memory, which must
        have room for them; at 2, and where several processes compute, they are read from their files again. Nothing may be
        running."""
        if level not in (1, 2):
            raise BadRequest(f"level is {level}, but must be 1 or 2", "level")
        if self.is_sleeping():
            if level == 2:
                self._loaded.drop_kept()
            return
        if self.engine.has_work:
            raise BadRequest("requests are running: wait for them before sleep()", "level")
        self.reset_prefix_cache()
        self._asleep = self.engine.ready
        del self.engine
        self._loaded.stop(keep=level == 1)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Load again what ``sleep`` gave back. ``tags``: all of it is loaded, whichever is asked for first."""
        if self._asleep is not None:
            ready, core = self._loaded.start()
            self.engine, self._asleep = LocalEngine(core, ready), None

    def is_sleeping(self) -> bool:
        return self._asleep is not None

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> LLM:
        """From an object whose fields are options, such as fastqwen.vllm.EngineArgs."""
        return cls(**vars(engine_args))

    @property
    def _salt(self) -> str:
        return f"reset {self._num_resets}" if self._num_resets else ""

    def _job(self) -> BatchJob:
        return BatchJob(self._loaded, self._ids, self._seeds, salt=self._salt)

    def _run(
        self, requests: list[EngineRequest], use_tqdm: bool | Callable[..., Any] = False
    ) -> dict[str, RequestDelta]:
        """Each request's last delta. Raises what ended one of them."""
        found: dict[str, RequestDelta] = {}
        with self.engine.stream(requests) as stream, _bar(len(requests), use_tqdm) as progress:
            for deltas in stream:
                for delta in deltas:
                    if delta.finish_reason in ("error", "abort"):
                        raise error_of(delta.error)
                    if delta.finish_reason is not None:
                        found[delta.request_id] = delta
                        progress.update(1)
        return found

    def _chat_prompt(self, conversation: Any, template: Template | None, options: dict[str, Any]) -> Prompt:
        text = self._loaded.need_text()
        messages = for_template(conversation)
        if template is None:
            ids = self.chat_token_ids(messages, **options)
        else:
            ids = template.encode(text.tokenizer, messages, **options)
        return {"prompt": text.tokenizer.decode(ids), "prompt_token_ids": ids}

    def _params_for(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            return [self.get_default_sampling_params()] * count
        if isinstance(given, SamplingParams):
            return [given] * count
        if len(given) != count:
            raise BadRequest(f"{count} prompts, but {len(given)} sampling_params", "sampling_params")
        return list(given)


def _params_with(
    params: PoolingParams | Sequence[PoolingParams] | None, fields: dict[str, Any]
) -> PoolingParams | Sequence[PoolingParams]:
    if params is None or isinstance(params, PoolingParams):
        return msgspec.structs.replace(params or PoolingParams(), **fields)
    return [msgspec.structs.replace(one, **fields) for one in params]


def _refuse_lora(lora_request: Any) -> None:
    if lora_request is not None:
        raise BadRequest(
            "there are no adapters (LoRA) here: merge one into the weights and load the result", "lora_request"
        )


def _bar(num_prompts: int, wanted: bool | Callable[..., Any]) -> tqdm[Any]:
    off = not wanted or num_prompts < BAR_FROM_PROMPTS
    make = wanted if callable(wanted) else tqdm
    return cast("tqdm[Any]", make(total=num_prompts, unit="prompt", disable=off, dynamic_ncols=True))
