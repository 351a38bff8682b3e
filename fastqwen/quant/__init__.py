"""One file per ``quant_method`` word of config.json; ``dense`` is for checkpoints that have none.

A file has ``from_config(config: dict, source: str) -> method``; what a method has is said by QuantMethod. The files load
without torch, so that the planner can ask them for sizes.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fastqwen.common_config import OWN_WORDS
from fastqwen.errors import BadConfig, Unsupported
from fastqwen.kernels import Ops
from fastqwen.layers.linear import Linear
from fastqwen.model_config import Fields, short
from fastqwen.sharding import Ranges

if TYPE_CHECKING:
    from fastqwen.layers.moe import Experts
    from fastqwen.weights.source import Weights


@dataclass(frozen=True)
class LinearSpec:
    """A matrix that a decoder needs: what it is called in the checkpoint, and which part of it this shard holds."""

    names: tuple[str, ...]  # joined along the outputs
    in_size: int  # in the checkpoint, as the following
    out_sizes: tuple[int, ...]  # of each name
    bias: bool
    inputs: Ranges | None = None  # None: all
    outputs: tuple[Ranges, ...] | None = None  # of each name
    adds_bias: bool = True  # False where another shard, whose product is added to this one's, adds it


@dataclass(frozen=True)
class ExpertsSpec:
    """The same of a layer's routed experts, whose names contain {expert}."""

    router: str
    gate_up: tuple[str, str]
    down: str
    num_experts: int
    hidden_size: int
    expert_size: int
    inner: Ranges | None  # of expert_size, what this shard holds; None: all
    top_k: int
    normalize: bool


class QuantMethod(Protocol):
    notices: tuple[str, ...]  # what the configuration says and is not read, a line each
    preferred_dtype: str | None  # of activations on a GPU, unless the user says otherwise; None: the device's usual one

    def held_bytes(self, in_size: int, out_size: int, *, element: int, is_expert: bool) -> int:
        """What this process holds of a matrix without its bias; ``element`` is the bytes of a plain number."""

    def linear(self, weights: Weights, spec: LinearSpec, ops: Ops) -> Linear: ...

    def experts(self, weights: Weights, spec: ExpertsSpec, ops: Ops) -> Experts: ...


@cache
def supported() -> tuple[str, ...]:
    """The planner asks for each of some ten thousand plans."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def method_word(quantization: dict[str, Any] | None) -> str:
    """The method's file name, whether there is such a file or not."""
    if quantization is None:
        return "dense"
    word = quantization.get("quant_method")
    if word is None and any(quantization.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        word = "bitsandbytes"  # whose older files do not say it
    return str(word or "").lower().rpartition("/")[2].replace("-", "_")


def find(quantization: dict[str, Any] | None, source: str) -> QuantMethod:
    """The method that a config.json's quantization_config asks for. Raises Unsupported."""
    word = method_word(quantization)
    if not word:
        raise Unsupported(
            f"{source}: quantization_config has no quant_method, so how the quantization method packs is not known"
        )
    if word not in supported():
        named = ", ".join(name for name in supported() if name not in OWN_WORDS)
        raise Unsupported(f"{source}: quantization method {short(word)} is not supported; supported: {named}")
    method: QuantMethod = importlib.import_module(f"{__name__}.{word}").from_config(quantization or {}, source)
    return method


ONLINE_FORMATS: tuple[Literal["fp8", "int8", "int4"], ...] = ("fp8", "int8", "int4")  # for plain weights (online.py)
# What vLLM calls a checkpoint's method, where that is also a name of its kernel.
ALIASES = {"gptq_marlin": "gptq", "awq_marlin": "awq", "auto_gptq": "gptq", "inc": "auto_round"}


def wished(quantization: dict[str, Any] | None, wish: str | None, source: str) -> dict[str, Any] | None:
    """How a model is stored, if the user wishes ``wish``: the checkpoint's own method, or a format for a plain one.

    Raises BadConfig where these contradict each other.
    """
    if wish is None or wish.lower() == "none":
        return quantization
    word = wish.lower().replace("-", "_")
    if quantization is not None:
        own = method_word(quantization)
        if ALIASES.get(word, word) != own:
            raise BadConfig(f"--quantization is {wish}, but {source} says that the weights are {own}: leave it out")
        return quantization
    if source.endswith(".gguf"):
        if word == "gguf":
            return None
        raise BadConfig(
            f"--quantization is {wish}, but {source} is stored as it is: leave it out, or take another file"
        )
    if word not in ONLINE_FORMATS:
        raise BadConfig(
            f"--quantization is {wish}, but {source} says of no quantization; plain weights can be loaded as "
            f"{', '.join(ONLINE_FORMATS)}"
        )
    return {"quant_method": "online", "format": word}


def notices(quantization: dict[str, Any] | None) -> tuple[str, ...]:
    """Of a method that is there."""
    return find(quantization, "config.json").notices if method_word(quantization) in supported() else ()


def preferred_dtype(quantization: dict[str, Any] | None) -> str | None:
    """What a method that is not there yet will prefer is not known: then as without one."""
    if method_word(quantization) not in supported():
        return None
    return find(quantization, "config.json").preferred_dtype


def tell_unknown(fields: Fields, silent: frozenset[str]) -> None:
    """A notice of keys that nobody read; ``silent`` are those that change nothing, null and false are no others."""
    unknown = sorted(
        key for key, value in fields.values.items() if key not in fields.seen | silent and value not in (None, False)
    )
    if unknown:
        fields.tell(f"not read: {', '.join(short(key) for key in unknown[:8])}")
