"""Qwen3-MoE: Qwen3's attention; each sparse layer routes a token to a few of many small MLPs."""

from __future__ import annotations

from fastqwen.common_config import Windows, common, routed_experts
from fastqwen.model_config import Fields, ModelConfig, MoeConfig
from fastqwen.models.names import Names

NAMES = Names()
WINDOWS = Windows(slides=lambda layer, first: True, reads_layer_types=False)


def parse(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias")
    shared = common(fields, windows=WINDOWS)
    moe = MoeConfig(**routed_experts(fields, shared["num_layers"], "num_local_experts"))
    return ModelConfig(**shared, qk_norm=True, qkv_bias=bias, o_bias=bias, moe=moe)
