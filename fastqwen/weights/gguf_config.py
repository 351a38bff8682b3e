"""A GGUF's metadata as a ModelConfig.

It is first said in the words of config.json, so that the files in fastqwen/models stay the only place that
knows what an architecture is.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import pi
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from fastqwen import models
from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import ModelConfig, RopeConfig
from fastqwen.models.names import Names
from fastqwen.weights.gguf_file import GgufFile
from fastqwen.weights.gguf_reader import short

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
}
HYBRIDS = ("qwen35", "qwen35moe", "qwen3next")

NAMES = Names(
    embed="token_embd",
    final_norm="output_norm",
    head="output",
    layer="blk.{layer}.",
    attention_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    o="attn_output",
    mlp_norm="ffn_norm",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
    router="ffn_gate_inp",
    expert_gate_up=("ffn_gate_exps", "ffn_up_exps"),  # all experts in one tensor [experts, out, in]
    expert_down="ffn_down_exps",
    shared_gate_up=("ffn_gate_shexp", "ffn_up_shexp"),
    shared_down="ffn_down_shexp",
    shared_gate="ffn_gate_inp_shexp",
)
# Where config.json would say whether queries, keys and values have biases; Qwen2's always have.
BIAS_KEYS = {"llama": "attention_bias", "qwen3": "attention_bias", "qwen3moe": "attention_bias", "qwen2moe": "qkv_bias"}
GATE_UP = "ffn_gate_up_exps"  # gate and up of all experts in one tensor [experts, 2 x out, in]
ROPE_FACTORS = "rope_freqs.weight"

# config.json's key: the metadata key after "{architecture}."
REQUIRED_KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
OPTIONAL_KEYS = {
    "intermediate_size": "feed_forward_length",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "norm_topk_prob": "expert_weights_norm",
}
SCALING_KEYS = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}

# Keys that change what a model computes, in ways that no file in fastqwen/models does; with these values they do not.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "expert_weights_scale": (0, 1),
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "pooling_type": (0, 3),  # none, and the last token's, which is how embeddings are made here
    "nextn_predict_layers": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
}
# Keys that are read elsewhere or follow from the tensors.
OTHER_KEYS = (
    "vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scaling.finetuned",
    "tensor_data_layout", "expert_shared_count", "rope.scale_linear",
)  # fmt: skip


# What else is kept in GGUF files.
PARTS = {
    "adapter": "an adapter (LoRA), which is to be merged into its base model first",
    "mmproj": "the part of a model that sees or hears", "imatrix": "an importance matrix, made for quantizing",
    "controlvector": "a control vector", "vocab": "a tokenizer alone",
}  # fmt: skip


def config_from_gguf(file: GgufFile, overrides: Mapping[str, Any] = MappingProxyType({})) -> ModelConfig:
    """Raises Unsupported for an unknown architecture or a variant that is not computed here, BadCheckpoint for damage."""
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        what = PARTS.get(kind, "something else") if isinstance(kind, str) else "something else"
        raise Unsupported(
            f"{file.path} holds {what} (general.type is {short(kind)}), not a model: give the model's own file"
        )
    architecture = file.metadata.get("general.architecture")
    if architecture in HYBRIDS:
        raise Unsupported(
            f"{file.path}: general.architecture is {short(architecture)}: hybrids are not read from GGUF, which has their heads in "
            "another order; load the model's safetensors files, with --quantization int4 or fp8 if they are too large"
        )
    if not isinstance(architecture, str) or architecture not in MODEL_TYPES:
        raise Unsupported(
            f"{file.path}: general.architecture is {short(architecture)}; supported in GGUF: {', '.join(MODEL_TYPES)}"
        )
    _refuse_variants(file, architecture)
    values = {
        "model_type": MODEL_TYPES[architecture],
        **_sizes(file, architecture),
        **_from_tensors(file, architecture),
    }
    if values.get("num_experts"):
        values.update(_expert_facts(file, architecture, values))
    values["rope_scaling"] = _rope_scaling(file, architecture)
    config = models.parse_config(values, str(file.path), overrides)
    unread = _unread_keys(file, architecture)
    config = msgspec.structs.replace(config, notices=(*config.notices, *unread))
    _check_heads(file, architecture, config)
    packed_bytes = sum(tensor.num_bytes for tensor in file.tensors.values())
    config = msgspec.structs.replace(config, packed_bytes=packed_bytes)
    if ROPE_FACTORS in file.tensors:
        config = msgspec.structs.replace(config, rope=_with_factors(file, config))
    return config


def _metadata(file: GgufFile, key: str) -> Any:
    """A single value. Some writers repeat it for each layer; layers that differ are not what our models have."""
    value = file.metadata.get(key)
    if isinstance(value, (list, np.ndarray)):
        if isinstance(value, list) or len(value) == 0 or (value != value[0]).any():
            raise Unsupported(f"{file.path}: {key} is not one number for all layers, which is not supported")
        return value[0].item()
    return value


def _refuse_variants(file: GgufFile, architecture: str) -> None:
    for key, neutral in NEUTRAL_VALUES.items():
        value = _metadata(file, f"{architecture}.{key}")
        if value is not None and value not in neutral:
            raise Unsupported(f"{file.path}: {architecture}.{key} is {short(value)}, which is not supported")
    if not architecture.endswith("moe") and _metadata(file, f"{architecture}.expert_count"):
        raise Unsupported(f"{file.path}: {architecture} with experts is not supported")


def _unread_keys(file: GgufFile, architecture: str) -> list[str]:
    known = {*REQUIRED_KEYS.values(), *OPTIONAL_KEYS.values(), *SCALING_KEYS.values(), *NEUTRAL_VALUES, *OTHER_KEYS}
    found = [key for key in file.metadata if key.startswith(f"{architecture}.")]
    unread = [key for key in found if key.removeprefix(f"{architecture}.") not in known]
    return (
        [f"{file.path}: a {architecture} does not read {', '.join(unread[:8])}; computed as without"] if unread else []
    )


def _sizes(file: GgufFile, architecture: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for ours, theirs in {**REQUIRED_KEYS, **OPTIONAL_KEYS}.items():
        key = f"{architecture}.{theirs}"
        value = _metadata(file, key)
        if value is None and ours in REQUIRED_KEYS:
            raise BadCheckpoint(f"{file.path}: the metadata has no {key}")
        values[ours] = value
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if values["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        values["head_dim"] = hidden // heads  # a GGUF means this, whatever the architecture's config.json would mean
    values["eos_token_id"] = [
        token for key in ("eos_token_id", "eot_token_id") if (token := _token_id(file, key)) is not None
    ]
    values["eos_token_id"] = list(dict.fromkeys(values["eos_token_id"]))
    values["bos_token_id"] = _token_id(file, "bos_token_id")
    return values


def _token_id(file: GgufFile, name: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}")
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31):
        return value
    raise BadCheckpoint(f"{file.path}: tokenizer.ggml.{name} is {short(value)}, expected a token's number")


def _from_tensors(file: GgufFile, architecture: str) -> dict[str, Any]:
    """What only the tensors say."""
    embed = _shape(file, f"{NAMES.embed}.weight")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > embed[0]:
        raise BadCheckpoint(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} tokens, the embedding {embed[0]} rows"
        )
    first = NAMES.layer.format(layer=0)
    kind = file.tensors[f"{NAMES.embed}.weight"].type.name
    query = file.tensors.get(f"{first}{NAMES.qkv[0]}.weight")
    qkv_bias = f"{first}{NAMES.qkv[0]}.bias" in file.tensors
    biases = {BIAS_KEYS[architecture]: qkv_bias} if architecture in BIAS_KEYS else {}
    if architecture == "llama":
        biases["mlp_bias"] = f"{first}{NAMES.down}.bias" in file.tensors
    return {
        **biases,
        "vocab_size": embed[0],
        "tie_word_embeddings": f"{NAMES.head}.weight" not in file.tensors,
        "dtype": {"F32": "float32", "F16": "float16"}.get(query.type.name if query else kind, "bfloat16"),
    }


def _shape(file: GgufFile, name: str) -> tuple[int, ...]:
    if name not in file.tensors:
        raise BadCheckpoint(f"{file.path}: tensor {name} is missing")
    return file.tensors[name].shape


def _expert_facts(file: GgufFile, architecture: str, values: dict[str, Any]) -> dict[str, Any]:
    """Older files leave sizes to the tensors' shapes, and whether to normalise to the architecture."""
    num_layers = values["num_hidden_layers"]
    if not isinstance(num_layers, int) or not 1 <= num_layers <= 4096:
        raise BadCheckpoint(f"{file.path}: {architecture}.block_count is {short(num_layers)}")
    prefixes = [NAMES.layer.format(layer=layer) for layer in range(num_layers)]
    sparse = [layer for layer, prefix in enumerate(prefixes) if f"{prefix}{NAMES.router}.weight" in file.tensors]
    if not sparse:
        raise BadCheckpoint(f"{file.path}: {architecture}.expert_count is set, but no layer has {NAMES.router}.weight")
    first = prefixes[sparse[0]]
    facts: dict[str, Any] = {
        "mlp_only_layers": sorted(set(range(num_layers)) - set(sparse)),
        "moe_intermediate_size": _expert_size(file, first),
    }
    if architecture == "qwen2moe":
        facts["shared_expert_intermediate_size"] = _shape(file, f"{first}{NAMES.shared_gate_up[0]}.weight")[0]
    if values["norm_topk_prob"] is None:
        facts["norm_topk_prob"] = architecture == "qwen3moe"
    if values["intermediate_size"] is None:
        facts["intermediate_size"] = facts["moe_intermediate_size"]
    return facts


