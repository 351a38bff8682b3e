"""What ``fastqwen serve`` runs today. The planner also answers on paper; a command line is only printed if it would be accepted."""

from __future__ import annotations

from fastqwen import quant
from fastqwen.config import EngineConfig
from fastqwen.errors import BadCheckpoint
from fastqwen.model_config import ModelConfig


def is_quantization_served(model: ModelConfig) -> bool:
    return _refusal(model) is None


def _refusal(model: ModelConfig) -> str | None:
    """What the loader would say to how the weights are stored."""
    word = quant.method_word(model.quantization)
    if word not in quant.supported():
        return f"{word.upper() or 'quantized'} weights"
    try:
        quant.find(model.quantization, "config.json")
    except BadCheckpoint as error:
        return str(error)
    return None


def not_served_yet(model: ModelConfig, *, kv_cache_dtype: str) -> tuple[str, ...]:
    """What stands in the way; nothing if the engine takes it."""
    found = []
    if kv_cache_dtype != "auto" and "kv_cache_dtype" not in EngineConfig.__struct_fields__:
        found.append("an 8-bit KV cache")
    refusal = _refusal(model)
    if refusal is not None:
        found.append(refusal)
    return tuple(found)
