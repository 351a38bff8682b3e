"""Matrix products of up to 64 rows, bound by reading the weights once, with SiLU or the residual fused behind them.

For a single row the norm in front is fused as well; with more rows every program would repeat it.
For larger products cuBLAS is used; there the arithmetic, not the launch or the first byte, sets the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import DenseWeight, Norm
from fastqwen.kernels.limits import FUSED_ROWS
from fastqwen.kernels.triton.launch import Card, card_of, overlapping, prefetch, stages_that_fit, supports_overlap
from fastqwen.kernels.triton.workspace import Workspace

RING_BYTES = 200 * 1024  # of a program's shared memory for what is on its way


@triton.jit
def _gemv(
    x_ptr,  # [K]
    w_ptr,  # [n, K], or [2 * n, K] if GATED
    norm_ptr,  # [K]
    bias_ptr,
    out_ptr,  # [n]
    n_size,
    eps,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: products on the ordinary cores. A program holds whole rows of weights in registers, so that all its
    loads are in flight at once; they do not wait for the kernel before, whose result is only needed afterwards."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    live = n < n_size
    inside = live[:, None] & (k < K)[None, :] if BLOCK_K != K else live[:, None]
    place = n.to(tl.int64)[:, None] * K + k[None, :]
    if PDL:
        gdc_launch_dependents()
    w = tl.load(w_ptr + place, mask=inside, other=0.0)
    if GATED:
        up = tl.load(w_ptr + tl.cast(n_size, tl.int64) * K + place, mask=inside, other=0.0)
    if NORM:
        gain = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
        x *= gain
    y = tl.sum(w.to(tl.float32) * x[None, :], axis=1) * scale
    if BIAS:
        y += tl.load(bias_ptr + n, mask=live, other=0.0).to(tl.float32)
    if GATED:
        up_y = tl.sum(up.to(tl.float32) * x[None, :], axis=1) * scale
        if BIAS:
            up_y += tl.load(bias_ptr + n_size + n, mask=live, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up_y
    if ADD:
        y += tl.load(out_ptr + n, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["m_size"])
def _skinny(
    x_ptr,  # [m, k]
    w_ptr,  # [n, k], or [2 * n, k] if GATED
    bias_ptr,
    out_ptr,  # [m, n]
    partial_ptr,  # float32 [SPLIT_K, n blocks, BLOCK_N, BLOCK_M]
    counter_ptr,  # int32 [n blocks], zero between launches
    m_size,
    k_size,
    n_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,  # cache lines of each row of weights to ask for before the kernel before has ended
):
    """A few rows: weights are the left operand of the tensor cores, so that a tile's height is free of the row count.

    With SPLIT_K the last program to finish a tile adds up the parts, in their order: the result has the same bits
    whoever is last.
    """
    pid_n = tl.program_id(0)
    pid_k = tl.program_id(1)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    live_n, live_m = n < n_size, m < m_size
    w_rows = w_ptr + n.to(tl.int64)[:, None] * k_size
    up_rows = w_rows + tl.cast(n_size, tl.int64) * k_size
    x_rows = x_ptr + m[None, :] * k_size
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            line = pid_k * BLOCK_K + tl.arange(0, PREFETCH) * (128 // w_ptr.dtype.element_ty.primitive_bitwidth * 8)
            near = live_n[:, None] & (line < k_size)[None, :]
            prefetch(tl.where(near, w_rows + line[None, :], w_ptr))
            if GATED:
                prefetch(tl.where(near, up_rows + line[None, :], w_ptr))
        gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(pid_k * BLOCK_K, k_size, BLOCK_K * SPLIT_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            w = tl.load(w_rows + k[None, :], mask=live_n[:, None], other=0.0)
            x = tl.load(x_rows + k[:, None], mask=live_m[None, :], other=0.0)
        else:
            w = tl.load(w_rows + k[None, :], mask=live_n[:, None] & (k < k_size)[None, :], other=0.0)
            x = tl.load(x_rows + k[:, None], mask=live_m[None, :] & (k < k_size)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, input_precision=PRECISION)
        if GATED:
            if EVEN_K:
                up = tl.load(up_rows + k[None, :], mask=live_n[:, None], other=0.0)
            else:
                up = tl.load(up_rows + k[None, :], mask=live_n[:, None] & (k < k_size)[None, :], other=0.0)
            acc_up = tl.dot(up, x, acc_up, input_precision=PRECISION)
    last = True
    if SPLIT_K > 1:
        tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        blocks = tl.num_programs(0)
        tl.store(partial_ptr + (pid_k * blocks + pid_n) * BLOCK_N * BLOCK_M + tile, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + pid_n, 1, sem="acq_rel")
        last = arrived == SPLIT_K - 1
        if last:
            tl.debug_barrier()
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for part in tl.static_range(SPLIT_K):  # unrolled: all parts are on their way at once
                acc += tl.load(partial_ptr + (part * blocks + pid_n) * BLOCK_N * BLOCK_M + tile, cache_modifier=".cg")
            tl.store(counter_ptr + pid_n, 0)
    if last:
        if BIAS:
            acc += tl.load(bias_ptr + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
            if GATED:
                acc_up += tl.load(bias_ptr + n_size + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
        if GATED:
            acc = acc / (1.0 + tl.exp(-acc)) * acc_up
        place = out_ptr + m.to(tl.int64)[None, :] * n_size + n[:, None]
        live = live_n[:, None] & live_m[None, :]
        if ADD:
            acc += tl.load(place, mask=live, other=0.0).to(tl.float32)
        tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class Tiling:
    block_n: int
    num_warps: int
    block_k: int = 0  # of the tensor-core kernel only
    split_k: int = 1
    num_stages: int = 1
    prefetch: int = 0  # lines of 128 bytes for each row of weights


def gemv_tiling(n_size: int, k_size: int, *, gated: bool) -> Tiling:
    """Programs enough for all multiprocessors, and at most 64 weights in each thread's registers."""
    block_k = triton.next_power_of_2(k_size)
    block_n = 2 if gated or block_k > 8192 else 4
    weights = block_n * block_k * (2 if gated else 1)
    return Tiling(block_n, num_warps=min(8, max(2, weights // 2048)))


def skinny_tiling(m_size: int, n_size: int, k_size: int, *, gated: bool, element_bytes: int, card: Card) -> Tiling:
    """What was fastest on an H200 (bench/results/h200-linear-tilings.json), by the shape of the matrix; on other cards as
    much of it as fits."""
    large = n_size >= 4096 and k_size >= 4096
    if gated:
        block_n, block_k, stages = (32, 256, 3) if not large else (64, 64, 3) if m_size <= 16 else (32, 128, 3)
    else:
        block_n, block_k, stages = (64, 128, 5) if large else (32, 256, 5)
    while k_size % block_k and block_k > 64:
        block_k //= 2
    split_k = 1
    programs = card.multiprocessors * 8 // 11  # nearly one for each
    while not gated and -(-n_size // block_n) * split_k < programs and k_size // (split_k * 2) >= 2 * block_k:
        split_k *= 2
    stage_bytes = (block_n * (2 if gated else 1) + max(16, triton.next_power_of_2(m_size))) * block_k * element_bytes
    stages = stages_that_fit(max(1, min(stages, RING_BYTES // stage_bytes)), stage_bytes, card)
    return Tiling(block_n, 4, block_k, split_k, stages, prefetch=8)


def sizes_and_output(x: Tensor, weight: Tensor, *, gated: bool, add_to: Tensor | None) -> tuple[int, int, int, Tensor]:
    """m, n, k and where the product [m, n] goes: onto the residual, if there is one."""
    (m_size, k_size), n_size = x.shape, weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((m_size, n_size), dtype=x.dtype, device=x.device) if add_to is None else add_to
    assert x.is_contiguous() and weight.is_contiguous() and out.is_contiguous() and m_size <= FUSED_ROWS
    return m_size, n_size, k_size, out


def gemv(
    x: Tensor,
    weight: DenseWeight,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    add_to: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """x [1, k], weight [n, k] ([2n, k] if gated) -> [1, n]; norm in front, SiLU or the residual behind."""
    m_size, n_size, k_size, out = sizes_and_output(x, weight.weight, gated=gated, add_to=add_to)
    assert m_size == 1
    t = tiling or gemv_tiling(n_size, k_size, gated=gated)
    pdl, bias = supports_overlap(x.device), weight.bias
    gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    _gemv[(triton.cdiv(n_size, t.block_n),)](
        x, weight.weight, gain, bias, out, n_size, eps,
        K=k_size, BLOCK_N=t.block_n, BLOCK_K=triton.next_power_of_2(k_size), NORM=norm is not None, GATED=gated,
        ADD=add_to is not None, BIAS=bias is not None, PDL=pdl, num_warps=t.num_warps, num_stages=1, **overlapping(pdl),
    )  # fmt: skip
    return out


def skinny_linear(
    x: Tensor,
    weight: DenseWeight,
    workspace: Workspace,
    *,
    gated: bool = False,
    add_to: Tensor | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """x [m <= 64, k], weight [n, k] ([2n, k] if gated) -> [m, n], with SiLU or the residual behind."""
    m_size, n_size, k_size, out = sizes_and_output(x, weight.weight, gated=gated, add_to=add_to)
    pdl, bias = workspace.overlap, weight.bias
    t = tiling or skinny_tiling(
        m_size, n_size, k_size, gated=gated, element_bytes=x.element_size(), card=card_of(x.device)
    )
    block_m = max(16, triton.next_power_of_2(m_size))
    blocks = triton.cdiv(n_size, t.block_n)
    assert t.split_k == 1 or t.split_k * blocks * t.block_n * block_m <= workspace.partial.numel()
    _skinny[(blocks, t.split_k)](
        x, weight.weight, bias, out, workspace.partial, workspace.counter, m_size, k_size, n_size,
        BLOCK_M=block_m, BLOCK_N=t.block_n, BLOCK_K=t.block_k, SPLIT_K=t.split_k, EVEN_K=k_size % t.block_k == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", PREFETCH=t.prefetch, GATED=gated,
        ADD=add_to is not None, BIAS=bias is not None, PDL=pdl,
        num_warps=t.num_warps, num_stages=t.num_stages, **overlapping(pdl),
    )  # fmt: skip
    return out
