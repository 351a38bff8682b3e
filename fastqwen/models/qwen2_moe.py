"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention; routed experts, and a shared one behind a sigmoid gate."""

from __future__ import annotations

from fastqwen.common_config import Windows, common, routed_experts
from fastqwen.model_config import Fields, ModelConfig, MoeConfig
from fastqwen.models.names import Names

NAMES = Names()
WINDOWS = Windows(slides=lambda layer, first: layer % 2 == 0 and layer < first)


def parse(fields: Fields) -> ModelConfig:
    shared = common(fields, windows=WINDOWS)
    moe = MoeConfig(
        **routed_experts(fields, shared["num_layers"]),
        shared_size=fields.int("shared_expert_intermediate_size"),
    )
    return ModelConfig(**shared, qkv_bias=fields.flag("qkv_bias", True), moe=moe)
