"""What ``fastqwen serve`` runs today. The planner also answers on paper; a command line is only printed if it would be accepted."""

from __future__ import annotations

from fastqwen import quant
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


def not_served_yet(model: ModelConfig) -> tuple[str, ...]:
    """What stands in the way; nothing if the engine takes it."""
    refusal = _refusal(model)
    return () if refusal is None else (refusal,)
