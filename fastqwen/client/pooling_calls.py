"""What LLM says of texts instead of going on with them: vectors, labels, scores."""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from fastqwen.client.batch_job import Prompt
from fastqwen.client.model import LoadedModel
from fastqwen.client.pooled import Pooled, PoolingJob, cut_of
from fastqwen.client.progress import refuse_lora
from fastqwen.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringRequestOutput,
)
from fastqwen.records import EngineRequest, PoolingParams, RequestDelta


class PoolingCalls(ABC):
    """For a class that has a model loaded and can run requests."""

    _loaded: LoadedModel
    _ids: itertools.count[int]

    @property
    @abstractmethod
    def _salt(self) -> str: ...

    @abstractmethod
    def _run(
        self, requests: list[EngineRequest], use_tqdm: bool | Callable[..., Any] = False
    ) -> dict[str, RequestDelta]: ...

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
            pooling_params = params_with(pooling_params, {name: one for name, one in given.items() if one is not None})
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
        plain = params_with(pooling_params, {"use_activation": False})
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
        refuse_lora(lora_request)
        cut = truncate_prompt_tokens if truncate_prompt_tokens is not None else cut_of(tokenization_kwargs)
        asked = params_with(pooling_params, {} if cut is None else {"truncate_prompt_tokens": cut})
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
        refuse_lora(lora_request)
        cut = cut_of(tokenization_kwargs)
        if cut is not None:
            params = params_with(params, {"truncate_prompt_tokens": cut})
        job = self._pooling_job(use_tqdm, priority)
        return job.of(prompts, job.task(task), params)

    @staticmethod
    def _tensors(found: list[Pooled]) -> list[PoolingRequestOutput]:
        return [as_tensor(one) for one in found]


def as_tensor(one: Pooled) -> PoolingRequestOutput:
    return one.as_output(PoolingRequestOutput, PoolingOutput(torch.tensor(one.numbers)))


def params_with(
    params: PoolingParams | Sequence[PoolingParams] | None, fields: dict[str, Any]
) -> PoolingParams | Sequence[PoolingParams]:
    if params is None or isinstance(params, PoolingParams):
        return msgspec.structs.replace(params or PoolingParams(), **fields)
    return [msgspec.structs.replace(one, **fields) for one in params]
