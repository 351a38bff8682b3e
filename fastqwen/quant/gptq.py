"""GPTQ checkpoints, Int4 and Int8, in the layout of AutoGPTQ and GPTQModel (arXiv 2210.17323 for the method).

Weights stay packed. Each linear of the checkpoint has qweight int32 [in * bits / 32, out], qzeros int32
[groups, out * bits / 32], scales [groups, out], and perhaps g_idx int32 [in] and bias [out]. Format ``gptq`` stores each
zero minus one, ``gptq_v2`` as it is. A module that has a plain ``weight`` instead was left as it was, and is loaded so.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.kernels import GptqWeight, Ops
from fastqwen.kernels.reference import gptq_unpack
from fastqwen.layers.linear import DenseLinear, JoinedLinear, Linear
from fastqwen.model_config import Fields, short
from fastqwen.quant.dense import join
from fastqwen.weights.source import Weights

log = logging.getLogger(__name__)

ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


class GptqLinear(Linear):
    def __init__(self, ops: Ops, weight: GptqWeight, bias: Tensor | None) -> None:
        super().__init__(ops)
        self.weight = weight
        self.bias = bias  # [out]

    @property
    def num_bytes(self) -> int:
        tensors = (self.weight.codes, self.weight.scales, self.weight.zeros, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.gptq_linear(x, self.weight, self.bias)


class Gptq:
    def __init__(self, *, bits: int, group_size: int, desc_act: bool, zero_offset: int) -> None:
        self.bits = bits
        self.group_size = group_size  # -1: one group for all inputs
        self.desc_act = desc_act
        self.zero_offset = zero_offset
        self._told = False

    def linear(
        self, weights: Weights, names: tuple[str, ...], in_size: int, out_sizes: tuple[int, ...], bias: bool, ops: Ops
    ) -> Linear:
        """Parts with the same grouping of inputs become one matrix; others stay side by side."""
        any_bias = bias or any(weights.has(f"{name}.bias") for name in names)
        parts: list[DenseLinear | GptqLinear] = []
        for name, out_size in zip(names, out_sizes, strict=True):
            added = self._bias(weights, name, out_size, required=bias) if any_bias else None
            if weights.has(f"{name}.qweight") or not weights.has(f"{name}.weight"):
                part: DenseLinear | GptqLinear = GptqLinear(ops, self._weight(weights, name, in_size, out_size), added)
            else:
                part = DenseLinear(ops, weights.tensor(f"{name}.weight", (out_size, in_size)), added)
            joined = _joined(parts[-1], part) if parts else None
            parts = [*parts, part] if joined is None else [*parts[:-1], joined]
        return parts[0] if len(parts) == 1 else JoinedLinear(ops, parts)

    def matrix(self, weights: Weights, name: str, out_size: int, in_size: int) -> Tensor:
        if not weights.has(f"{name}.qweight"):
            return weights.tensor(f"{name}.weight", (out_size, in_size))
        if not self._told:
            log.warning("the experts' %d-bit weights are unpacked to %s while loading", self.bits, weights.dtype)
            self._told = True
        return gptq_unpack(self._weight(weights, name, in_size, out_size), 0, out_size).to(weights.dtype)

    def _bias(self, weights: Weights, name: str, out_size: int, *, required: bool) -> Tensor:
        if required or weights.has(f"{name}.bias"):
            return weights.tensor(f"{name}.bias", (out_size,))
        return torch.zeros(out_size, dtype=weights.dtype, device=weights.device)

    def _weight(self, weights: Weights, name: str, in_size: int, out_size: int) -> GptqWeight:
        per_word = 32 // self.bits
        group_size = in_size if self.group_size == -1 else self.group_size
        if in_size % per_word or out_size % per_word:
            raise weights.fault(f"{name}.qweight", f"cannot hold {in_size} x {out_size} numbers of {self.bits} bits")
        num_groups = -(-in_size // group_size)
        codes = weights.words(f"{name}.qweight", (in_size // per_word, out_size))
        packed_zeros = weights.words(f"{name}.qzeros", (num_groups, out_size // per_word))
        return GptqWeight(
            codes=codes,
            scales=weights.tensor(f"{name}.scales", (num_groups, out_size), keep_type=True),
            zeros=self._zeros(packed_zeros),
            group_of=self._groups(weights, name, in_size, group_size, num_groups),
            bits=self.bits,
            group_size=group_size,
        )

    def _zeros(self, packed: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32, device=packed.device)
        zeros = (packed.unsqueeze(-1) >> shifts).bitwise_and_(2**self.bits - 1)
        return zeros.flatten(1).to(torch.int16) + self.zero_offset

    def _groups(self, weights: Weights, name: str, in_size: int, group_size: int, num_groups: int) -> Tensor | None:
        if not self.desc_act and not weights.has(f"{name}.g_idx"):
            return None
        groups = weights.words(f"{name}.g_idx", (in_size,)).long()
        if int(groups.min()) < 0 or int(groups.max()) >= num_groups:
            raise weights.fault(f"{name}.g_idx", f"names groups outside 0 to {num_groups - 1}")
        in_order = torch.arange(in_size, device=groups.device) // group_size
        return None if torch.equal(groups, in_order) else groups


def _joined(first: DenseLinear | GptqLinear, second: DenseLinear | GptqLinear) -> DenseLinear | GptqLinear | None:
    """Both as one linear, or None if they are of different kinds or group their inputs differently."""
    bias = None if first.bias is None or second.bias is None else join([first.bias, second.bias])
    if isinstance(first, DenseLinear) and isinstance(second, DenseLinear):
        return DenseLinear(first.ops, join([first.weight, second.weight]), bias)
    if not isinstance(first, GptqLinear) or not isinstance(second, GptqLinear):
        return None
    a, b = first.weight, second.weight
    if not _same_groups(a.group_of, b.group_of) or a.scales.dtype != b.scales.dtype:
        return None
    weight = GptqWeight(
        codes=torch.cat([a.codes, b.codes], dim=1),
        scales=torch.cat([a.scales, b.scales], dim=1),
        zeros=torch.cat([a.zeros, b.zeros], dim=1),
        group_of=a.group_of,
        bits=a.bits,
        group_size=a.group_size,
    )
    return GptqLinear(first.ops, weight, bias)


def _same_groups(first: Tensor | None, second: Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


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
