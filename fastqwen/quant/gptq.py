"""GPTQ checkpoints, Int4 and Int8, in the layout of AutoGPTQ and GPTQModel (arXiv 2210.17323 for the method).

Weights stay packed. Each linear of the checkpoint has qweight int32 [in * bits / 32, out], qzeros int32
[groups, out * bits / 32], scales [groups, out], and perhaps g_idx int32 [in] and bias [out]. Format ``gptq`` stores each
zero minus one, ``gptq_v2`` as it is. A module that has a plain ``weight`` instead was left as it was, and is loaded so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.kernels import DenseWeight, GroupedWeight, Ops
from fastqwen.layers.linear import DenseLinear, GroupedLinear, Linear, join, packed
from fastqwen.model_config import Fields, short
from fastqwen.quant import ExpertsSpec, LinearSpec
from fastqwen.quant.dense import read_bias, read_matrix, stacked
from fastqwen.sharding import Part, Ranges

if TYPE_CHECKING:
    from torch import Tensor

    from fastqwen.layers.moe import Experts
    from fastqwen.weights.source import Weights

log = logging.getLogger(__name__)

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
ZERO_BYTES, SCALE_BYTES = 2, 2  # zeros are held as int16, scales as the file has them, which is float16
ORDER_BYTES = 8  # the group of each input as int64, where they are out of order


class Gptq:
    preferred_dtype = "float16"  # that of the scales

    def __init__(self, *, bits: int, group_size: int, desc_act: bool, zero_offset: int) -> None:
        self.bits = bits
        self.group_size = group_size  # -1: one group for all inputs
        self.desc_act = desc_act
        self.zero_offset = zero_offset
        self._told = False

    def held_bytes(self, in_size: int, out_size: int, *, element: int, is_expert: bool) -> int:
        if is_expert:
            return in_size * out_size * element  # unpacked while loading
        groups = self._num_groups(in_size)
        order = ORDER_BYTES * in_size if self.desc_act else 0
        return in_size * out_size * self.bits // 8 + groups * out_size * (SCALE_BYTES + ZERO_BYTES) + order

    def linear(self, weights: Weights, spec: LinearSpec, ops: Ops) -> Linear:
        any_bias = spec.adds_bias and (spec.bias or any(weights.has(f"{name}.bias") for name in spec.names))
        parts: list[Linear] = []
        for index, name in enumerate(spec.names):
            bias = self._bias(weights, spec, index) if any_bias else None
            if weights.has(f"{name}.qweight") or not weights.has(f"{name}.weight"):
                outputs = None if spec.outputs is None else spec.outputs[index]
                sizes = spec.in_size, spec.out_sizes[index]
                parts.append(GroupedLinear(ops, self._weight(weights, name, *sizes, spec.inputs, outputs, bias)))
            else:
                parts.append(DenseLinear(ops, DenseWeight(read_matrix(weights, spec, index, name), bias)))
        return packed(join(ops, parts), weights.dtype)

    def experts(self, weights: Weights, spec: ExpertsSpec, ops: Ops) -> Experts:
        if not self._told and weights.has(f"{spec.down.format(expert=0)}.qweight"):
            self._told = True
            log.warning("the experts' %d-bit weights are unpacked to %s while loading", self.bits, weights.dtype)
        return stacked(weights, spec, ops, lambda name, shape, part: self._plain(weights, name, shape, part))

    def _plain(self, weights: Weights, name: str, shape: tuple[int, int], part: Part | None) -> Tensor:
        """One matrix as plain numbers in the model's type, [out, in] or the part of it."""
        from fastqwen.kernels.reference import unpack_grouped

        if not weights.has(f"{name}.qweight"):
            return weights.tensor(f"{name}.weight", shape, part=part)
        outputs, inputs = (part.ranges if part is not None and part.dim == dim else None for dim in (0, 1))
        weight = self._weight(weights, name, shape[1], shape[0], inputs, outputs, None)
        return unpack_grouped(weight, 0, weight.out_size).to(weights.dtype)

    def _bias(self, weights: Weights, spec: LinearSpec, index: int) -> Tensor:
        if spec.bias or weights.has(f"{spec.names[index]}.bias"):
            return read_bias(weights, spec, index)
        return weights.zeros(spec.out_sizes[index] if spec.outputs is None else Part(0, spec.outputs[index]).size)

    def _num_groups(self, in_size: int) -> int:
        return 1 if self.group_size == -1 else -(-in_size // self.group_size)

    def _weight(
        self,
        weights: Weights,
        name: str,
        in_size: int,
        out_size: int,
        inputs: Ranges | None,
        outputs: Ranges | None,
        bias: Tensor | None,
    ) -> GroupedWeight:
        per_word = 32 // self.bits
        group_size = in_size if self.group_size == -1 else self.group_size
        if in_size % per_word or out_size % per_word:
            raise weights.fault(f"{name}.qweight", f"cannot hold {in_size} x {out_size} numbers of {self.bits} bits")
        num_groups = self._num_groups(in_size)
        groups = self._groups(weights, name, in_size, group_size, num_groups)
        packed_zeros = weights.words(f"{name}.qzeros", (num_groups, out_size // per_word))
        zeros = self._zeros(packed_zeros)
        codes = scales = None  # which part of them; None: all
        if outputs is not None:
            codes = scales = Part(1, outputs)
            zeros = weights.lines(zeros, scales)
        elif inputs is not None:
            codes = Part(0, _divided(weights, name, inputs, per_word, "numbers of a word"))
            if groups is None and self.group_size != -1:
                scales = Part(0, _divided(weights, name, inputs, group_size, "inputs of a group"))
                zeros = weights.lines(zeros, scales)
            elif groups is not None:
                groups = weights.lines(groups, Part(0, inputs))
        return GroupedWeight(
            codes=weights.words(f"{name}.qweight", (in_size // per_word, out_size), part=codes),
            scales=weights.tensor(f"{name}.scales", (num_groups, out_size), keep_type=True, part=scales),
            zeros=zeros,
            group_of=groups,
            bits=self.bits,
            group_size=group_size if inputs is None or self.group_size != -1 else Part(0, inputs).size,
            bias=bias,
        )

    def _zeros(self, packed: Tensor) -> Tensor:
        import torch

        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=packed.device)
        zeros = (packed.unsqueeze(-1) >> shifts).bitwise_and_(2**self.bits - 1)
        return zeros.flatten(1).to(torch.int16) + self.zero_offset

    def _groups(self, weights: Weights, name: str, in_size: int, group_size: int, num_groups: int) -> Tensor | None:
        if not self.desc_act and not weights.has(f"{name}.g_idx"):
            return None
        groups = weights.words(f"{name}.g_idx", (in_size,)).long()
        if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise weights.fault(f"{name}.g_idx", f"names groups outside 0 to {num_groups - 1}")
        in_order = groups.new_ones(in_size).cumsum(0).sub_(1) // group_size
        return None if groups.equal(in_order) else groups


def _divided(weights: Weights, name: str, ranges: Ranges, unit: int, what: str) -> Ranges:
    if any(edge % unit for pair in ranges for edge in pair):
        raise weights.fault(
            f"{name}.qweight", f"cannot be split at {ranges}: the edges must be multiples of the {unit} {what}"
        )
    return tuple((start // unit, stop // unit) for start, stop in ranges)


def from_config(config: dict[str, Any], source: str) -> Gptq:
    """Raises Unsupported for a variant whose numbers would come out wrong, BadCheckpoint for a value that cannot be."""
    fields = Fields(config, f"{source}: quantization_config")
    bits = fields.int("bits")
    if bits not in (4, 8):
        raise Unsupported(f"{fields.source}: GPTQ with {bits} bits is not supported; supported: 4, 8")
    layout = str(fields.get("checkpoint_format", "format") or "gptq")
    if layout not in ZERO_OFFSETS or fields.flag("is_marlin_format"):
        word = short("marlin" if fields.flag("is_marlin_format") else layout)
        raise Unsupported(
            f"{fields.source}: checkpoint_format {word} is not supported; supported: {', '.join(ZERO_OFFSETS)}"
        )
    fields.require("pack_dtype", ("int32",))
    fields.require("lm_head", (False,))
    if any(not str(rule).startswith("-") for rule in fields.get("dynamic") or {}):
        raise Unsupported(f"{fields.source}: dynamic gives modules different bits or groups, which is not supported")
    group_size = fields.int("group_size", default=-1, low=-1)
    if group_size == 0:
        raise BadCheckpoint(f"{fields.source}: group_size is 0, expected -1 or at least 1")
    return Gptq(
        bits=bits,
        group_size=group_size,
        desc_act=fields.flag("desc_act"),
        zero_offset=ZERO_OFFSETS[layout],
    )
