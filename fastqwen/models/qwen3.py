"""Qwen3 dense: no biases, RMSNorm on each head's query and key before the rotation."""

from __future__ import annotations

from fastqwen.common_config import Windows, common
from fastqwen.model_config import Fields, ModelConfig
from fastqwen.models.names import Names

NAMES = Names()
WINDOWS = Windows(slides=lambda layer, first: layer >= first)


def parse(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    return ModelConfig(
        **common(fields, default_head_dim=128, windows=WINDOWS), qk_norm=True, qkv_bias=bias, o_bias=bias
    )
