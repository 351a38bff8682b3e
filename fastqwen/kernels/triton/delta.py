"""The gated delta rule for rows of one token: convolution, gates, memory and gated norm of a layer in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqwen.kernels import DeltaParts, DeltaState, StepTokens
from fastqwen.kernels.triton.workspace import Workspace

LENGTH_EPS = tl.constexpr(1e-6)
VALUE_BLOCK = 32  # columns of a memory in one program's registers: with all of them one program fills a multiprocessor


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def log_fade(a, decay, bias):
    """The logarithm of what a token leaves of a memory; softplus is the number itself where it is large."""
    x = a + bias
    return decay * tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def _mixed(own, ring, conv_ptr, channel, here, position, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """One token's channels after convolution and SiLU, float32: its own inputs, and those before it from the ring."""
    total = own * tl.load(conv_ptr + channel * TAPS + TAPS - 1, mask=here, other=0.0).to(tl.float32)
    for back in tl.static_range(1, TAPS):
        line = (position + TAPS - back) % TAPS
        x = tl.load(ring + line * CHANNELS + channel, mask=here & (position >= back), other=0.0).to(tl.float32)
        total += x * tl.load(conv_ptr + channel * TAPS + TAPS - 1 - back, mask=here, other=0.0).to(tl.float32)
    return silu(total)


