"""The keys of Qwen3-Next and of Qwen3.5 and its successors: attention in every fourth layer, a gated delta rule in the others.

Published Qwen3.5 files hold a text model's keys under ``text_config``, beside those of a vision tower.
"""

from __future__ import annotations

from typing import Any

from fastqwen.common_config import common, routed_experts
from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import DeltaConfig, Fields, ModelConfig, MoeConfig, short

DEFAULT_ROTATED_SHARE = 0.25
DEFAULT_INTERVAL = 4
MULTIMODAL_KEYS = (
    "text_config", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
)  # fmt: skip
# How positions of images are laid out: in a text they are equal, and then all of it is the plain rotation.
IMAGE_POSITION_KEYS = ("mrope_section", "mrope_interleaved")
ROPE_KEYS = ("rope_parameters", "rope_scaling")


def text_part(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json as that of the text model inside: its own keys count more than those around them."""
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        return values
    outer = {key: value for key, value in values.items() if key not in MULTIMODAL_KEYS}
    merged = {**outer, **{key: value for key, value in inner.items() if value is not None}}
    # transformers' wrapper obeys the outer key, its text model the inner one; the tensors decide where they differ.
    merged["tie_word_embeddings"] = bool(values.get("tie_word_embeddings") or inner.get("tie_word_embeddings"))
    return merged


def parse_hybrid(fields: Fields, model_type: str, *, sparse: bool) -> ModelConfig:
    """``sparse``: with routed experts in every layer but those that the file names."""
    fields.require("attn_output_gate", (True,))
    fields.require("output_gate_type", ("swish", "silu"))
    fields.seen.update(("full_attention_interval", "layer_types", "language_model_only"))
    if fields.get("mamba_ssm_dtype") not in (None, "float32"):
        fields.tell(f"mamba_ssm_dtype is {short(fields.values['mamba_ssm_dtype'])}; states are kept in float32")
    known = _plain_keys(fields, sparse=sparse)
    shared = common(known, default_head_dim=256, windows=None)
    moe = None
    if sparse:
        shared_size = known.int("shared_expert_intermediate_size", default=0, low=0)
        moe = MoeConfig(**routed_experts(known, shared["num_layers"]), shared_size=shared_size)
    bias = known.flag("attention_bias")
    fields.seen |= known.seen
    fields.notices += [line for line in known.notices if line not in fields.notices]
    shared |= {"model_type": model_type, "windows": ()}
    return ModelConfig(
        **shared,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        rotated=_rotated(fields, shared["head_dim"]),
        moe=moe,
        delta=_delta(fields, shared["num_layers"]),
        attention_gate=True,
        norms_around_one=True,
    )


def _plain_keys(fields: Fields, *, sparse: bool) -> Fields:
    """The keys that these models share with others, as those have them."""
    own = ("layer_types", "partial_rotary_factor", *IMAGE_POSITION_KEYS)
    values = {key: value for key, value in fields.values.items() if key not in own}
    for key in ROPE_KEYS:
        if isinstance(values.get(key), dict):
            values[key] = {name: value for name, value in values[key].items() if name not in own}
    fields.seen.update(own)
    if sparse:
        values.setdefault("norm_topk_prob", True)
        values.setdefault("intermediate_size", values.get("moe_intermediate_size"))
    return Fields(values, fields.source)


def _rotated(fields: Fields, head_dim: int) -> int:
    """Leading numbers of a head that are rotated. The share may stand at the top, among the rope keys, or at both places."""
    shares = {}
    for key in ROPE_KEYS:
        if isinstance(fields.values.get(key), dict):
            inner = Fields(fields.values[key], f"{fields.source}: {key}")
            if inner.has("partial_rotary_factor"):
                shares[key] = inner.float("partial_rotary_factor", positive=True)
    if fields.has("partial_rotary_factor"):
        shares["partial_rotary_factor"] = fields.float("partial_rotary_factor", positive=True)
    if len(set(shares.values())) > 1:
        raise Unsupported(f"{fields.source}: partial_rotary_factor is {shares}: which of them holds is not known")
    share = next(iter(shares.values()), DEFAULT_ROTATED_SHARE)
    rotated = int(head_dim * share)
    if rotated < 2 or rotated % 2 or rotated > head_dim:
        raise BadCheckpoint(f"{fields.source}: partial_rotary_factor is {share}, which rotates {rotated} of {head_dim}")
    return rotated


def _delta(fields: Fields, num_layers: int) -> DeltaConfig:
    keys, values = fields.int("linear_num_key_heads", high=4096), fields.int("linear_num_value_heads", high=4096)
    if values % keys:
        raise BadCheckpoint(
            f"{fields.source}: linear_num_value_heads ({values}) is no multiple of linear_num_key_heads ({keys})"
        )
    return DeltaConfig(
        num_key_heads=keys,
        num_value_heads=values,
        key_dim=fields.int("linear_key_head_dim", high=1024),
        value_dim=fields.int("linear_value_head_dim", high=1024),
        taps=fields.int("linear_conv_kernel_dim", default=4, low=2, high=64),
        layers=_delta_layers(fields, num_layers),
    )


def _delta_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        interval = fields.int("full_attention_interval", default=DEFAULT_INTERVAL)
        return tuple(layer for layer in range(num_layers) if (layer + 1) % interval)
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise BadCheckpoint(
            f"{fields.source}: layer_types is {short(kinds)}, expected a word for each of {num_layers} layers"
        )
    unknown = sorted({str(kind) for kind in kinds} - {"linear_attention", "full_attention"})
    if unknown:
        raise Unsupported(f"{fields.source}: layer_types contains {unknown}, which is not supported")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
