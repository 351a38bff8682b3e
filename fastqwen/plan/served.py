"""What ``fastqwen serve`` runs today. The planner also answers on paper; a command line is only printed if it would be accepted."""

from __future__ import annotations

from fastqwen import quant
from fastqwen.config import EngineConfig
from fastqwen.model_config import ModelConfig


def is_quantization_served(model: ModelConfig) -> bool:
    return quant.method_word(model.quantization) in quant.supported()


def not_served_yet(model: ModelConfig, *, num_gpus: int, kv_cache_dtype: str) -> tuple[str, ...]:
    """What stands in the way; nothing if the engine takes it."""
    found = []
    if num_gpus > 1 and "tensor_parallel_size" not in EngineConfig.__struct_fields__:
        found.append("one model on several GPUs")
    if kv_cache_dtype != "auto" and "kv_cache_dtype" not in EngineConfig.__struct_fields__:
        found.append("an 8-bit KV cache")
    if not is_quantization_served(model):
        found.append(f"{quant.method_word(model.quantization).upper()} weights")
    return tuple(found)
