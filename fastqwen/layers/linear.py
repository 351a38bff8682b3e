"""A matrix of weights and the three ways in which a decoder uses it.

A quantization method is a subclass that defines ``__call__``; it may replace the fused forms by faster ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastqwen.kernels import Ops


@dataclass(frozen=True)
class Norm:
    weight: Tensor  # [size]
    eps: float


class Linear(ABC):
    """``num_bytes`` is what one use must read of the weights; benchmarks measure themselves against it."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    @property
    @abstractmethod
    def num_bytes(self) -> int: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """self(rms_norm(x))"""
        return self(self.ops.rms_norm(x, norm.weight, norm.eps))

    def gated_of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """silu(gate) * up, where gate and up are the two halves of self(rms_norm(x))"""
        return self.ops.silu_mul(self.of_norm(x, norm))

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual += self(x), in place"""
        residual += self(x)


class DenseLinear(Linear):
    def __init__(self, ops: Ops, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(ops)
        self.weight = weight  # [out, in]
        self.bias = bias  # [out]

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self.ops.norm_linear(x, norm.weight, norm.eps, self.weight, self.bias)

    def gated_of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self.ops.norm_gated_linear(x, norm.weight, norm.eps, self.weight, self.bias)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        self.ops.linear_add(residual, x, self.weight, self.bias)


class JoinedLinear(Linear):
    """Matrices that cannot be one, side by side: their outputs follow each other."""

    def __init__(self, ops: Ops, parts: Sequence[Linear]) -> None:
        super().__init__(ops)
        self.parts = tuple(parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], dim=-1)
