"""Products of many rows with 8-bit numbers on both sides: activations are scaled by their own values, the library multiplies.

Blocks of 128 x 128 go with activations scaled 128 by 128 (arXiv 2412.19437, section 3.3.2), which cuBLAS knows on compute
capability 9.0; one scale for an output goes with one for a row, from 8.9 on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from fastqwen.kernels.cuda.pack import BLOCK, PackedWeight
from fastqwen.kernels.triton.quantize import quantize

BLOCKS_CAPABILITY, ROWS_CAPABILITY = (9, 0), (8, 9)
ROWS_TOGETHER = 4  # cuBLAS wants whole numbers of 16 bytes between the scales of one input block and the next
WHOLE = 16  # inputs and outputs that the library wants to come together


def multiplies(weight: PackedWeight, capability: tuple[int, int]) -> bool:
    """Whether this card's library takes the weight as it is."""
    if weight.format != "Fp8" or weight.order is not None or weight.in_size % WHOLE or weight.out_size % WHOLE:
        return False
    if weight.kind == "ROWS":
        return capability >= ROWS_CAPABILITY
    whole = weight.in_size % BLOCK == 0 and weight.out_size % BLOCK == 0
    return weight.blocks is not None and whole and capability == BLOCKS_CAPABILITY


def eight_bit_product(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [rows, in] -> [rows, out]"""
    matrix = numbers_of(weight).t()
    if weight.row_scales is not None:
        numbers, scales = quantize(x, x.shape[1])
        out = scaled_mm(
            numbers,
            matrix,
            scales.t(),
            ScalingType.RowWise,
            weight.row_scales[None],
            ScalingType.RowWise,
            output_dtype=x.dtype,
        )
    else:
        assert weight.blocks is not None
        numbers, scales = quantize(x, BLOCK, multiple=ROWS_TOGETHER)
        out = scaled_mm(
            numbers, matrix, scales.t(), ScalingType.BlockWise1x128, weight.blocks.t(), ScalingType.BlockWise128x128,
            output_dtype=x.dtype,
        )[: x.shape[0]]  # fmt: skip
    if weight.bias is not None:
        out += weight.bias
    return out


def numbers_of(weight: PackedWeight) -> Tensor:
    """float8_e4m3fn [out, in]"""
    matrix = weight.words.view(torch.float8_e4m3fn).view(weight.tiles * weight.words.shape[1], -1)
    return matrix[: weight.out_size, : weight.in_size]
