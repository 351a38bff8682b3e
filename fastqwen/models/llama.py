"""Llama, and what took over its layout: SmolLM2 for one."""

from __future__ import annotations

from fastqwen.common_config import common
from fastqwen.model_config import Fields, ModelConfig
from fastqwen.models.names import Names

NAMES = Names()


def parse(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    return ModelConfig(
        **common(fields, default_max_len=2048), qkv_bias=bias, o_bias=bias, mlp_bias=fields.flag("mlp_bias")
    )
