"""One file per ``model_type`` word; a listing of this folder is the list of supported models.

A model file has ``parse(fields) -> ModelConfig`` and ``NAMES``, the checkpoint's names for the decoder's parts.
No file here imports torch, so that the planner can read any model's sizes.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import msgspec

from fastqwen.classifier_config import CLASSIFIER, classifier_of
from fastqwen.config_keys import account
from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.hybrid_config import text_part
from fastqwen.model_config import Fields, ModelConfig, read_json, short

SCALINGS = ("rope_scaling", "rope_parameters")
# Files beside config.json that say how weights are stored, where it does not, and the method whose tools write them.
QUANTIZE_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def supported() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "names")


def find(model_type: str) -> ModuleType:
    """The file for a config.json's ``model_type``. Raises Unsupported."""
    name = model_type.replace("-", "_").lower()
    if name not in supported():
        name = name.removesuffix("_text")  # the text part of a model with a vision part
    if name not in supported():
        raise Unsupported(f"model_type {short(model_type)} is not supported; supported: {', '.join(supported())}")
    return importlib.import_module(f"{__name__}.{name}")


def parse_config(
    values: dict[str, Any], source: str, overrides: Mapping[str, Any] = MappingProxyType({})
) -> ModelConfig:
    """Normalise a config.json. Raises Unsupported for an unknown architecture, BadCheckpoint for a bad value."""
    values = overridden(text_part(values), overrides)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise BadCheckpoint(f"{source}: model_type is missing")
    try:
        module = find(model_type)
    except Unsupported as error:
        raise Unsupported(f"{source}: {error}") from None
    architectures = values.get("architectures")
    heads = (*TEXT_HEADS, CLASSIFIER) + (WRAPPER,) * bool(module.NAMES.other_prefixes)
    if isinstance(architectures, list) and architectures and not any(_reads_text(one, heads) for one in architectures):
        raise Unsupported(
            f"{source}: architecture {short(architectures[0])} is not one that continues, embeds or classifies texts"
        )
    fields = Fields(values, source)
    config: ModelConfig = module.parse(fields)
    config = msgspec.structs.replace(config, classifier=classifier_of(fields))
    if not _fits(architectures, config.model_type):
        fields.tell(f"architectures is {short(architectures)}, model_type is {model_type}; {model_type} counts")
    return msgspec.structs.replace(config, notices=(*fields.notices, *account(fields, config)))


def _fits(architectures: Any, model_type: str) -> bool:
    """Whether the class's name begins with the type's, as Qwen3MoeForCausalLM with qwen3_moe."""
    if not isinstance(architectures, list) or not architectures:
        return True
    word = re.sub("[_-]", "", model_type)
    return any(
        re.match(rf"{word}(Text)?(LMHead|For|Model)", str(name).replace("_", ""), re.IGNORECASE)
        for name in architectures
    )


TEXT_HEADS = ("ForCausalLM", "Model")
WRAPPER = "ForConditionalGeneration"  # with a vision part beside the text model, where that may be left out


def _reads_text(architecture: Any, heads: tuple[str, ...]) -> bool:
    """Qwen3ForCausalLM, QWenLMHeadModel, and Qwen3Model, the same without a head; not Qwen2ForRewardModel."""
    if not isinstance(architecture, str):
        return False
    return architecture.endswith(heads) and not architecture.endswith("RewardModel")


def overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with some keys replaced. New positions take the place of old ones under either name, but for the
    base of their frequencies, unless they bring one."""
    if not overrides:
        return values
    new = {**values, **overrides}
    scaled = next((key for key in SCALINGS if overrides.get(key) is not None), None)
    old: dict[str, Any] = next(
        (values[key] for key in SCALINGS if isinstance(values.get(key), dict) and values[key]), {}
    )
    if scaled is not None:
        new |= {key: None for key in SCALINGS if key != scaled}
        if old.get("rope_theta") is not None:
            new["rope_theta"] = overrides.get("rope_theta", old["rope_theta"])
    elif "rope_theta" in overrides:
        new |= {key: _without_theta(values[key]) for key in SCALINGS if key in values}
    return new


def _without_theta(scaling: Any) -> Any:
    return (
        {key: value for key, value in scaling.items() if key != "rope_theta"} if isinstance(scaling, dict) else scaling
    )


def read_config(folder: Path, overrides: Mapping[str, Any] = MappingProxyType({})) -> ModelConfig:
    """A folder's config.json; some checkpoints keep their quantization in a file beside it."""
    path = folder / "config.json"
    values = read_json(path)
    beside = quantization_source(folder)
    if beside != path:
        values["quantization_config"] = {"quant_method": QUANTIZE_CONFIGS[beside.name], **read_json(beside)}
    config = parse_config(values, str(path), overrides)
    return msgspec.structs.replace(config, notices=(*config.notices, *_contradictions(folder, config)))


def _contradictions(folder: Path, config: ModelConfig) -> list[str]:
    """Where a file beside config.json says something else than it, which counts."""
    counts, found = config.quantization or {}, []
    for name in QUANTIZE_CONFIGS:
        other = read_json(folder / name) if (folder / name).is_file() else {}
        keys = [
            key
            for key in ("bits", "group_size", "desc_act")
            if key in other and other[key] != counts.get(key, other[key])
        ]
        if keys:
            found.append(f"{folder / name}: {', '.join(keys)} differ from config.json, which counts")
    return found


def quantization_source(folder: Path) -> Path:
    """The file that says how a folder's weights are stored."""
    path = folder / "config.json"
    beside = [folder / name for name in QUANTIZE_CONFIGS if (folder / name).is_file()]
    return beside[0] if beside and read_json(path).get("quantization_config") is None else path
