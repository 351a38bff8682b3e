"""Weights as they are: one number per parameter, or the small whole numbers of a GGUF file where the device takes such."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastqwen.kernels import CodedWeight, DenseWeight, ExpertsWeight, Ops
from fastqwen.layers.linear import DenseLinear, Linear, PackedLinear, join, packed
from fastqwen.quant import ExpertsSpec, LinearSpec
from fastqwen.sharding import Part, Ranges

if TYPE_CHECKING:
    from torch import Tensor

    from fastqwen.layers.moe import Experts
    from fastqwen.weights.source import Weights

Matrix = Callable[[str, tuple[int, int], Part | None], "Tensor"]  # name, whole shape, part -> plain numbers


class Dense:
    notices = ()
    preferred_dtype = None

    def held_bytes(self, in_size: int, out_size: int, *, element: int, is_expert: bool) -> int:
        return in_size * out_size * element

    def linear(self, weights: Weights, spec: LinearSpec, ops: Ops) -> Linear:
        parts: list[Linear] = []
        coded: list[CodedWeight] = []  # neighbours that will be one matrix
        for index, name in enumerate(spec.names):
            bias = read_bias(weights, spec, index) if spec.bias and spec.adds_bias else None
            found = read_codes(weights, spec, index, name, ops)
            if coded and (found is None or not is_alike(coded[-1], found)):
                parts.append(packed_codes(weights, ops, coded))
                coded = []
            if found is None:
                parts.append(DenseLinear(ops, DenseWeight(read_matrix(weights, spec, index, name), bias)))
            else:
                coded.append(replace(found, bias=bias))
        if coded:
            parts.append(packed_codes(weights, ops, coded))
        return join(ops, parts)

    def experts(self, weights: Weights, spec: ExpertsSpec, ops: Ops) -> Experts:
        down = f"{spec.down.format(expert=0)}.weight"
        if stays_packed(weights, spec, ops) and weights.codes(down, (spec.hidden_size, spec.expert_size)) is not None:
            router = weights.tensor(f"{spec.router}.weight", (spec.num_experts, spec.hidden_size))
            return one_by_one(weights, spec, ops, self.linear, router)
        return stacked(weights, spec, ops, lambda name, shape, part: weights.tensor(f"{name}.weight", shape, part=part))


def of_modules(
    weights: Weights,
    spec: LinearSpec,
    ops: Ops,
    has_bias: bool,
    make: Callable[[int, str, Tensor | None], Linear | None],
) -> Linear:
    """One linear of the spec's modules: those that ``make`` gives from index, name and bias, and plain ones for the others."""
    parts: list[Linear] = []
    for index, name in enumerate(spec.names):
        bias = read_bias(weights, spec, index) if has_bias else None
        made = make(index, name, bias)
        parts.append(made or DenseLinear(ops, DenseWeight(read_matrix(weights, spec, index, name), bias)))
    return packed(join(ops, parts), weights.dtype)


def read_matrix(weights: Weights, spec: LinearSpec, index: int, name: str) -> Tensor:
    return weights.tensor(f"{name}.weight", (spec.out_sizes[index], spec.in_size), part=part_of(spec, index))


def read_codes(weights: Weights, spec: LinearSpec, index: int, name: str, ops: Ops) -> CodedWeight | None:
    """None where the file has none or the device takes none, and of a shard, which reads plain numbers."""
    if not ops.takes_codes(weights.dtype) or spec.inputs is not None or spec.outputs is not None:
        return None
    return weights.codes(f"{name}.weight", (spec.out_sizes[index], spec.in_size))


def is_alike(one: CodedWeight, other: CodedWeight) -> bool:
    """Whether both can be one matrix."""
    fields = ("bits", "zero", "group_size", "part_size")
    return all(getattr(one, field) == getattr(other, field) for field in fields) and all(
        (getattr(one, field) is None) == (getattr(other, field) is None) for field in ("parts", "minima", "min_parts")
    )


