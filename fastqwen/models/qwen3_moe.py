"""Qwen3-MoE: Qwen3's attention; each sparse layer routes a token to a few of many small MLPs."""

from __future__ import annotations

from fastqwen.model_config import Fields, ModelConfig, MoeConfig, common
from fastqwen.models.names import Names

NAMES = Names()


def sparse_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    """Every decoder_sparse_step-th layer, but for those in mlp_only_layers."""
    step = fields.int("decoder_sparse_step", default=1)
    dense = set(fields.get("mlp_only_layers") or [])
    return tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense)


def parse(fields: Fields) -> ModelConfig:
    shared = common(fields, default_head_dim=128)
    moe = MoeConfig(
        num_experts=fields.int("num_experts", "num_local_experts", high=4096),
        experts_per_token=fields.int("num_experts_per_tok", high=256),
        expert_size=fields.int("moe_intermediate_size"),
        normalize_top_k=fields.flag("norm_topk_prob"),
        sparse_layers=sparse_layers(fields, shared["num_layers"]),
    )
    bias = fields.flag("attention_bias")
    return ModelConfig(**shared, qk_norm=True, qkv_bias=bias, o_bias=bias, moe=moe)
