"""Checkpoints of NVIDIA's Model Optimizer (the format is described in NVIDIA/Model-Optimizer): of theirs, FP8 weights."""

from __future__ import annotations

from typing import Any

from fastqwen.errors import Unsupported
from fastqwen.model_config import Fields, short
from fastqwen.quant import tell_unknown
from fastqwen.quant.fp8 import SCALES, Fp8, Scheme

SCHEMES = {"FP8": Scheme(None, None, SCALES), "FP8_PER_CHANNEL_PER_TOKEN": Scheme(1, None, SCALES)}
# How activations and the cache were scaled, and which modules stayed as they were, which the tensors show.
SILENT = frozenset((
    "quant_method", "exclude_modules", "ignore", "kv_cache_quant_algo", "kv_cache_scheme", "producer", "config_groups",
    "quantization", "quant_algo",
))  # fmt: skip


def from_config(config: dict[str, Any], source: str) -> Fp8:
    """Raises Unsupported for another algorithm."""
    inner = config.get("quantization")
    fields = Fields(inner if isinstance(inner, dict) else config, f"{source}: quantization_config")
    algorithm = str(fields.get("quant_algo") or "").upper()
    if algorithm not in SCHEMES:
        raise Unsupported(
            f"{fields.source}: quant_algo {short(algorithm)} is not supported; supported: {', '.join(SCHEMES)}"
        )
    tell_unknown(fields, SILENT)
    return Fp8(SCHEMES[algorithm], tuple(fields.notices))
