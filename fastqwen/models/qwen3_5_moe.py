"""Qwen3.5-MoE, 3.6 and 3.8: as qwen3_5, with routed experts and a shared one behind a gate."""

from __future__ import annotations

from fastqwen.hybrid_config import parse_hybrid
from fastqwen.model_config import Fields, ModelConfig
from fastqwen.models.names import HYBRID_NAMES

NAMES = HYBRID_NAMES


def parse(fields: Fields) -> ModelConfig:
    return parse_hybrid(fields, "qwen3_5_moe", sparse=True)
