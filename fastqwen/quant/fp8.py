"""FP8 checkpoints: numbers of 8 bits (e4m3, arXiv 2209.05433) with a scale for each block, each output or each matrix.

Qwen's own and DeepSeek's have blocks of 128 x 128 and ``weight_scale_inv`` (arXiv 2412.19437, section 3.3.2; despite its
name numbers are multiplied by it); without ``weight_block_size`` there is one ``weight_scale`` for a matrix. A module that has
no scales was left as it was, and is loaded so. What activations were scaled by when the checkpoint was made is not needed:
few rows are multiplied as they are, many are scaled by their own values.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastqwen.errors import BadCheckpoint
from fastqwen.kernels import Ops, ScaledWeight
from fastqwen.layers.linear import Linear, ScaledLinear
from fastqwen.model_config import Fields, short
from fastqwen.quant import ExpertsSpec, LinearSpec, tell_unknown
from fastqwen.quant.dense import of_modules, one_by_one, stacked, stays_packed
from fastqwen.sharding import Part, Ranges

if TYPE_CHECKING:
    from torch import Tensor

    from fastqwen.layers.moe import Experts
    from fastqwen.weights.source import Weights

log = logging.getLogger(__name__)

SCALE_BYTES = 4
BLOCK_SCALES, SCALES = "weight_scale_inv", "weight_scale"


@dataclass(frozen=True)
class Scheme:
    """Which numbers have a scale in common: outputs and inputs of a block, None for all that there are."""

    height: int | None
    width: int | None
    scales: str  # what they are called, behind the module's name

    def block(self, in_size: int, out_size: int) -> tuple[int, int]:
        return self.height or out_size, self.width or in_size


class Fp8:
    preferred_dtype = None

    def __init__(self, scheme: Scheme, notices: tuple[str, ...] = ()) -> None:
        self.scheme = scheme
        self.notices = notices
        self._told = False

    def held_bytes(self, in_size: int, out_size: int, *, element: int, is_expert: bool) -> int:
        if is_expert:
            return in_size * out_size * element  # unpacked while loading
        height, width = self.scheme.block(in_size, out_size)
        return in_size * out_size + SCALE_BYTES * math.ceil(out_size / height) * math.ceil(in_size / width)

    def linear(self, weights: Weights, spec: LinearSpec, ops: Ops) -> Linear:
        def make(index: int, name: str, bias: Tensor | None) -> Linear | None:
            if not self._is_scaled(weights, name):
                return None
            ranges = None if spec.outputs is None else spec.outputs[index], spec.inputs
            shape = spec.out_sizes[index], spec.in_size
            return ScaledLinear(ops, self._weight(weights, name, shape, ranges, bias))

        return of_modules(weights, spec, ops, spec.bias and spec.adds_bias, make)

    def experts(self, weights: Weights, spec: ExpertsSpec, ops: Ops) -> Experts:
        is_packed = weights.has(f"{spec.down.format(expert=0)}.{self.scheme.scales}")
        if is_packed and stays_packed(weights, spec, ops):
            router = self._plain(weights, spec.router, (spec.num_experts, spec.hidden_size), None)
            return one_by_one(weights, spec, ops, self.linear, router)
        if is_packed and not self._told:
            self._told = True
            log.warning("the experts' 8-bit weights are unpacked to %s while loading", weights.dtype)
        return stacked(weights, spec, ops, lambda name, shape, part: self._plain(weights, name, shape, part))

    def _is_scaled(self, weights: Weights, name: str) -> bool:
        """Raises BadCheckpoint for numbers of 8 bits without scales."""
        if weights.has(f"{name}.{self.scheme.scales}"):
            return True
        if weights.is_of_bytes(f"{name}.weight"):
            raise weights.fault(f"{name}.weight", f"has 8 bits a number, but there is no {name}.{self.scheme.scales}")
        return False

    def _plain(self, weights: Weights, name: str, shape: tuple[int, int], part: Part | None) -> Tensor:
        """One matrix as plain numbers in the model's type, [out, in] or the part of it."""
        from fastqwen.kernels.reference import unpack_scaled

        if not self._is_scaled(weights, name):
            return weights.tensor(f"{name}.weight", shape, part=part)
        ranges = tuple(part.ranges if part is not None and part.dim == dim else None for dim in (0, 1))
        weight = self._weight(weights, name, shape, (ranges[0], ranges[1]), None)
        return unpack_scaled(weight, 0, weight.out_size).to(weights.dtype)

    def _weight(
        self,
        weights: Weights,
        name: str,
        shape: tuple[int, int],
        ranges: tuple[Ranges | None, Ranges | None],
        bias: Tensor | None,
    ) -> ScaledWeight:
        """``ranges``: which outputs or which inputs this shard holds; None: all."""
        weights.skip(f"{name}.input_scale")
        block = self.scheme.block(shape[1], shape[0])
        blocks = math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])
        scales, part = weights.scales(f"{name}.{self.scheme.scales}", blocks), None
        for dim, own in enumerate(ranges):
            if own is not None:
                part = Part(dim, own)
                scales, size = _scales_of(scales, part, block[dim], whole=block[dim] >= shape[dim])
                block = (size, block[1]) if dim == 0 else (block[0], size)
        return ScaledWeight(weights.eighths(f"{name}.weight", shape, part=part), scales, block, bias)


def _scales_of(scales: Tensor, part: Part, size: int, *, whole: bool) -> tuple[Tensor, int]:
    """A shard's scales and the size of its blocks, where those of the file are ``size`` wide. ``whole``: there is one."""
    from fastqwen.weights.source import cut  # torch, which the planner does without

    if whole:
        return scales, part.size
    common = math.gcd(size, *(edge for pair in part.ranges for edge in pair))
    ranges = tuple((start // common, stop // common) for start, stop in part.ranges)
    return cut(scales.repeat_interleave(size // common, part.dim), Part(part.dim, ranges)), common


# Keys of how activations were scaled, and of which modules stayed as they were, which the tensors show.
SILENT = frozenset((
    "quant_method", "fmt", "activation_scheme", "modules_to_not_convert", "ignored_layers", "dequantize", "scale_fmt",
    "weight_per_tensor", "act_per_tensor", "kv_cache_scheme",
))  # fmt: skip


def from_config(config: dict[str, Any], source: str) -> Fp8:
    """Raises Unsupported for a variant whose numbers would come out wrong, BadCheckpoint for a value that cannot be."""
    fields = Fields(config, f"{source}: quantization_config")
    fields.require("fmt", ("e4m3", "float8_e4m3fn"))
    fields.require("scale_fmt", ("float", "float32", "ue8m0"))  # powers of two, held as numbers all the same
    block = fields.get("weight_block_size")
    scheme = Scheme(None, None, SCALES)
    if block is not None:
        if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
            raise BadCheckpoint(f"{fields.source}: weight_block_size is {short(block)}, expected two whole numbers")
        scheme = Scheme(block[0], block[1], BLOCK_SCALES)
    tell_unknown(fields, SILENT)
    return Fp8(scheme, tuple(fields.notices))
