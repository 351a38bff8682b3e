"""What ``fastqwen serve`` runs today. The planner also answers on paper; a command line is only printed if it would be accepted."""

from __future__ import annotations

import functools
from pathlib import Path

from fastqwen.config import EngineConfig
from fastqwen.model_config import ModelConfig

QUANT = Path(__file__).parent.parent / "quant"  # one file for each method; importing them would import torch


@functools.cache
def quantization_methods() -> frozenset[str]:
    return frozenset(path.stem for path in QUANT.glob("*.py") if path.stem not in ("__init__", "dense"))


def is_quantization_served(model: ModelConfig) -> bool:
    return model.quantization is None or _method(model) in quantization_methods()


def not_served_yet(model: ModelConfig, *, num_gpus: int, kv_cache_dtype: str) -> tuple[str, ...]:
    """What stands in the way; nothing if the engine takes it."""
    found = []
    if num_gpus > 1 and "tensor_parallel_size" not in EngineConfig.__struct_fields__:
        found.append("one model on several GPUs")
    if kv_cache_dtype != "auto" and "kv_cache_dtype" not in EngineConfig.__struct_fields__:
        found.append("an 8-bit KV cache")
    if not is_quantization_served(model):
        found.append(f"{_method(model).upper()} weights")
    return tuple(found)


def _method(model: ModelConfig) -> str:
    return str((model.quantization or {}).get("quant_method", "")).lower()
