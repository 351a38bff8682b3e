"""A matrix of weights and the ways in which a decoder uses it.

How a matrix is stored is a subclass that defines ``__call__``; it may replace the fused forms by faster ones. All forms
see the step whose tokens x has; the output head, which reads some of them only, sees None.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastqwen.kernels import DenseWeight, GroupedWeight, Norm, Ops, Product, ScaledWeight, StepTokens
from fastqwen.sharding import World

if TYPE_CHECKING:
    from torch import Tensor, dtype


class Linear(ABC):
    """``num_bytes`` is what one use must read of the weights; benchmarks measure themselves against it."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops

    @property
    @abstractmethod
    def num_bytes(self) -> int: ...

    @abstractmethod
    def __call__(self, x: Tensor, step: StepTokens | None) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""

    def of_norm(self, x: Tensor, norm: Norm, step: StepTokens | None) -> Tensor:
        """self(rms_norm(x))"""
        return self(self.ops.rms_norm(x, norm), step)

    def gated_of_norm(self, x: Tensor, norm: Norm, step: StepTokens) -> Tensor:
        """silu(gate) * up, where gate and up are the two halves of self(rms_norm(x))"""
        return self.ops.silu_mul(self.of_norm(x, norm, step))

    def add_to(self, residual: Tensor, x: Tensor, step: StepTokens) -> None:
        """residual += self(x), in place"""
        residual += self(x, step)

    def joined(self, other: Linear) -> Linear | None:
        """Both as one matrix, this one's outputs first; None if they cannot be one."""
        return None

    def settled(self) -> Linear:
        """The same where the device reads it fastest: for what is made for an engine's whole life."""
        return self


class DenseLinear(Linear):
    def __init__(self, ops: Ops, weight: DenseWeight) -> None:
        super().__init__(ops)
        self.weight = weight

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.weight.weight, self.weight.bias)

    def __call__(self, x: Tensor, step: StepTokens | None) -> Tensor:
        return self.ops.linear(x, self.weight)

    def of_norm(self, x: Tensor, norm: Norm, step: StepTokens | None) -> Tensor:
        return self.ops.norm_linear(x, norm, self.weight)

    def gated_of_norm(self, x: Tensor, norm: Norm, step: StepTokens) -> Tensor:
        return self.ops.norm_gated_linear(x, norm, self.weight)

    def add_to(self, residual: Tensor, x: Tensor, step: StepTokens) -> None:
        self.ops.linear_add(residual, x, self.weight)

    def joined(self, other: Linear) -> Linear | None:
        if not isinstance(other, DenseLinear):
            return None
        a, b = self.weight, other.weight
        return DenseLinear(self.ops, DenseWeight(_cat(a.weight, b.weight), _cat_biases(a.bias, b.bias)))

    def settled(self) -> Linear:
        return DenseLinear(self.ops, self.ops.settled(self.weight))


class GroupedLinear(Linear):
    """Whole numbers, packed, with a scale and a zero for each group of inputs: GPTQ's, AWQ's."""

    def __init__(self, ops: Ops, weight: GroupedWeight) -> None:
        super().__init__(ops)
        self.weight = weight

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.weight.codes, self.weight.scales, self.weight.zeros, self.weight.bias)

    def __call__(self, x: Tensor, step: StepTokens | None) -> Tensor:
        return self.ops.grouped_linear(x, self.weight)

    def joined(self, other: Linear) -> Linear | None:
        """One matrix if both group their inputs alike."""
        if not isinstance(other, GroupedLinear):
            return None
        a, b = self.weight, other.weight
        layouts = [(one.bits, one.group_size, one.scales.dtype) for one in (a, b)]
        if layouts[0] != layouts[1] or not _same_order(a.group_of, b.group_of):
            return None
        weight = replace(
            a,
            codes=_cat(a.codes, b.codes, dim=1),
            scales=_cat(a.scales, b.scales, dim=1),
            zeros=_cat(a.zeros, b.zeros, dim=1),
            bias=_cat_biases(a.bias, b.bias),
        )
        return GroupedLinear(self.ops, weight)


class ScaledLinear(Linear):
    """Floating-point numbers of 8 bits with a scale for each block of them."""

    def __init__(self, ops: Ops, weight: ScaledWeight) -> None:
        super().__init__(ops)
        self.weight = weight

    @property
    def num_bytes(self) -> int:
        return _num_bytes(self.weight.numbers, self.weight.scales, self.weight.bias)

    def __call__(self, x: Tensor, step: StepTokens | None) -> Tensor:
        return self.ops.scaled_linear(x, self.weight)

    def joined(self, other: Linear) -> Linear | None:
        """One matrix if the blocks of both lie side by side; the lower block's scales are repeated for the higher one's."""
        if not isinstance(other, ScaledLinear):
            return None
        a, b = self.weight, other.weight
        height = math.gcd(a.block[0], b.block[0])
        if a.block[1] != b.block[1] or a.out_size % height:
            return None
        weight = ScaledWeight(
            numbers=_cat(a.numbers, b.numbers),
            scales=_cat(_scales_by(a, height), _scales_by(b, height)),
            block=(height, a.block[1]),
            bias=_cat_biases(a.bias, b.bias),
        )
        return ScaledLinear(self.ops, weight)


