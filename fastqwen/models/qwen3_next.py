"""Qwen3-Next: as qwen3_5_moe, with the delta rule's inputs in two matrices, a key head's rows beside each other."""

from __future__ import annotations

import msgspec

from fastqwen.hybrid_config import parse_hybrid
from fastqwen.model_config import Fields, ModelConfig
from fastqwen.models.names import HYBRID_NAMES

NAMES = msgspec.structs.replace(HYBRID_NAMES, delta_in=("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"))


def parse(fields: Fields) -> ModelConfig:
    return parse_hybrid(fields, "qwen3_next", sparse=True)