@triton.jit
def _step(
    projected_ptr,  # [rows, width]
    conv_ptr,  # [CHANNELS, TAPS]
    decay_ptr,  # float32 [HEADS]
    bias_ptr,  # float32 [HEADS]
    norm_ptr,  # float32 [DV]
    slots_ptr,  # int32 [rows]
    positions_ptr,  # int32 [rows]
    held_ptr,  # int32 [rows]
    count_ptr,  # int32 [1], if COUNTED: how many of the rows there are
    memory_ptr,  # float32 [slots, HEADS, DK, DV]
    inputs_ptr,  # [slots, TAPS, CHANNELS]
    out_ptr,  # [rows, HEADS * DV]
    partial_ptr,  # float32 [rows, HEADS, DV]
    counter_ptr,  # int32 [rows, HEADS], zero before and after
    width,
    eps,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_2: tl.constexpr,  # the next powers of two
    DV_2: tl.constexpr,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Some columns of one value head's memory of a row, in registers. The program of a head that ends last norms all of it.

    Programs of one key head read the same lines of the ring, and one of them writes the token's: another line, so that
    none waits for another. A token that is computed once more finds itself in the memory already, and fades nothing.
    """
    head = tl.program_id(0)
    block = tl.program_id(1)
    row = tl.program_id(2)
    if COUNTED:  # noqa: SIM102 (the second condition needs the pointer that the first one promises)
        if row >= tl.load(count_ptr):
            return
    KEYS: tl.constexpr = HEADS // GROUP * DK
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * DV
    position, held = tl.load(positions_ptr + row), tl.load(held_ptr + row)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    i, j = tl.arange(0, DK_2), block * BLOCK + tl.arange(0, BLOCK)
    here_k, here_v = i < DK, j < DV
    place = memory_ptr + ((slot * HEADS + head) * DK + i)[:, None] * DV + j[None, :]
    inside = here_k[:, None] & here_v[None, :]
    memory = tl.load(place, mask=inside & (held > 0), other=0.0)  # first: the rest is computed while it comes
    x = projected_ptr + row.to(tl.int64) * width
    ring = inputs_ptr + slot * TAPS * CHANNELS
    at_q = head // GROUP * DK + i
    at_k, at_v = KEYS + at_q, 2 * KEYS + head * DV + j
    own_q = tl.load(x + at_q, mask=here_k, other=0.0)
    own_k = tl.load(x + at_k, mask=here_k, other=0.0)
    own_v = tl.load(x + at_v, mask=here_v, other=0.0)
    q = _mixed(own_q.to(tl.float32), ring, conv_ptr, at_q, here_k, position, CHANNELS, TAPS)
    k = _mixed(own_k.to(tl.float32), ring, conv_ptr, at_k, here_k, position, CHANNELS, TAPS)
    v = _mixed(own_v.to(tl.float32), ring, conv_ptr, at_v, here_v, position, CHANNELS, TAPS)
    q = q * tl.rsqrt(tl.sum(q * q, axis=0) + LENGTH_EPS) * scale
    k = k * tl.rsqrt(tl.sum(k * k, axis=0) + LENGTH_EPS)
    gates = x + CHANNELS + HEADS * DV + head
    beta = tl.sigmoid(tl.load(gates).to(tl.float32))
    a = tl.load(gates + HEADS).to(tl.float32)
    fade = tl.exp(log_fade(a, tl.load(decay_ptr + head), tl.load(bias_ptr + head)))
    again = position < held
    beta = tl.where(again, 0.0, beta)
    fade = tl.where(again, 1.0, fade)

    memory = memory * fade
    new = beta * (v - tl.sum(k[:, None] * memory, axis=0))
    memory += k[:, None] * new[None, :]
    tl.store(place, memory, mask=inside)
    out = tl.sum(q[:, None] * memory, axis=0)

    line = ring + position % TAPS * CHANNELS
    tl.store(line + at_v, own_v, mask=here_v)
    first = (head % GROUP == 0) & (block == 0)
    tl.store(line + at_q, own_q, mask=here_k & first)
    tl.store(line + at_k, own_k, mask=here_k & first)

    own = row.to(tl.int64) * HEADS + head
    z_ptr = x + CHANNELS + head * DV
    if BLOCK >= DV:
        _norm_head(out, z_ptr, norm_ptr, out_ptr + own * DV, j, eps, DV)
    else:
        tl.store(partial_ptr + own * DV + j, out, mask=here_v)
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + own, 1, sem="acq_rel") == tl.num_programs(1) - 1:
            tl.debug_barrier()
            every = tl.arange(0, DV_2)
            whole = tl.load(partial_ptr + own * DV + every, mask=every < DV, other=0.0, cache_modifier=".cg")
            _norm_head(whole, z_ptr, norm_ptr, out_ptr + own * DV, every, eps, DV)
            tl.store(counter_ptr + own, 0)


@triton.jit
def _norm_head(x, z_ptr, norm_ptr, out_ptr, j, eps, DV: tl.constexpr):
    """RMSNorm of one head's numbers, gated by z."""
    here = j < DV
    z = tl.load(z_ptr + j, mask=here, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / DV + eps)
    x = x * tl.load(norm_ptr + j, mask=here, other=0.0) * silu(z)
    tl.store(out_ptr + j, x.to(out_ptr.dtype.element_ty), mask=here)


def delta_step(
    projected: Tensor, step: StepTokens, state: DeltaState, parts: DeltaParts, workspace: Workspace, *, out: Tensor
) -> None:
    """The step's leading rows: projected [rows, width] -> out [at least rows, value_size]"""
    shape, rows = parts.shape, projected.shape[0]
    heads = shape.num_value_heads
    keys, values = triton.next_power_of_2(shape.key_dim), triton.next_power_of_2(shape.value_dim)
    assert projected.stride(1) == 1 and step.held is not None
    room = rows * heads <= workspace.counter.numel() and rows * shape.value_size <= workspace.partial.numel()
    block = min(values, VALUE_BLOCK) if room else values
    _step[(heads, triton.cdiv(shape.value_dim, block), rows)](
        projected, parts.conv, parts.decay, parts.decay_bias, parts.norm.weight, step.slots, step.positions, step.held,
        step.decode_count, state.memory, state.inputs, out, workspace.partial, workspace.counter, projected.stride(0),
        parts.norm.eps, shape.key_dim**-0.5, HEADS=heads, GROUP=shape.group, DK=shape.key_dim, DV=shape.value_dim,
        DK_2=keys, DV_2=values, BLOCK=block, TAPS=shape.taps, COUNTED=step.decode_count is not None,
        num_warps=8 if keys * block > 8192 else 4,
    )  # fmt: skip


@triton.jit
def _multiply_by_sigmoid(x_ptr, gate_ptr, size, gate_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = at < size
    x = tl.load(x_ptr + row * size + at, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=here, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * size + at, (x * tl.sigmoid(gate)).to(x_ptr.dtype.element_ty), mask=here)


def multiply_by_sigmoid(x: Tensor, gate: Tensor) -> None:
    """x [rows, size] *= sigmoid(gate), in place"""
    assert x.is_contiguous() and gate.stride(1) == 1
    rows, size = x.shape
    block = min(1024, triton.next_power_of_2(size))
    _multiply_by_sigmoid[(rows, triton.cdiv(size, block))](x, gate, size, gate.stride(0), BLOCK=block, num_warps=4)


def scratch(tokens: int, *sizes: int, like: Tensor) -> list[Tensor]:
    """[tokens, size] each, in the type of ``like``"""
    return [torch.empty((tokens, size), dtype=like.dtype, device=like.device) for size in sizes]
