"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention; routed experts, and a shared one behind a sigmoid gate."""

from __future__ import annotations

from fastqwen.model_config import Fields, ModelConfig, MoeConfig, common
from fastqwen.models.names import Names
from fastqwen.models.qwen3_moe import sparse_layers

NAMES = Names()


def parse(fields: Fields) -> ModelConfig:
    shared = common(fields)
    moe = MoeConfig(
        num_experts=fields.int("num_experts", "num_local_experts", high=4096),
        experts_per_token=fields.int("num_experts_per_tok", high=256),
        expert_size=fields.int("moe_intermediate_size"),
        normalize_top_k=fields.flag("norm_topk_prob"),
        shared_size=fields.int("shared_expert_intermediate_size"),
        sparse_layers=sparse_layers(fields, shared["num_layers"]),
    )
    return ModelConfig(**shared, qkv_bias=fields.flag("qkv_bias", True), moe=moe)
