"""One file per ``quant_method`` word of config.json; ``dense`` is for checkpoints that have none.

A file has ``from_config(config: dict, source: str) -> method``; what a method has is said by QuantMethod.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Protocol

from torch import Tensor

from fastqwen.errors import Unsupported
from fastqwen.kernels import Ops
from fastqwen.layers.linear import Linear
from fastqwen.model_config import short
from fastqwen.weights.source import Weights


class QuantMethod(Protocol):
    def linear(
        self, weights: Weights, names: tuple[str, ...], in_size: int, out_sizes: tuple[int, ...], bias: bool, ops: Ops
    ) -> Linear:
        """One matrix from the checkpoint's ``names``, joined along the outputs."""

    def matrix(self, weights: Weights, name: str, out_size: int, in_size: int) -> Tensor:
        """One matrix as plain numbers in the model's type, [out, in]: for parts that have no packed form."""


def supported() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(quantization: dict[str, Any] | None, source: str) -> QuantMethod:
    """The method that a config.json's quantization_config asks for. Raises Unsupported."""
    word = "dense" if quantization is None else str(quantization.get("quant_method", "")).lower().replace("-", "_")
    if word not in supported():
        raise Unsupported(
            f"{source}: quantization method {short(word)} is not supported; supported: {', '.join(supported())}"
        )
    method: QuantMethod = importlib.import_module(f"{__name__}.{word}").from_config(quantization or {}, source)
    return method
