"""Random work, and the bytes and operations that it cannot do without."""

from __future__ import annotations

import random
import re

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.model_config import ModelConfig
from fastqwen.plan.facts import DTYPE_BYTES
from fastqwen.plan.memory import kv_bytes_per_token
from fastqwen.plan.weights import num_parameters, read_bytes


class Span(msgspec.Struct, frozen=True):
    """A length, or a range of lengths from which each request draws its own."""

    low: int
    high: int

    def draw(self, generator: random.Random) -> int:
        return generator.randint(self.low, self.high)


def span(text: str) -> Span:
    """``128`` or ``100-1024``. Raises BadConfig."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    low = int(match[1]) if match else 0
    high = int(match[2] or low) if match else 0
    if not 1 <= low <= high:
        raise BadConfig(f"{text!r} is not a length like 128 or a range like 100-1024")
    return Span(low, high)


def random_ids(generator: random.Random, length: int, vocab_size: int) -> list[int]:
    return [generator.randrange(vocab_size) for _ in range(length)]


class Needs(msgspec.Struct, frozen=True):
    """What work asks of a machine at least: bytes read from memory, and floating-point operations."""

    read_bytes: float
    operations: float


def decode_step(
    model: ModelConfig,
    dtype: str,
    *,
    batch: int,
    context_tokens: float,
    num_gpus: int = 1,
    kv_cache_dtype: str = "auto",
) -> Needs:
    """One new token for each of ``batch`` sequences: the weights once, every sequence's cache once. Of one of the GPUs that
    share the model."""
    per_token = kv_bytes_per_token(model, dtype, num_gpus=num_gpus, kv_cache_dtype=kv_cache_dtype)
    # states of fixed size are read and written
    cache = batch * (context_tokens * per_token + 2 * model.local(num_gpus).state_bytes(DTYPE_BYTES[dtype]))
    operations = batch * (2 * num_parameters(model, active=True) + _attention(model, context_tokens))
    return Needs(read_bytes(model, dtype, num_gpus, batch) + cache, operations / num_gpus)


def prefill(model: ModelConfig, dtype: str, *, batch: int, tokens: int, num_gpus: int = 1) -> Needs:
    """``batch`` prompts; each token attends to half of its prompt on average; one row of each needs the head. Of one of the
    GPUs that share the model."""
    head = model.vocab_size * model.hidden_size
    per_token = 2 * (num_parameters(model, active=True) - head) + _attention(model, tokens / 2)
    return Needs(read_bytes(model, dtype, num_gpus, batch * tokens), batch * (tokens * per_token + 2 * head) / num_gpus)


def _attention(model: ModelConfig, context_tokens: float) -> float:
    """A token's scores and weighted sum: two products of each head with the context. A memory of fixed size is multiplied by
    a vector and added to three times instead."""
    delta = model.delta
    memory = 0 if delta is None else 6 * len(delta.layers) * delta.value_size * delta.key_dim
    return memory + 4 * len(model.attention_layers) * model.q_size * context_tokens
