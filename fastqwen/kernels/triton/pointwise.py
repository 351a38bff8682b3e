"""Row and element kernels for larger batches: norms, SiLU, rotation with the write to the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import AttentionParts, LayerCache, Norm, StepTokens
from fastqwen.kernels.triton.cache_numbers import bits_of, spread, store_head
from fastqwen.kernels.triton.launch import overlapping, supports_overlap


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, size, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * size + at, mask=at < size, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    weight = tl.load(weight_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * size + at, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=at < size)


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """x [..., size] -> the same shape"""
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    pdl = supports_overlap(x.device)
    warps = min(16, max(1, block // 512))
    _rms_norm[(x.numel() // size,)](
        x, norm.weight, out, size, norm.eps, BLOCK=block, PDL=pdl, num_warps=warps, **overlapping(pdl)
    )
    return out


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + row * 2 * size + at, mask=at < size, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * size + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out_ptr.dtype.element_ty), mask=at < size
    )


def silu_mul(gate_up: Tensor) -> Tensor:
    """[rows, 2 * size] -> [rows, size]"""
    rows, double = gate_up.shape
    out = torch.empty((rows, double // 2), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(rows, triton.cdiv(double // 2, 2048))](gate_up, out, double // 2, BLOCK=2048, num_warps=8)
    return out


@triton.jit
def turn_of(cos_sin_ptr, HALF: tl.constexpr, ROTARY: tl.constexpr):
    """A token's cosines and sines, float32 [1, HALF]; beyond the numbers that are rotated, those of an angle of zero."""
    at = tl.arange(0, HALF)
    if ROTARY == 2 * HALF:
        cos, sin = tl.load(cos_sin_ptr + at), tl.load(cos_sin_ptr + HALF + at)
    else:
        tl.static_assert(ROTARY <= HALF, "of a head, half or less is rotated, or all of it")
        angle = at % (ROTARY // 2)
        cos = tl.load(cos_sin_ptr + angle, mask=at < ROTARY, other=1.0)
        sin = tl.load(cos_sin_ptr + ROTARY // 2 + angle, mask=at < ROTARY, other=0.0)
        sin = tl.where(at < ROTARY // 2, sin, -sin)
    return cos[None, :], sin[None, :]


@triton.jit
def normed_and_rotated(x_ptr, place, live, norm_ptr, cos, sin, eps, HALF: tl.constexpr, ROTARY: tl.constexpr,
                       NORM: tl.constexpr):  # fmt: skip
    """Heads at x_ptr + place [heads, HALF], which are their first halves: RMSNorm over whole heads, then the rotation.

    Both halves, float32 [heads, HALF]. All of a head is rotated, the first half with the second; or some of its first
    half, each number with one of the same half, which is loaded again.
    """
    at = tl.arange(0, HALF)
    low = tl.load(x_ptr + place, mask=live, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + place + HALF, mask=live, other=0.0).to(tl.float32)
    if NORM:
        mean = (tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1)) / (2 * HALF)
        scale = tl.rsqrt(mean + eps)[:, None]
        low = low * scale * tl.load(norm_ptr + at).to(tl.float32)[None, :]
        high = high * scale * tl.load(norm_ptr + HALF + at).to(tl.float32)[None, :]
    if ROTARY == 2 * HALF:
        turned, rest = low * cos - high * sin, high * cos + low * sin
    else:
        other = tl.where(at < ROTARY, (at + ROTARY // 2) % ROTARY, at)
        mate = tl.load(x_ptr + place + (other - at)[None, :], mask=live, other=0.0).to(tl.float32)
        if NORM:
            mate = mate * scale * tl.load(norm_ptr + other).to(tl.float32)[None, :]
        turned, rest = low * cos - mate * sin, high
    return turned, rest


@triton.jit(do_not_specialize=["first_token"])
def _rope_and_cache(
    qkv_ptr,  # [tokens, WIDTH]
    cos_sin_ptr,  # float32 [tokens, ROTARY]
    q_scale_ptr,  # float32 [tokens]
    positions_ptr,  # int32 [tokens]
    slots_ptr,  # int32 [tokens]
    tables_ptr,  # int32 [slots, table_width]
    count_ptr,  # int32 [1], if COUNTED: leading tokens to leave out
    q_norm_ptr,
    k_norm_ptr,
    k_cache_ptr,  # [blocks, KV_HEADS, BLOCK_SIZE, 2 * HALF]
    v_cache_ptr,
    k_scale_ptr,  # float16 [blocks, KV_HEADS, BLOCK_SIZE], if SCALED
    v_scale_ptr,
    q_out_ptr,  # [tokens, HEADS, 2 * HALF]
    k_out_ptr,  # [tokens, KV_HEADS, 2 * HALF], or None
    v_out_ptr,  # the same
    table_width,
    first_token,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDTH: tl.constexpr,  # from one token's numbers to the next one's
    BLOCK_SIZE: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_KV: tl.constexpr,
    NORM: tl.constexpr,
    LOGN: tl.constexpr,
    COUNTED: tl.constexpr,
    SCALED: tl.constexpr,
    KEEP: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) + first_token
    if COUNTED:  # noqa: SIM102 (the second condition needs the pointer that the first one promises)
        if token < tl.load(count_ptr):
            return
    at = tl.arange(0, HALF)
    cos, sin = turn_of(cos_sin_ptr + token * ROTARY, HALF, ROTARY)
    row = qkv_ptr + token * WIDTH

    heads = tl.arange(0, PADDED_HEADS)
    live = (heads < HEADS)[:, None]
    place = heads[:, None] * 2 * HALF + at[None, :]
    low, high = normed_and_rotated(row, place, live, q_norm_ptr, cos, sin, eps, HALF, ROTARY, NORM)
    if LOGN:
        scale = tl.load(q_scale_ptr + token)
        low *= scale
        high *= scale
    if SCALED:
        low, high = spread(low, high, HALF)
    q_out = q_out_ptr + token * HEADS * 2 * HALF
    tl.store(q_out + place, low.to(q_out_ptr.dtype.element_ty), mask=live)
    tl.store(q_out + place + HALF, high.to(q_out_ptr.dtype.element_ty), mask=live)

    kv_heads = tl.arange(0, PADDED_KV)
    live = (kv_heads < KV_HEADS)[:, None]
    place = kv_heads[:, None] * 2 * HALF + at[None, :]
    keys = row + HEADS * 2 * HALF
    low, high = normed_and_rotated(keys, place, live, k_norm_ptr, cos, sin, eps, HALF, ROTARY, NORM)
    if SCALED:
        low, high = spread(low, high, HALF)
    values = keys + KV_HEADS * 2 * HALF
    position = tl.load(positions_ptr + token)
    table = tables_ptr + tl.load(slots_ptr + token).to(tl.int64) * table_width
    block, offset = tl.load(table + position // BLOCK_SIZE).to(tl.int64), position % BLOCK_SIZE
    lines = (block * KV_HEADS + kv_heads) * BLOCK_SIZE + offset
    low, high = store_head(k_cache_ptr, k_scale_ptr, lines, low, high, live, HALF, SCALED)
    v_low = tl.load(values + place, mask=live, other=0.0).to(tl.float32)
    v_high = tl.load(values + place + HALF, mask=live, other=0.0).to(tl.float32)
    v_low, v_high = store_head(v_cache_ptr, v_scale_ptr, lines, v_low, v_high, live, HALF, SCALED)
    if KEEP:  # as they are in the cache, so that a prompt is computed alike in one piece and in several
        spot = token * KV_HEADS * 2 * HALF + place
        tl.store(k_out_ptr + spot, low.to(k_out_ptr.dtype.element_ty), mask=live)
        tl.store(k_out_ptr + spot + HALF, high.to(k_out_ptr.dtype.element_ty), mask=live)
        tl.store(v_out_ptr + spot, v_low.to(v_out_ptr.dtype.element_ty), mask=live)
        tl.store(v_out_ptr + spot + HALF, v_high.to(v_out_ptr.dtype.element_ty), mask=live)


def rope_and_cache(
    qkv: Tensor,
    step: StepTokens,
    cache: LayerCache,
    parts: AttentionParts,
    *,
    first_token: int = 0,
    room: int = 0,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """For tokens from ``first_token`` on, and in a recorded step for those behind its decode rows.

    Returns q [tokens, heads, head_dim], undefined for other tokens; with ``keep`` rotated k and v [tokens, kv_heads,
    head_dim] as well. All have at least ``room`` rows; k and v are zero behind the tokens.
    """
    tokens, shape = qkv.shape[0], parts.shape
    rows = max(tokens, room)
    q = torch.empty((rows, shape.num_heads, shape.head_dim), dtype=qkv.dtype, device=qkv.device)
    k = v = None
    if keep:
        k, v = (
            torch.empty((rows, shape.num_kv_heads, shape.head_dim), dtype=qkv.dtype, device=qkv.device)
            for _ in range(2)
        )
        k[tokens:] = 0
        v[tokens:] = 0
    if tokens == first_token:
        return q, k, v
    _rope_and_cache[(tokens - first_token,)](
        qkv, step.cos_sin, step.q_scale, step.positions, step.slots, step.block_tables, step.decode_count,
        parts.q_norm, parts.k_norm, bits_of(cache.k), bits_of(cache.v), cache.k_scale, cache.v_scale, q, k, v,
        step.block_tables.shape[1], first_token, parts.eps,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, HALF=shape.head_dim // 2, ROTARY=shape.rotary_dim,
        WIDTH=qkv.stride(0), BLOCK_SIZE=cache.k.shape[2], PADDED_HEADS=triton.next_power_of_2(shape.num_heads),
        PADDED_KV=triton.next_power_of_2(shape.num_kv_heads), NORM=parts.q_norm is not None,
        LOGN=step.q_scale is not None, COUNTED=step.decode_count is not None,
        SCALED=cache.k_scale is not None, KEEP=keep, num_warps=4,
    )  # fmt: skip
    return q, k, v
