"""What a caller gets back, under the names that vLLM's users know."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec


class Logprob(msgspec.Struct, gc=False):
    """``rank`` 1 is the most likely token. ``decoded_token`` is None without a tokenizer.

    Answers have hundreds of thousands of them: collections of garbage pass them by.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One answer. ``stop_reason`` is the stop string or the stop token's id, None if the end-of-turn token or
    the length ended it."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: ClassVar[None] = None  # vLLM's scripts may look at it

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """All answers to one prompt. ``prompt_logprobs[i]`` is about prompt token i; the first one is None."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True
    # What vLLM's scripts may look at, and is not had here.
    metrics: ClassVar[None] = None
    lora_request: ClassVar[None] = None
    encoder_prompt: ClassVar[None] = None
    encoder_prompt_token_ids: ClassVar[None] = None
    kv_transfer_params: ClassVar[None] = None


@dataclass
class EmbeddingOutput:
    """A vector, of length 1 unless it was asked for as the model makes it."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass
class EmbeddingRequestOutput:
    """The vector of one prompt."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass
class ClassificationOutput:
    """Each label's probability, in the order of the checkpoint's labels."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass
class ClassificationRequestOutput:
    """The labels of one prompt."""

    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass
class PoolingOutput:
    """A torch tensor, float32: a vector's numbers, or one for each label."""

    data: Any


@dataclass
class PoolingRequestOutput:
    """The same of one prompt, whatever the task."""

    request_id: str
    outputs: PoolingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass
class ScoringOutput:
    """How well one text answers the other, 0 to 1; of embeddings the cosine, -1 to 1."""

    score: float


@dataclass
class ScoringRequestOutput:
    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


@dataclass
class BeamSearchSequence:
    """``tokens`` are the prompt's and the answer's, ``text`` is the text of all of them, as vLLM gives it."""

    tokens: list[int]
    logprobs: list[dict[int, Logprob]]
    cum_logprob: float
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass
class BeamSearchOutput:
    """The best first."""

    sequences: list[BeamSearchSequence]


@dataclass
class Metric:
    """A number that an engine tells of itself, under vLLM's name for it."""

    name: str
    value: float
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Counter(Metric):
    """It only grows."""


@dataclass
class Histogram:
    """How often something was at most so large; ``buckets`` are cumulative, by their bounds as texts."""

    name: str
    count: int
    sum: float
    buckets: dict[str, int]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Vector:
    """Several numbers of one kind. No figure of this engine is one."""

    name: str
    values: list[int]
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Gauge(Metric):
    """As it is now."""