def _expert_size(file: GgufFile, prefix: str) -> int:
    if f"{prefix}{GATE_UP}.weight" in file.tensors:
        return _shape(file, f"{prefix}{GATE_UP}.weight")[-2:][0] // 2
    return _shape(file, f"{prefix}{NAMES.expert_gate_up[0]}.weight")[-2:][0]


def _rope_scaling(file: GgufFile, architecture: str) -> dict[str, Any] | None:
    """As in llama.cpp a factor without a type scales all positions, and has an older name."""
    kind = _metadata(file, f"{architecture}.rope.scaling.type")
    older = _metadata(file, f"{architecture}.rope.scale_linear")
    if kind in (None, "linear"):
        factor = _metadata(file, f"{architecture}.rope.scaling.factor") or older
        return {"rope_type": "linear", "factor": factor} if factor not in (None, 0, 1) else None
    if kind == "none":
        return None
    if kind != "yarn":
        raise Unsupported(
            f"{file.path}: {architecture}.rope.scaling.type is {short(kind)}; supported: none, linear, yarn"
        )
    keys = {ours: f"{architecture}.{theirs}" for ours, theirs in SCALING_KEYS.items()}.items()
    return {
        "rope_type": kind,
        "factor": 1.0,
        **{ours: value for ours, theirs in keys if (value := _metadata(file, theirs)) is not None},
    }


