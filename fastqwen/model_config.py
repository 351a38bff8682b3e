"""ModelConfig: what a checkpoint's config.json says, under one set of names for all architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec

from fastqwen.errors import BadCheckpoint, BadConfig, ModelNotFound, Unsupported

RopeKind = Literal["default", "linear", "yarn", "llama3", "qwen1_ntk"]
MAX_CONFIG_BYTES = 16 * 2**20


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How positions become angles. ``qwen1_ntk`` raises theta by the prompt's length; the others are fixed."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    trained_len: int = 0  # positions seen in training, before any scaling
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


class MoeConfig(msgspec.Struct, frozen=True, kw_only=True):
    num_experts: int
    experts_per_token: int
    expert_size: int
    normalize_top_k: bool
    shared_size: int = 0  # 0: no shared expert
    sparse_layers: tuple[int, ...] = ()  # the others have a dense MLP


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes are of the whole model, before any tensor-parallel split."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rotated: int | None = None  # leading numbers of a head that are rotated; None: all
    logn_len: int | None = None  # queries beyond this position are scaled by log(position) / log(logn_len)
    windows: tuple[int | None, ...] = ()  # per layer; None sees everything. Empty: no layer has a window
    moe: MoeConfig | None = None
    quantization: dict[str, Any] | None = None
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    has_head: bool = True  # False: the checkpoint holds no output head, so it makes embeddings but no text

    @property
    def default_max_len(self) -> int:
        scaled = int(self.rope.trained_len * self.rope.factor) if self.rope.kind == "yarn" else 0
        return max(self.max_position_embeddings, scaled)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        return self.head_dim if self.rotated is None else self.rotated

    def local(self, count: int) -> ModelConfig:
        """The sizes of one of ``count`` shards; heads are split, or key-value heads held several times, inner sizes are
        rounded up. The vocabulary is still the whole one. Raises BadConfig where heads do not split evenly."""
        if count == 1:
            return self
        if count < 1 or self.num_heads % count or (self.num_kv_heads % count and count % self.num_kv_heads):
            raise BadConfig(
                f"--num-gpus is {count}, but {self.num_heads} heads with {self.num_kv_heads} key-value heads do not "
                "split evenly over so many"
            )
        moe = self.moe
        if moe is not None:
            sizes = {name: -(-getattr(moe, name) // count) for name in ("expert_size", "shared_size")}
            moe = msgspec.structs.replace(moe, **sizes)
        return msgspec.structs.replace(
            self,
            num_heads=self.num_heads // count,
            num_kv_heads=max(1, self.num_kv_heads // count),
            intermediate_size=-(-self.intermediate_size // count),
            moe=moe,
        )

    def kv_bytes_per_token(self, number_bytes: int, scale_bytes: int = 0) -> int:
        """What all layers' caches hold for a token; ``scale_bytes`` for each head's key and value, where its type has scales."""
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * number_bytes + scale_bytes)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.sparse_layers


class Fields:
    """A config.json, read with checks: each error names the file and the key."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def int(self, *keys: str, default: int | None = None, low: int = 1, high: int = 2**31) -> int:
        value = self._first(keys, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
            or value != int(value)
        ):
            raise BadCheckpoint(
                f"{self.source}: {keys[0]} is {short(value)}, expected a whole number from {low} to {high}"
            )
        return int(value)

    def float(self, *keys: str, default: float | None = None, positive: bool = False) -> float:
        value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e12:
            raise BadCheckpoint(f"{self.source}: {keys[0]} is {short(value)}, expected a number")
        if positive and value <= 0:
            raise BadCheckpoint(f"{self.source}: {keys[0]} is {short(value)}, expected a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)

    def get(self, *keys: str) -> Any:
        return next((self.values[key] for key in keys if self.values.get(key) is not None), None)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a checkpoint whose ``key`` has a value that this architecture's code does not compute."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise Unsupported(f"{self.source}: {key} is {short(value)}; supported: {', '.join(map(str, allowed))}")

    def _first(self, keys: tuple[str, ...], default: Any) -> Any:
        value = self.get(*keys)
        if value is None:
            if default is None:
                raise BadCheckpoint(f"{self.source}: {keys[0]} is missing")
            return default
        return value


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def common(fields: Fields, *, default_head_dim: int | None = None) -> dict[str, Any]:
    """The keys that Llama, Qwen2, Qwen3 and their MoE variants share, as ModelConfig arguments."""
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
    max_position_embeddings = fields.int("max_position_embeddings", default=2048)
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
        "windows": _windows(fields, num_layers),
        **checkpoint_facts(fields),
    }


