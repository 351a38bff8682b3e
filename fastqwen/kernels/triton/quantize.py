"""Activations as 8-bit floating-point numbers with a scale for each part of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels.triton.launch import overlapping, supports_overlap

LARGEST = tl.constexpr(448.0)  # of e4m3, arXiv 2209.05433
SMALLEST = tl.constexpr(1e-12)  # scale, of a part that is all zeros
PROGRAM_NUMBERS = 4096


@triton.jit
def _quantize(x_ptr, numbers_ptr, scales_ptr, rows, size, stride, width, PARTS: tl.constexpr, WIDTH: tl.constexpr,
              PDL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * PARTS + tl.arange(0, PARTS)
    inside = tl.arange(0, WIDTH)
    at = part[:, None] * width + inside[None, :]
    live = (inside < width)[None, :] & (at < size)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * size + at, mask=live & (row < rows), other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=1) / LARGEST, SMALLEST)
    tl.store(numbers_ptr + row * size + at, (x / scale[:, None]).to(numbers_ptr.dtype.element_ty), mask=live)
    tl.store(scales_ptr + part.to(tl.int64) * stride + row, scale, mask=part * width < size)


def quantize(x: Tensor, width: int, *, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """x [rows, size] -> float8_e4m3fn [n, size] and float32 scales [size / width, n], where n is the next ``multiple`` of rows.

    x is number * scale of its ``width`` neighbours; rows that x does not have are zeros.
    """
    x = x.contiguous()
    rows, size = x.shape
    all_rows, num_parts = -(-rows // multiple) * multiple, -(-size // width)
    numbers = torch.empty((all_rows, size), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((num_parts, all_rows), dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    parts = max(1, min(PROGRAM_NUMBERS // block, triton.next_power_of_2(num_parts)))
    pdl = supports_overlap(x.device)
    _quantize[(all_rows, triton.cdiv(num_parts, parts))](
        x, numbers, scales, rows, size, all_rows, width, PARTS=parts, WIDTH=block, PDL=pdl,
        num_warps=min(16, max(1, parts * block // 512)), **overlapping(pdl),
    )  # fmt: skip
    return numbers, scales
