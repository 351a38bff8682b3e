"""Keys and values as numbers of 8 bits with a scale for each head: how kernels write and read them.

int8, or e4m3 (arXiv 2209.05433) as its bits, in uint8: arithmetic on the bits is the same on every GPU, and most have no
instructions for e4m3. What ``raised`` gives is the stored number / UNIT, which a 16-bit type has exactly and which is 1 or so
at most; so a scale times UNIT is as large as the largest number of the head, and its product with a chance keeps its bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

UNIT = tl.constexpr(256.0)
LEAST_SCALE = tl.constexpr(1e-6)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 of its size has no fraction
MOST_INT8 = tl.constexpr(127.0)
MOST_E4M3 = tl.constexpr(448.0)


def bits_of(cache: Tensor) -> Tensor:
    """The same numbers, as kernels take them."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


@triton.jit
def scale_of(largest, ptr):
    """The scale, float16, of a head whose largest number in size is ``largest``, for a cache of ``ptr``'s type."""
    most: tl.constexpr = MOST_INT8 if ptr.dtype.element_ty == tl.int8 else MOST_E4M3
    return tl.maximum(largest / most, LEAST_SCALE).to(tl.float16)


@triton.jit
def lowered(x, scale, ptr):
    """x float32 as numbers of ``ptr``'s cache: of x / scale the nearest, of two the even one."""
    x = x / scale.to(tl.float32)
    if ptr.dtype.element_ty == tl.int8:
        return ((tl.minimum(tl.maximum(x, -MOST_INT8), MOST_INT8) + ROUNDING) - ROUNDING).to(tl.int8)
    else:
        # Times 2^(7 - 127) a float32 has e4m3's exponent, and its first three bits behind it: the rest is rounded off.
        small = tl.minimum(tl.maximum(x, -MOST_E4M3), MOST_E4M3) * 7.52316384526264e-37
        bits = small.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        size = (size + 0x7FFFF + ((size >> 20) & 1)) >> 20
        return (((bits >> 31) << 7) | size).to(tl.uint8)


@triton.jit
def raised(stored, dtype: tl.constexpr):
    """Numbers of a cache / UNIT, in ``dtype``: exact."""
    if stored.dtype == tl.int8:
        if dtype == tl.float16:  # 4 + (number + 128) / 256
            bits = ((stored.to(tl.int16) & 0xFF) ^ 0x4480).to(tl.int16)
            return (bits.to(tl.float16, bitcast=True) - 4.5).to(tl.float16)
        else:
            return (stored.to(dtype) * 0.00390625).to(dtype)
    else:
        wide = stored.to(tl.int32)
        sign, size = wide & 0x80, wide & 0x7F
        if dtype == tl.float16:  # its exponent is 8 less
            return ((sign << 8) | (size << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        elif dtype == tl.bfloat16:  # its exponent is 120 less, of which 8 are UNIT
            bits = ((sign << 8) | (size << 4)).to(tl.int16)
            return (bits.to(tl.bfloat16, bitcast=True) * 5.192296858534828e33).to(dtype)
        else:
            return ((sign << 24) | (size << 20)).to(tl.float32, bitcast=True) * 5.192296858534828e33


@triton.jit
def spread(low, high, HALF: tl.constexpr):
    """Heads as sums of all their numbers with signs (reference.py), two halves, float32 [heads, HALF]."""
    low, high = low + high, low - high
    at = tl.arange(0, HALF)[None, :]
    for stage in tl.static_range(8):
        if 1 << stage < HALF:
            mate = tl.broadcast_to(at ^ (1 << stage), low.shape)
            sign = tl.where((at & (1 << stage)) == 0, 1.0, -1.0)
            low = low * sign + tl.gather(low, mate, axis=1)
            high = high * sign + tl.gather(high, mate, axis=1)
    length: tl.constexpr = (2 * HALF) ** -0.5
    return low * length, high * length


@triton.jit
def store_head(cache_ptr, scale_ptr, lines, low, high, live, HALF: tl.constexpr, SCALED: tl.constexpr):
    """Heads to their lines of the cache: two halves, float32 [heads, HALF]. Returned as they are there, in float32."""
    place = lines[:, None] * 2 * HALF + tl.arange(0, HALF)[None, :]
    if SCALED:
        largest = tl.maximum(tl.max(tl.abs(low), axis=1), tl.max(tl.abs(high), axis=1))
        nothing = tl.sum(low * 0.0 + high * 0.0, axis=1)  # NaN where a number is not finite: no 8 bits would say so
        scale = scale_of(largest, cache_ptr) + nothing.to(tl.float16)
        stored_low, stored_high = lowered(low, scale[:, None], cache_ptr), lowered(high, scale[:, None], cache_ptr)
        unit = scale.to(tl.float32)[:, None] * UNIT
        as_low, as_high = raised(stored_low, tl.float32) * unit, raised(stored_high, tl.float32) * unit
        here = (tl.arange(0, HALF)[None, :] == 0) & live  # each scale once
        tl.store(scale_ptr + lines[:, None] + tl.arange(0, HALF)[None, :] * 0, scale[:, None], mask=here)
    else:
        stored_low, stored_high = low.to(cache_ptr.dtype.element_ty), high.to(cache_ptr.dtype.element_ty)
        as_low, as_high = stored_low.to(tl.float32), stored_high.to(tl.float32)
    tl.store(cache_ptr + place, stored_low, mask=live)
    tl.store(cache_ptr + place + HALF, stored_high, mask=live)
    return as_low, as_high
