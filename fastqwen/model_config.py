"""ModelConfig: what a checkpoint's config.json says, under one set of names for all architectures."""

from __future__ import annotations

import json
import math
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
    packs_experts: bool = False  # the device multiplies by packed experts as they are; said once a device is known
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

    @property
    def has_states(self) -> bool:
        """Whether layers keep something of fixed size for each sequence, beside keys and values or in their place."""
        return self.delta is not None

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
            own = HeadSplit.of(delta.num_value_heads, delta.num_key_heads, count)
            delta = msgspec.structs.replace(delta, num_key_heads=own.each, num_value_heads=own.each * own.piece)
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
            what = f"; supported: {', '.join(map(str, allowed))}" if allowed else ", which is not supported"
            raise Unsupported(f"{self.source}: {key} is {short(value)}{what}")

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


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a checkpoint folder. Raises ModelNotFound or BadCheckpoint, naming the file."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BadCheckpoint(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, which no configuration is")
        values = json.loads(decoded(path.read_bytes()))
    except FileNotFoundError:
        raise ModelNotFound(f"{path} does not exist") from None
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} {what_instead(path) or f'is not valid JSON: {error}'}") from None
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{path} holds {type(values).__name__}, expected a JSON object")
    return values
