"""Qwen3.5, 3.6 and 3.8, dense: a gated delta rule in three of four layers, gated attention in the fourth."""

from __future__ import annotations

from fastqwen.hybrid_config import parse_hybrid
from fastqwen.model_config import Fields, ModelConfig
from fastqwen.models.names import HYBRID_NAMES

NAMES = HYBRID_NAMES


def parse(fields: Fields) -> ModelConfig:
    return parse_hybrid(fields, "qwen3_5", sparse=False)
