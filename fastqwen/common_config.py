"""The keys of config.json that Llama and all Qwens share: sizes, positions, windows, experts, how weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import Fields, RopeConfig, short

OWN_WORDS = ("dense", "online")  # for what is no quant_method of a file: not packed, and packed while loading
DTYPES = ("float32", "bfloat16", "float16")


def common(
    fields: Fields, *, default_head_dim: int | None = None, default_max_len: int = 32768, windows: Windows | None = None
) -> dict[str, Any]:
    """The keys that Llama, Qwen2, Qwen3 and their MoE variants share, as ModelConfig arguments.

    ``windows`` says which layers have a sliding window; None: this architecture knows none.
    """
    fields.require("hidden_act", ("silu", "swish"))
    num_heads = fields.int("num_attention_heads", high=4096)
    hidden_size = fields.int("hidden_size", high=2**20)
    head_dim = fields.int("head_dim", default=default_head_dim or max(1, hidden_size // num_heads), high=1024)
    num_kv_heads = fields.int("num_key_value_heads", default=num_heads, high=4096)
    if head_dim % 2:
        raise BadCheckpoint(f"{fields.source}: head_dim is odd, and heads of {head_dim} numbers cannot be rotated")
    if num_heads % num_kv_heads:
        raise BadCheckpoint(
            f"{fields.source}: num_attention_heads ({num_heads}) is no multiple of num_key_value_heads ({num_kv_heads})"
        )
    num_layers = fields.int("num_hidden_layers", high=4096)
    max_position_embeddings = fields.int("max_position_embeddings", default=default_max_len)
    return {
        "model_type": str(fields.get("model_type") or ""),
        "vocab_size": fields.int("vocab_size", high=2**24),
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": fields.int("intermediate_size", high=2**22),
        "rms_norm_eps": fields.float("rms_norm_eps", default=1e-6),
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
        "max_position_embeddings": max_position_embeddings,
        "rope": rope_config(fields, max_position_embeddings),
        "windows": _windows(fields, num_layers, windows),
        **checkpoint_facts(fields),
    }


def routed_experts(fields: Fields, num_layers: int, *names: str) -> dict[str, Any]:
    """The keys that all mixtures of experts share, as MoeConfig arguments. ``names`` are further ones of num_experts, which
    count more, as in transformers.

    Sparse is every decoder_sparse_step-th layer, but for those in mlp_only_layers.
    """
    named = [name for name in names if fields.has(name)]
    num_experts = fields.int(*named, "num_experts", "num_local_experts", high=4096)
    step = fields.int("decoder_sparse_step", default=1)
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise BadCheckpoint(f"{fields.source}: mlp_only_layers is {short(dense)}, expected a list of layers")
    return {
        "num_experts": num_experts,
        "experts_per_token": fields.int("num_experts_per_tok", high=num_experts),
        "expert_size": fields.int("moe_intermediate_size"),
        "normalize_top_k": fields.flag("norm_topk_prob"),
        "sparse_layers": tuple(layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense),
    }


def checkpoint_facts(fields: Fields) -> dict[str, Any]:
    """What every generation's config.json says in the same way."""
    eos = fields.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in eos_ids):
        raise BadCheckpoint(f"{fields.source}: eos_token_id is {short(eos)}, expected a token id or a list of them")
    bos = fields.int("bos_token_id", low=0) if fields.has("bos_token_id") else None
    quantization = fields.get("quantization_config")
    if isinstance(fields.get("quantization"), dict) and "quant_method" not in (quantization or {}):
        raise Unsupported(
            f"{fields.source}: these weights are packed by MLX, for Apple's machines, which is not supported; take the "
            "version that this one was made from, or its GPTQ or GGUF version"
        )
    if quantization is not None and not isinstance(quantization, dict):
        raise BadCheckpoint(f"{fields.source}: quantization_config is {short(quantization)}, expected an object")
    if quantization is not None and quantization.get("quant_method") in OWN_WORDS:
        raise Unsupported(
            f"{fields.source}: quantization method {short(quantization['quant_method'])} is no method of files"
        )
    said = fields.get("dtype", "torch_dtype")
    dtype = str(said or "bfloat16").removeprefix("torch.")
    if dtype not in DTYPES:
        fields.tell(f"dtype is {short(said)}, and is read as bfloat16; known: {', '.join(DTYPES)}")
    return {
        "quantization": quantization,
        "dtype": dtype if dtype in DTYPES else "bfloat16",
        "eos_token_ids": tuple(eos_ids),
        "bos_token_id": bos,
    }


