"""Qwen1.5, Qwen2, Qwen2.5 and QwQ: grouped-query attention with biases on q, k and v only."""

from __future__ import annotations

from fastqwen.common_config import Windows, common
from fastqwen.model_config import Fields, ModelConfig
from fastqwen.models.names import Names

NAMES = Names()
WINDOWS = Windows(slides=lambda layer, first: layer >= first)


def parse(fields: Fields) -> ModelConfig:
    return ModelConfig(**common(fields, windows=WINDOWS), qkv_bias=True)
