"""ModelConfig: what a checkpoint's config.json says, under one set of names for all architectures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from fastqwen.errors import BadCheckpoint, BadConfig, ModelNotFound, Unsupported
from fastqwen.sharding import HeadSplit, even_size
from fastqwen.text_files import decoded, what_instead

Activation = Literal["softmax", "sigmoid", "none"]
RopeKind = Literal["default", "linear", "yarn", "llama3", "qwen1_ntk"]
MAX_CONFIG_BYTES = 16 * 2**20
MAX_SHARDS = 64


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


class DeltaConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Layers with a gated delta rule (arXiv 2412.06464) in attention's place: a state of fixed size instead of keys and
    values. Each key head serves num_value_heads / num_key_heads value heads that stand beside each other."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # of a head
    value_dim: int
    taps: int  # of the convolution over tokens: this one and those before it
    layers: tuple[int, ...]  # the others have attention

    @property
    def key_size(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """That the convolution runs over: queries, keys and values."""
        return 2 * self.key_size + self.value_size

    def state_bytes(self, number_bytes: int) -> int:
        """What one layer keeps of a sequence: a float32 matrix for each value head, and the convolution's inputs, activations
        of ``number_bytes``."""
        return 4 * self.value_size * self.key_dim + number_bytes * self.taps * self.channels


class Classifier(msgspec.Struct, frozen=True):
    """``labels``: the name of each number. ``activation``: what makes probabilities of the numbers."""

    labels: tuple[str, ...]
    activation: Activation


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
    delta: DeltaConfig | None = None  # None: all layers have attention
    attention_gate: bool = (
        False  # what attention gives is multiplied by sigmoid of a gate, a number each, made beside q
    )
    norms_around_one: bool = False  # norms' weights are stored less 1, but for those inside delta layers
    quantization: dict[str, Any] | None = None
    packed_bytes: int | None = (
        None  # of all tensors, as a GGUF file packs them; None: as other files, or unpacked when loaded
    )
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    has_head: bool = True  # False: the checkpoint holds no output head, so it makes embeddings but no text
    classifier: Classifier | None = None  # it makes a number for each label in place of text and embeddings
    notices: tuple[str, ...] = ()  # what its files say and is not computed so, a line each

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
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that keep keys and values."""
        return tuple(layer for layer in range(self.num_layers) if not self.is_delta(layer))

    def state_bytes(self, number_bytes: int) -> int:
        """What all layers keep of a sequence besides keys and values, whatever its length."""
        return 0 if self.delta is None else len(self.delta.layers) * self.delta.state_bytes(number_bytes)

    @property
    def rotary_dim(self) -> int:
        return self.head_dim if self.rotated is None else self.rotated

    @property
    def inner_unit(self) -> int:
        """Feed-forward parts are cut for shards at multiples of so many: within no group or block of a packed matrix."""
        found = self.quantization
        return 32 if found is None else math.lcm(self.expert_unit, *_whole(found.get("group_size", 128)))

    @property
    def expert_unit(self) -> int:
        """The same of routed experts, whose groups may be cut: they are unpacked while loading."""
        blocks = (self.quantization or {}).get("weight_block_size")
        return math.lcm(32, *(one for size in (blocks if isinstance(blocks, list) else []) for one in _whole(size)))

    def local(self, count: int) -> ModelConfig:
        """The sizes of one of ``count`` shards, all of which are alike; see HeadSplit for the heads. The vocabulary is still
        the whole one. Raises BadConfig for a number that cannot be."""
        if count == 1:
            return self
        if not 1 <= count <= MAX_SHARDS:
            raise BadConfig(f"--tensor-parallel-size is {count}, but must be at least 1 and at most {MAX_SHARDS}")
        moe, heads = self.moe, HeadSplit.of(self.num_heads, self.num_kv_heads, count)
        if moe is not None:
            moe = msgspec.structs.replace(
                moe,
                expert_size=even_size(moe.expert_size, count, self.expert_unit),
                shared_size=even_size(moe.shared_size, count, self.inner_unit),
            )
        delta = self.delta
        if delta is not None:
            if delta.num_key_heads % count:
                raise BadConfig(
                    f"--tensor-parallel-size is {count}, but {delta.num_key_heads} key heads of linear attention do not "
                    "split evenly"
                )
            split = {name: getattr(delta, name) // count for name in ("num_key_heads", "num_value_heads")}
            delta = msgspec.structs.replace(delta, **split)
        return msgspec.structs.replace(
            self,
            num_heads=heads.each * heads.piece,
            num_kv_heads=heads.each,
            intermediate_size=even_size(self.intermediate_size, count, self.inner_unit),
            moe=moe,
            delta=delta,
        )

    def kv_bytes_per_token(self, number_bytes: int, scale_bytes: int = 0) -> int:
        """What all layers' caches hold for a token; ``scale_bytes`` for each head's key and value, where its type has scales."""
        return 2 * len(self.attention_layers) * self.num_kv_heads * (self.head_dim * number_bytes + scale_bytes)

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None

    def is_delta(self, layer: int) -> bool:
        return self.delta is not None and layer in self.delta.layers

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.sparse_layers


class Fields:
    """A config.json, read with checks: each error names the file and the key.

    ``seen`` are the keys that somebody asked for, ``notices`` the lines to be told about them.
    """

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source
        self.seen: set[str] = set()
        self.notices: list[str] = []

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
        if isinstance(value, float):
            self.tell(f"{keys[0]} is {value!r} and is read as {int(value)}")
        return int(value)

    def float(self, *keys: str, default: float | None = None, positive: bool = False) -> float:
        value = self._first(keys, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e12:
            raise BadCheckpoint(f"{self.source}: {keys[0]} is {short(value)}, expected a number")
        if positive and value <= 0:
            raise BadCheckpoint(f"{self.source}: {keys[0]} is {short(value)}, expected a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise BadCheckpoint(f"{self.source}: {key} is {short(value)}, expected true or false")
        return value

    def get(self, *keys: str) -> Any:
        """The first of several names of one thing that has a value; another one that contradicts it is told."""
        self.seen.update(keys)
        there = [key for key in keys if self.values.get(key) is not None]
        for other in there[1:]:
            if self.values[other] != self.values[there[0]]:
                self.prefer(there[0], other)
        return self.values[there[0]] if there else None

    def has(self, key: str) -> bool:
        self.seen.add(key)
        return self.values.get(key) is not None

    def tell(self, what: str) -> None:
        line = f"{self.source}: {what}"
        if line not in self.notices:
            self.notices.append(line)

    def prefer(self, key: str, other: str) -> None:
        self.tell(f"{key} ({short(self.values[key])}) and {other} ({short(self.values[other])}) differ; {key} counts")

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Refuse a checkpoint whose ``key`` has a value that this architecture's code does not compute."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise Unsupported(f"{self.source}: {key} is {short(value)}; supported: {', '.join(map(str, allowed))}")

    def _first(self, keys: tuple[str, ...], default: Any) -> Any:
        value = self.get(*keys)
        if value is None:
            if default is None:
                raise BadCheckpoint(f"{self.source}: {keys[0]} is missing")
            return default
        return value


def _whole(value: Any) -> tuple[int, ...]:
    """Whatever a quantization_config says; its method checks it."""
    return (value,) if isinstance(value, int) and value > 0 else ()


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
    if isinstance(fields.get("quantization"), dict) and "quant_method" not in (quantization or {}):
        raise Unsupported(
            f"{fields.source}: these weights are packed by MLX, for Apple's machines, which is not supported; take the "
            "version that this one was made from, or its GPTQ or GGUF version"
        )
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


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a checkpoint folder. Raises ModelNotFound or BadCheckpoint, naming the file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BadCheckpoint(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, which no configuration is")
        values = json.loads(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise ModelNotFound(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} {what_instead(path) or f'is not valid JSON: {error}'}") from None
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values
