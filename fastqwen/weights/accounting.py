"""Tensors that a checkpoint holds and nobody read: each is neutral, refused, or named in a line."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from fastqwen import models
from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import ModelConfig
from fastqwen.weights.source import Weights

log = logging.getLogger(__name__)

# Parts that other decoders of this kind have in a layer: a model that was trained with them is another one without.
OTHER_PARTS = re.compile(
    r"\.(sinks|lora_[AB]|lora_magnitude_vector|lora_embedding_[AB]|e_score_correction_bias|expert_bias"
    r"|(pre|post)_feedforward_layernorm|post_self_attn_layernorm|post_mlp_layernorm|shared_experts?|weight_scale(_inv)?"
    r"|weight_packed|weight_scale_2|input_scale|qweight|qzeros|scales|SCB|absmax)(\.|$)"
)
MAX_NAMED = 5
# What stands beside a text model and changes nothing of its answers.
BESIDE = {
    "the vision part": re.compile(r"^(model\.)?visual\."),
    "a head for guessing ahead": re.compile(r"^(model\.|model\.language_model\.)?mtp[._]"),
}


def account(weights: Weights, model: ModelConfig, source: str) -> None:
    """Names what was not read, once, but for biases of zeros. Raises Unsupported for a tensor that belongs to a part of this
    model, or would in another."""
    names, named = models.find(model.model_type).NAMES, []
    unread = weights.unread()
    beside = {part: [name for name in unread if found.search(name)] for part, found in BESIDE.items()}
    told = [f"{part} ({_some(all_of, 1)})" for part, all_of in beside.items() if all_of]
    if told:
        log.warning("not read: %s", ", ".join(told))
    for name in sorted(set(unread).difference(*beside.values())):
        is_zero = name.endswith("bias") and weights.is_zero(name)
        if is_zero and name.endswith(".bias") and names.multiplies(name, model.num_layers):
            continue
        inside = names.holds(name, model.num_layers)
        if not is_zero and (inside or (OTHER_PARTS.search(name) and re.search(r"\d", name))):
            raise Unsupported(
                f"{weights.location(name)}: tensor {name} is there, but a {model.model_type} as {source} describes it "
                "does not have it: it would be left out of the answers"
            )
        named.append(name)
    if named:
        log.warning("tensors that a %s does not have are not read: %s", model.model_type, _some(named))


def _some(names: list[str], most: int = MAX_NAMED) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(name[:200] for name in names[:most]) + more


def check_lacking(lacking: Mapping[str, Path], model: ModelConfig) -> None:
    """Raises BadCheckpoint, before anything is loaded, for a tensor that the model needs and the files do not have.

    ``lacking``: names that an index lists, with the file that should hold them.
    """
    names = models.find(model.model_type).NAMES
    spared = (".bias", *((".q_norm.weight", ".k_norm.weight") if not model.qk_norm else ()))
    spared += (f"{names.head}.weight",) if model.tie_word_embeddings else ()
    held = (name for name in lacking if names.holds(name, model.num_layers))
    needed = {
        name: lacking[name] for name in held if not name.endswith(spared)
    }  # a bias will be missed where it is read
    if needed:
        name, file = next(iter(needed.items()))
        if not file.is_file():
            files = {one for one in needed.values() if not one.is_file()}
            raise BadCheckpoint(
                f"{file.parent}: {len(files)} shards are missing, the first is {min(files).name}; fetch it again"
            )
        raise BadCheckpoint(f"{file}: tensor {name} is missing, though the index lists it; fetch this file again")
    if lacking:
        log.warning("the index lists tensors that no file has, and this model does not need: %s", _some(list(lacking)))