def rope_config(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Both spellings: rope_theta + rope_scaling (transformers 4) and rope_parameters (transformers 5)."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    scaling: Any = (fields.get("rope_scaling", "rope_parameters") if key == "rope_scaling" else fields.get(key)) or {}
    if not isinstance(scaling, dict):
        raise BadCheckpoint(f"{fields.source}: {key} is {short(scaling)}, expected an object")
    inner = Fields(scaling, f"{fields.source}: {key}")
    theta = _theta(fields, inner, key)
    kind = str(inner.get("rope_type", "type") or "default")
    if kind not in ROPE_KEYS:
        raise Unsupported(f"{fields.source}: rope_scaling type {short(kind)}; supported: {', '.join(ROPE_KEYS)}")
    rope = _scaled(fields, inner, kind, theta, max_position_embeddings)
    _account_for_rope(fields, inner, kind)
    fields.notices += inner.notices
    return rope


# What each kind of scaling must say, and what else it reads.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
COMMON_ROPE_KEYS = (
    "rope_theta", "rope_type", "type", "finetuned", "original_max_position_embeddings", "partial_rotary_factor",
)  # fmt: skip
OPTIONAL_ROPE_KEYS = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def _theta(fields: Fields, inner: Fields, key: str) -> float:
    if inner.has("rope_theta"):
        outer = fields.get("rope_theta")
        if outer is not None and outer != inner.values["rope_theta"]:
            fields.tell(
                f"rope_theta is {short(outer)}, in {key} {short(inner.values['rope_theta'])}; the latter counts"
            )
        return inner.float("rope_theta", positive=True)
    return fields.float("rope_theta", default=10000.0, positive=True)


def _scaled(fields: Fields, inner: Fields, kind: str, theta: float, max_position_embeddings: int) -> RopeConfig:
    for required in ROPE_KEYS[kind]:
        if not inner.has(required) and not (kind == "llama3" and fields.has(required)):
            raise BadCheckpoint(f"{inner.source}: {required} is missing, which the type {kind} needs")
    outer_len = "original_max_position_embeddings"
    trained = fields if kind in ("yarn", "llama3") and fields.has(outer_len) else inner
    if trained is fields and inner.get(outer_len) not in (None, fields.values[outer_len]):
        outer, within = short(fields.values[outer_len]), short(inner.values[outer_len])
        fields.tell(f"{outer_len} is {outer}, in rope_scaling {within}; the former counts")
    optional = {key: inner.float(key) for key in ("attention_factor", "mscale", "mscale_all_dim") if inner.has(key)}
    if kind == "yarn" and inner.float("factor") < 1:
        raise Unsupported(f"{inner.source}: factor is {short(inner.values['factor'])}; YaRN's is at least 1")
    return RopeConfig(
        theta=theta,
        kind=kind,  # type: ignore[arg-type]
        factor=inner.float("factor", default=1.0, positive=True) if kind != "default" else 1.0,
        trained_len=trained.int(outer_len, default=max_position_embeddings),
        beta_fast=inner.float("beta_fast", default=32.0, positive=True),
        beta_slow=inner.float("beta_slow", default=1.0, positive=True),
        truncate=inner.flag("truncate", True),
        low_freq_factor=inner.float("low_freq_factor", default=1.0, positive=True),
        high_freq_factor=inner.float("high_freq_factor", default=4.0, positive=True),
        **optional,
    )


def _account_for_rope(fields: Fields, inner: Fields, kind: str) -> None:
    """Keys that this kind of scaling does not use, unless they change what a rotation is."""
    nested = [key for key, value in inner.values.items() if isinstance(value, dict)]
    if nested:
        raise Unsupported(
            f"{inner.source}: {short(nested[0])} has positions of its own, but here all layers have the same"
        )
    inner.require("partial_rotary_factor", (1,))
    known = {*COMMON_ROPE_KEYS, *ROPE_KEYS[kind], *OPTIONAL_ROPE_KEYS.get(kind, ())}
    unused = sorted(key for key, value in inner.values.items() if key not in known and value is not None)
    if unused:
        inner.tell(f"the type {kind} does not use {', '.join(short(key) for key in unused[:8])}; computed as without")


class Windows(msgspec.Struct, frozen=True, kw_only=True):
    """Which layers see a sliding window only, where config.json does not list them by ``layer_types``."""

    slides: Callable[[int, int], bool]  # of a layer's number and max_window_layers
    reads_layer_types: bool = True


WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
DEFAULT_WINDOW, DEFAULT_WINDOW_LAYERS = 4096, 28  # as in every Qwen's configuration class
LAYER_NAMES = {"attention": "full_attention"}  # an older word: the present one


def _windows(fields: Fields, num_layers: int, windows: Windows | None) -> tuple[int | None, ...]:
    """Sliding windows by layer; empty if there are none."""
    kinds = _layer_types(fields, num_layers)
    slides = fields.flag("use_sliding_window") and windows is not None
    if windows is None or not windows.reads_layer_types:
        if "sliding_attention" in kinds and not slides:
            fields.tell("layer_types asks for sliding windows, which this model_type does not have; computed without")
        kinds = []
    if windows is None and (fields.flag("use_sliding_window") or fields.has("sliding_window")):
        fields.tell("this model_type has no sliding windows; computed without, as transformers does")
    fields.seen.update(WINDOW_KEYS)
    if not slides or windows is None:
        if "sliding_attention" in kinds:
            raise Unsupported(
                f"{fields.source}: layer_types asks for sliding windows, but use_sliding_window is not true"
            )
        return ()
    width = fields.int("sliding_window", default=DEFAULT_WINDOW)
    first = fields.int("max_window_layers", default=DEFAULT_WINDOW_LAYERS, low=0)
    if kinds:
        return _some(width if kind == "sliding_attention" else None for kind in kinds)
    return _some(width if windows.slides(layer, first) else None for layer in range(num_layers))


def _layer_types(fields: Fields, num_layers: int) -> list[str]:
    """Empty if config.json does not list them."""
    listed = fields.get("layer_types")
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(kind, str) for kind in listed):
        raise BadCheckpoint(f"{fields.source}: layer_types is {short(listed)}, expected a list of words")
    kinds = [LAYER_NAMES.get(kind, str(kind)) for kind in listed]
    if len(kinds) != num_layers:
        raise BadCheckpoint(f"{fields.source}: layer_types has {len(kinds)} entries for {num_layers} layers")
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise Unsupported(f"{fields.source}: layer_types contains {sorted(unknown)}, which is not supported")
    return kinds


def _some(windows: Iterable[int | None]) -> tuple[int | None, ...]:
    found = tuple(windows)
    return found if any(found) else ()
