"""Weights as they are: one number per parameter."""

from __future__ import annotations

from typing import Any

import torch

from fastqwen.kernels import Ops
from fastqwen.layers.linear import DenseLinear
from fastqwen.weights.source import Weights


class Dense:
    def matrix(self, weights: Weights, name: str, out_size: int, in_size: int) -> torch.Tensor:
        return weights.tensor(f"{name}.weight", (out_size, in_size))

    def linear(
        self, weights: Weights, names: tuple[str, ...], in_size: int, out_sizes: tuple[int, ...], bias: bool, ops: Ops
    ) -> DenseLinear:
        parts = [weights.tensor(f"{name}.weight", (out, in_size)) for name, out in zip(names, out_sizes, strict=True)]
        biases = (
            [weights.tensor(f"{name}.bias", (out,)) for name, out in zip(names, out_sizes, strict=True)] if bias else []
        )
        return DenseLinear(ops, join(parts), join(biases) if bias else None)


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def from_config(config: dict[str, Any], source: str) -> Dense:
    return Dense()