def _check_heads(file: GgufFile, architecture: str, config: ModelConfig) -> None:
    if config.head_dim % 2:
        raise BadCheckpoint(f"{file.path}: heads of {config.head_dim} numbers cannot be rotated in pairs")
    for key in ("attention.value_length", "rope.dimension_count"):
        value = _metadata(file, f"{architecture}.{key}")
        if value not in (None, config.head_dim):
            raise Unsupported(
                f"{file.path}: {architecture}.{key} is {short(value)}, "
                f"supported is only the size of a head, {config.head_dim}"
            )


def _with_factors(file: GgufFile, config: ModelConfig) -> RopeConfig:
    """The Llama 3.1 profile, which a GGUF holds as a divisor for each frequency. Others are refused."""
    if file.tensors[ROPE_FACTORS].shape != (config.head_dim // 2,) or config.rope.kind != "default":
        raise Unsupported(f"{file.path}: tensor {ROPE_FACTORS} of this kind is not supported")
    divisors = file.read(ROPE_FACTORS).float().numpy().astype(np.float64)
    rope = msgspec.structs.replace(config.rope, kind="llama3", factor=float(divisors.max()), trained_len=8192)
    with np.errstate(all="ignore"):
        same = np.allclose(divisors, _llama3_divisors(rope, config.head_dim), rtol=1e-4)
    if not same:
        raise Unsupported(f"{file.path}: tensor {ROPE_FACTORS} holds another scaling than Llama 3.1's, not supported")
    return rope


def _llama3_divisors(rope: RopeConfig, head_dim: int) -> np.ndarray[Any, Any]:
    """float64 [head_dim / 2]: short waves stay, long ones are stretched by ``factor``, those between a part of it."""
    waves = 2 * pi * rope.theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((rope.trained_len / waves - low) / (high - low), 0.0, 1.0)
    divisors: np.ndarray[Any, Any] = 1.0 / ((1.0 - keep) / rope.factor + keep)
    return divisors