class PackedLinear(Linear):
    """A grouped or scaled matrix as the device's own kernels read it."""

    def __init__(self, ops: Ops, product: Product) -> None:
        super().__init__(ops)
        self.product = product

    @property
    def num_bytes(self) -> int:
        return self.product.num_bytes

    def __call__(self, x: Tensor, step: StepTokens | None) -> Tensor:
        return self.product.plain(x)

    def of_norm(self, x: Tensor, norm: Norm, step: StepTokens | None) -> Tensor:
        if not self.product.reads_norm(norm, x):
            return super().of_norm(x, norm, step)
        return self.product.of_norm(x, norm)

    def gated_of_norm(self, x: Tensor, norm: Norm, step: StepTokens) -> Tensor:
        if not self.product.reads_norm(norm, x):
            return super().gated_of_norm(x, norm, step)
        return self.product.gated_of_norm(x, norm)

    def add_to(self, residual: Tensor, x: Tensor, step: StepTokens) -> None:
        self.product.add_to(residual, x)


class JoinedLinear(Linear):
    """Matrices that cannot be one, side by side: their outputs follow each other."""

    def __init__(self, ops: Ops, parts: Sequence[Linear]) -> None:
        super().__init__(ops)
        self.parts = tuple(parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    def __call__(self, x: Tensor, step: StepTokens | None) -> Tensor:
        first, *others = [part(x, step) for part in self.parts]
        return _cat(first, *others, dim=-1)


class ShardedLinear(Linear):
    """This shard's part of a product."""

    def __init__(self, part: Linear, world: World) -> None:
        super().__init__(part.ops)
        self.part = part
        self.world = world

    @property
    def num_bytes(self) -> int:
        return self.part.num_bytes


class SummedLinear(ShardedLinear):
    """A product whose inputs are split over the shards."""

    def __call__(self, x: Tensor, step: StepTokens | None) -> Tensor:
        out = self.part(x, step)
        self.world.all_reduce(out)
        return out

    def add_to(self, residual: Tensor, x: Tensor, step: StepTokens) -> None:
        if self.world.takes_parts(residual):
            self.world.add_parts(residual, self.part(x, step))
            return
        if self.world.index == 0:
            self.part.add_to(residual, x, step)
        else:
            residual.copy_(self.part(x, step))
        self.world.all_reduce(residual)


class GatheredLinear(ShardedLinear):
    """A product whose outputs are split over the shards, and wanted by each of them: the head's."""

    def __init__(self, part: Linear, world: World, out_size: int) -> None:
        super().__init__(part, world)
        self.out_size = out_size

    def __call__(self, x: Tensor, step: StepTokens | None) -> Tensor:
        return self.world.all_gather(self.part(x, step))[:, : self.out_size].contiguous()

    def of_norm(self, x: Tensor, norm: Norm, step: StepTokens | None) -> Tensor:
        return self.world.all_gather(self.part.of_norm(x, norm, step))[:, : self.out_size].contiguous()


def join(ops: Ops, parts: Sequence[Linear]) -> Linear:
    """Neighbours that can be one matrix are one; the others stay side by side."""
    found = [parts[0]]
    for part in parts[1:]:
        together = found[-1].joined(part)
        found[-1:] = [found[-1], part] if together is None else [together]
    found = [part.settled() for part in found]
    return found[0] if len(found) == 1 else JoinedLinear(ops, found)


def packed(linear: Linear, dtype: dtype) -> Linear:
    """With grouped and scaled matrices as the device's own kernels read them, if it has some; ``dtype`` is the activations'."""
    if isinstance(linear, JoinedLinear):
        return JoinedLinear(linear.ops, [packed(part, dtype) for part in linear.parts])
    product = linear.ops.packed(linear.weight, dtype) if isinstance(linear, GroupedLinear | ScaledLinear) else None
    return linear if product is None else PackedLinear(linear.ops, product)


def _num_bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _cat(*tensors: Tensor, dim: int = 0) -> Tensor:
    import torch  # the planner asks quantization methods for sizes, and does without torch

    return torch.cat(tensors, dim=dim)


def _cat_biases(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else _cat(first, second)


def _scales_by(weight: ScaledWeight, height: int) -> Tensor:
    """The scales for blocks of fewer outputs."""
    lines = weight.scales.repeat_interleave(weight.block[0] // height, 0)
    return lines[: -(-weight.out_size // height)]


def _same_order(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second if first is None or second is None else first.equal(second)
