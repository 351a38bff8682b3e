"""One file per ``model_type`` word; a listing of this folder is the list of supported models.

A model file has ``parse(fields) -> ModelConfig`` and ``NAMES``, the checkpoint's names for the decoder's parts.
No file here imports torch, so that the planner can read any model's sizes.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import Fields, ModelConfig, read_json, short

QUANTIZE_CONFIG = "quantize_config.json"


def supported() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "names")


def find(model_type: str) -> ModuleType:
    """The file for a config.json's ``model_type``. Raises Unsupported."""
    name = model_type.replace("-", "_").lower()
    if name not in supported():
        raise Unsupported(f"model_type {short(model_type)} is not supported; supported: {', '.join(supported())}")
    return importlib.import_module(f"{__name__}.{name}")


def parse_config(values: dict[str, Any], source: str) -> ModelConfig:
    """Normalise a config.json. Raises Unsupported for an unknown architecture, BadCheckpoint for a bad value."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise BadCheckpoint(f"{source}: model_type is missing")
    try:
        module = find(model_type)
    except Unsupported as error:
        raise Unsupported(f"{source}: {error}") from None
    architectures = values.get("architectures")
    if isinstance(architectures, list) and architectures and not any(map(_reads_text, architectures)):
        raise Unsupported(f"{source}: architecture {short(architectures[0])} is not one that continues or embeds texts")
    config: ModelConfig = module.parse(Fields(values, source))
    return config


def _reads_text(architecture: Any) -> bool:
    """Qwen3ForCausalLM, QWenLMHeadModel, and Qwen3Model, the same without a head; not Qwen2ForRewardModel."""
    if not isinstance(architecture, str):
        return False
    return architecture.endswith(("ForCausalLM", "Model")) and not architecture.endswith("RewardModel")


def read_config(folder: Path) -> ModelConfig:
    """A folder's config.json; early GPTQ checkpoints keep their quantization in quantize_config.json beside it."""
    path = folder / "config.json"
    values = read_json(path)
    beside = quantization_source(folder)
    if beside != path:
        values["quantization_config"] = {"quant_method": "gptq", **read_json(beside)}
    return parse_config(values, str(path))


def quantization_source(folder: Path) -> Path:
    """The file that says how a folder's weights are stored."""
    path, beside = folder / "config.json", folder / QUANTIZE_CONFIG
    return beside if beside.is_file() and read_json(path).get("quantization_config") is None else path