def packed_codes(weights: Weights, ops: Ops, parts: Sequence[CodedWeight]) -> PackedLinear:
    import torch

    fields = ("codes", "scales", "parts", "minima", "min_parts", "bias")
    of_each: dict[str, Any] = {field: [getattr(part, field) for part in parts] for field in fields}
    joined: dict[str, Any] = {field: None if of[0] is None else torch.cat(of) for field, of in of_each.items()}
    whole = replace(parts[0], **joined)
    product = ops.coded(whole)
    weights.hand_out(product.num_bytes)
    return PackedLinear(ops, product)


def read_bias(weights: Weights, spec: LinearSpec, index: int) -> Tensor:
    """Zeros where a module has none, and its neighbours have."""
    part = None if spec.outputs is None else Part(0, spec.outputs[index])
    if not spec.bias and not weights.has(f"{spec.names[index]}.bias"):
        return weights.zeros(spec.out_sizes[index] if part is None else part.size)
    return weights.tensor(f"{spec.names[index]}.bias", (spec.out_sizes[index],), part=part)


def part_of(spec: LinearSpec, index: int) -> Part | None:
    """Of [out, in]: a shard holds some of the outputs or some of the inputs."""
    if spec.outputs is not None:
        return Part(0, spec.outputs[index])
    return None if spec.inputs is None else Part(1, spec.inputs)


def stays_packed(weights: Weights, spec: ExpertsSpec, ops: Ops) -> bool:
    """Whether the device multiplies by packed experts; a shard's are plain numbers."""
    return ops.takes_codes(weights.dtype) and spec.inner is None


def one_by_one(
    weights: Weights,
    spec: ExpertsSpec,
    ops: Ops,
    linear_of: Callable[[Weights, LinearSpec, Ops], Linear],
    router: Tensor,
) -> Experts:
    """Each expert's matrices as linears of the method's own."""
    from fastqwen.layers.moe import PackedExperts

    hidden, size = spec.hidden_size, spec.expert_size

    def linear(names: tuple[str, ...], expert: int, in_size: int, out_size: int) -> Linear:
        names = tuple(name.format(expert=expert) for name in names)
        return linear_of(weights, LinearSpec(names, in_size, (out_size,) * len(names), bias=False), ops)

    experts = [
        (linear(spec.gate_up, expert, hidden, size), linear((spec.down,), expert, size, hidden))
        for expert in range(spec.num_experts)
    ]
    return PackedExperts(ops, DenseWeight(router), experts, spec.top_k, spec.normalize)


def stacked(weights: Weights, spec: ExpertsSpec, ops: Ops, matrix: Matrix) -> Experts:
    """All experts' matrices as plain numbers, in two tensors that are filled in place."""
    import torch

    from fastqwen.layers.moe import DenseExperts

    def part(dim: int, ranges: Ranges | None) -> Part | None:
        return None if ranges is None else Part(dim, ranges)

    hidden, whole, size = spec.hidden_size, spec.expert_size, spec.expert_size
    if spec.inner is not None:
        size = Part(0, spec.inner).size
    router = matrix(spec.router, (spec.num_experts, hidden), None)  # first: its shape says how many there are
    dtype, device = weights.dtype, weights.device
    gate_up = torch.empty((spec.num_experts, 2 * size, hidden), dtype=dtype, device=device)
    down = torch.empty((spec.num_experts, hidden, size), dtype=dtype, device=device)
    for expert in range(spec.num_experts):
        for half, name in enumerate(spec.gate_up):
            rows = gate_up[expert, half * size : (half + 1) * size]
            rows.copy_(matrix(name.format(expert=expert), (whole, hidden), part(0, spec.inner)))
        down[expert] = matrix(spec.down.format(expert=expert), (hidden, whole), part(1, spec.inner))
    return DenseExperts(ops, ExpertsWeight(router, gate_up, down, spec.top_k, spec.normalize))


def from_config(config: dict[str, Any], source: str) -> Dense:
    return Dense()
