"""Plain checkpoints that are quantized while they are loaded: ``--quantization fp8``, ``int8`` or ``int4``.

Each number is rounded to the nearest there is, without data to calibrate by. fp8: e4m3 with a scale for each output. int8:
groups of 128 inputs, symmetric. int4: groups of 64 inputs with a zero each. Embeddings, head, norms and routers stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fastqwen.errors import Unsupported
from fastqwen.kernels import GroupedWeight, Ops, ScaledWeight
from fastqwen.layers.linear import GroupedLinear, Linear, ScaledLinear
from fastqwen.model_config import short
from fastqwen.quant import ONLINE_FORMATS, ExpertsSpec, LinearSpec
from fastqwen.quant.dense import of_modules, read_matrix
from fastqwen.quant.fp8 import SCALE_BYTES as FLOAT_BYTES
from fastqwen.quant.gptq import SCALE_BYTES, ZERO_BYTES

if TYPE_CHECKING:
    from torch import Tensor

    from fastqwen.layers.moe import Experts
    from fastqwen.weights.source import Weights

Format = Literal["fp8", "int8", "int4"]
GROUPS = {"int8": (8, 128), "int4": (4, 64)}  # bits, inputs of a group
LARGEST = 448.0  # of e4m3, arXiv 2209.05433
SMALLEST = 2.0**-24  # scale: the least above zero in float16


class Online:
    preferred_dtype = None
    notices: tuple[str, ...] = ()

    def __init__(self, form: Format) -> None:
        self.form: Format = form

    def held_bytes(self, in_size: int, out_size: int, *, element: int, is_expert: bool) -> int:
        if self.form == "fp8":
            return in_size * out_size + FLOAT_BYTES * out_size
        bits, group = GROUPS[self.form]
        if in_size % (32 // bits):
            return in_size * out_size * element
        return in_size * out_size * bits // 8 + -(-in_size // group) * out_size * (SCALE_BYTES + ZERO_BYTES)

    def linear(self, weights: Weights, spec: LinearSpec, ops: Ops) -> Linear:
        def make(index: int, name: str, bias: Tensor | None) -> Linear | None:
            matrix = read_matrix(weights, spec, index, name)
            if self.form == "fp8":
                return ScaledLinear(ops, as_fp8(matrix, bias))
            bits, group = GROUPS[self.form]
            if matrix.shape[1] % (32 // bits):
                return None  # words of such codes would not be whole
            return GroupedLinear(ops, as_grouped(matrix, bits, group, bias))

        return of_modules(weights, spec, ops, spec.bias and spec.adds_bias, make)

    def experts(self, weights: Weights, spec: ExpertsSpec, ops: Ops) -> Experts:
        raise Unsupported(
            f"--quantization {self.form}: this model has experts, which are not quantized while they are loaded; take a "
            "checkpoint that is quantized already, or leave the flag out"
        )


def as_fp8(matrix: Tensor, bias: Tensor | None = None) -> ScaledWeight:
    """matrix [out, in]"""
    import torch  # which the planner does without

    scales = (matrix.float().abs().amax(1, keepdim=True) / LARGEST).clamp(min=SMALLEST)
    return ScaledWeight((matrix.float() / scales).to(torch.float8_e4m3fn), scales, (1, matrix.shape[1]), bias)


def as_grouped(matrix: Tensor, bits: int, group: int, bias: Tensor | None = None) -> GroupedWeight:
    """matrix [out, in]: of 8 bits symmetric, of 4 bits with zeros."""
    import torch

    from fastqwen.weights.words import pack

    out_size, in_size = matrix.shape
    missing = -in_size % group
    parts = torch.nn.functional.pad(matrix.float(), (0, missing)).view(out_size, -1, group)
    top = 2**bits - 1
    if bits == 8:
        middle = (top + 1) // 2
        scales = (parts.abs().amax(-1) / (middle - 1)).clamp(min=SMALLEST).half()
        zeros = torch.full_like(scales, middle)
    else:
        low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        scales = ((high - low) / top).clamp(min=SMALLEST).half()
        zeros = (-low / scales.float()).round().clamp(0, top)
    codes = (parts / scales.float()[..., None]).round_().add_(zeros.float()[..., None]).clamp_(0, top)
    plain = codes.to(torch.uint8).view(out_size, -1)[:, :in_size]
    return GroupedWeight(
        codes=pack(plain.t(), bits),
        scales=scales.t().contiguous(),
        zeros=zeros.t().to(torch.int16).contiguous(),
        group_of=None,
        bits=bits,
        group_size=group,
        bias=bias,
    )


def from_config(config: dict[str, Any], source: str) -> Online:
    """Raises Unsupported: what a user may wish is checked by ``quant.wished``."""
    form = config.get("format")
    for known in ONLINE_FORMATS:
        if form == known:
            return Online(known)
    raise Unsupported(f"{source}: format {short(form)} is not supported; supported: {', '.join(ONLINE_FORMATS)}")