def routed_experts(fields: Fields, num_layers: int) -> dict[str, Any]:
    """The keys that all mixtures of experts share, as MoeConfig arguments.

    Sparse is every decoder_sparse_step-th layer, but for those in mlp_only_layers.
    """
    num_experts = fields.int("num_experts", "num_local_experts", high=4096)
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
    if quantization is not None and not isinstance(quantization, dict):
        raise BadCheckpoint(f"{fields.source}: quantization_config is {short(quantization)}, expected an object")
    dtype = str(fields.get("dtype", "torch_dtype") or "bfloat16").removeprefix("torch.")
    return {
        "quantization": quantization,
        "dtype": dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16",
        "eos_token_ids": tuple(eos_ids),
        "bos_token_id": bos,
    }


def rope_config(fields: Fields, max_position_embeddings: int) -> RopeConfig:
    """Both spellings: rope_theta + rope_scaling (transformers 4) and rope_parameters (transformers 5)."""
    scaling = fields.get("rope_parameters", "rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise BadCheckpoint(f"{fields.source}: rope_scaling is {short(scaling)}, expected an object")
    inner = Fields(scaling, f"{fields.source}: rope_scaling")
    theta = (inner if inner.has("rope_theta") else fields).float("rope_theta", default=10000.0, positive=True)
    kind = str(inner.get("rope_type", "type") or "default")
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise Unsupported(f"{fields.source}: rope_scaling type {short(kind)}; supported: default, linear, yarn, llama3")
    trained_len = inner.int("original_max_position_embeddings", default=max_position_embeddings)
    optional = {key: inner.float(key) for key in ("attention_factor", "mscale", "mscale_all_dim") if inner.has(key)}
    return RopeConfig(
        theta=theta,
        kind=kind,  # type: ignore[arg-type]
        factor=inner.float("factor", default=1.0, positive=True),
        trained_len=trained_len,
        beta_fast=inner.float("beta_fast", default=32.0, positive=True),
        beta_slow=inner.float("beta_slow", default=1.0, positive=True),
        truncate=inner.flag("truncate", True),
        low_freq_factor=inner.float("low_freq_factor", default=1.0, positive=True),
        high_freq_factor=inner.float("high_freq_factor", default=4.0, positive=True),
        **optional,
    )


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows by layer: ``layer_types`` if there, else all layers from max_window_layers on, as Qwen2 means it."""
    window = fields.get("sliding_window")
    if window is None or not fields.flag("use_sliding_window", default=fields.has("layer_types")):
        return ()
    width = fields.int("sliding_window")
    layer_types = fields.get("layer_types")
    if layer_types is None:
        first = fields.int("max_window_layers", default=num_layers, low=0)
        windows = tuple(width if layer >= first else None for layer in range(num_layers))
    else:
        if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
            raise BadCheckpoint(f"{fields.source}: layer_types is {short(layer_types)}, expected a list of words")
        if len(layer_types) != num_layers:
            raise BadCheckpoint(f"{fields.source}: layer_types has {len(layer_types)} entries for {num_layers} layers")
        unknown = set(layer_types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise Unsupported(f"{fields.source}: layer_types contains {sorted(unknown)}")
        windows = tuple(width if kind == "sliding_attention" else None for kind in layer_types)
    return windows if any(windows) else ()


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a checkpoint folder. Raises ModelNotFound or BadCheckpoint, naming the file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BadCheckpoint(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, which no configuration is")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelNotFound(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values
