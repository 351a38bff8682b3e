"""Matrix products of up to 64 rows, bound by reading the weights once: norm before, SiLU or residual behind, fused.

For larger products cuBLAS is used; there the arithmetic, not the launch or the first byte, sets the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64


@triton.jit
def _gemv(
    x_ptr,  # [k]
    w_ptr,  # [n, k], or [2 * n, k] if GATED
    norm_ptr,  # [k]
    bias_ptr,
    out_ptr,  # [n]
    k_size,
    n_size,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """One row: products on the ordinary cores, all of a tile's loads in flight before the first use."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (n < n_size)[:, None]
    w_rows = w_ptr + n.to(tl.int64)[:, None] * k_size
    up_rows = w_rows + n_size.to(tl.int64) * k_size
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    squares = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for start in range(0, k_size, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            inside = rows
            x = tl.load(x_ptr + k).to(tl.float32)
        else:
            inside = rows & (k < k_size)[None, :]
            x = tl.load(x_ptr + k, mask=k < k_size, other=0.0).to(tl.float32)
        w = tl.load(w_rows + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        if GATED:
            up = tl.load(up_rows + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        if NORM:
            squares += x * x
            if EVEN_K:
                x *= tl.load(norm_ptr + k).to(tl.float32)
            else:
                x *= tl.load(norm_ptr + k, mask=k < k_size, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        if GATED:
            acc_up += up.to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / k_size + eps)
        y *= scale
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < n_size, other=0.0).to(tl.float32)
    if GATED:
        up_y = tl.sum(acc_up, axis=1) * scale
        if BIAS:
            up_y += tl.load(bias_ptr + n_size + n, mask=n < n_size, other=0.0).to(tl.float32)
        y = y / (1.0 + tl.exp(-y)) * up_y
    if ADD:
        y += tl.load(out_ptr + n, mask=n < n_size, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < n_size)


@triton.jit
def _skinny(
    x_ptr,  # [m, k]
    w_ptr,  # [n, k], or [2 * n, k] if GATED
    norm_ptr,
    bias_ptr,
    out_ptr,  # [m, n]
    partial_ptr,  # float32 [SPLIT_K, n blocks, BLOCK_N, BLOCK_M]
    counter_ptr,  # int32 [n blocks], zero between launches
    m_size,
    k_size,
    n_size,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
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
    up_rows = w_rows + n_size.to(tl.int64) * k_size
    x_rows = x_ptr + m[None, :] * k_size
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    squares = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for start in range(pid_k * BLOCK_K, k_size, BLOCK_K * SPLIT_K):
        k = start + tl.arange(0, BLOCK_K)
        if EVEN_K:
            w = tl.load(w_rows + k[None, :], mask=live_n[:, None], other=0.0)
            x = tl.load(x_rows + k[:, None], mask=live_m[None, :], other=0.0)
        else:
            w = tl.load(w_rows + k[None, :], mask=live_n[:, None] & (k < k_size)[None, :], other=0.0)
            x = tl.load(x_rows + k[:, None], mask=live_m[None, :] & (k < k_size)[:, None], other=0.0)
        if NORM:
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
            gain = tl.load(norm_ptr + k, mask=k < k_size, other=0.0).to(tl.float32)
            x = (wide * gain[:, None]).to(x_ptr.dtype.element_ty)
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
            for part in range(SPLIT_K):
                acc += tl.load(partial_ptr + (part * blocks + pid_n) * BLOCK_N * BLOCK_M + tile, cache_modifier=".cg")
            tl.store(counter_ptr + pid_n, 0)
    if last:
        if NORM:
            scale = tl.rsqrt(squares / k_size + eps)[None, :]
            acc *= scale
            if GATED:
                acc_up *= scale
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
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


class Workspace:
    """Scratch for split products: parts in float32, and counters that every launch leaves at zero."""

    def __init__(self, device: torch.device, max_parts: int = 4 * 2**20, max_blocks: int = 16384) -> None:
        self.partial = torch.empty(max_parts, dtype=torch.float32, device=device)
        self.counter = torch.zeros(max_blocks, dtype=torch.int32, device=device)


def gemv_tiling(n_size: int, k_size: int, *, gated: bool) -> Tiling:
    """Programs enough for all multiprocessors, and 16 to 32 KiB of weights in flight in each."""
    block_k = min(1024, triton.next_power_of_2(k_size))
    block_n = 16 if n_size >= 65536 else 8 if n_size >= 16384 else 4
    if gated:
        block_n = max(2, block_n // 2)
    return Tiling(block_n, block_k, 1, 4, 1)


def skinny_tiling(m_size: int, n_size: int, k_size: int, *, gated: bool, splittable: bool) -> Tiling:
    block_n = 64 if n_size >= 132 * 64 else 32 if n_size >= 132 * 16 else 16
    block_k = 128 if k_size % 128 == 0 else 64
    programs = -(-n_size // block_n)
    split_k = 1
    if splittable:
        while programs * split_k < 200 and split_k < 8 and k_size // (split_k * 2) >= 2 * block_k:
            split_k *= 2
    return Tiling(block_n, block_k, split_k, 4, 4 if not gated else 3)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    workspace: Workspace,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    bias: Tensor | None = None,
    gated: bool = False,
    add_to: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """x [m <= 64, k], weight [n, k] ([2n, k] if gated) -> [m, n]; the pieces are those of the Ops table's linears."""
    m_size, k_size = x.shape
    n_size = weight.shape[0] // 2 if gated else weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous() and m_size <= MAX_ROWS
    out = add_to if add_to is not None else torch.empty((m_size, n_size), dtype=out_dtype or x.dtype, device=x.device)
    assert out.is_contiguous()
    flags = {"NORM": norm is not None, "GATED": gated, "ADD": add_to is not None, "BIAS": bias is not None}
    if m_size == 1:
        t = tiling or gemv_tiling(n_size, k_size, gated=gated)
        _gemv[(triton.cdiv(n_size, t.block_n),)](
            x, weight, norm, bias, out, k_size, n_size, eps,
            BLOCK_N=t.block_n, BLOCK_K=t.block_k, EVEN_K=k_size % t.block_k == 0, **flags,
            num_warps=t.num_warps, num_stages=t.num_stages,
        )  # fmt: skip
        return out
    t = tiling or skinny_tiling(m_size, n_size, k_size, gated=gated, splittable=norm is None and not gated)
    block_m = max(16, triton.next_power_of_2(m_size))
    blocks = triton.cdiv(n_size, t.block_n)
    assert t.split_k == 1 or t.split_k * blocks * t.block_n * block_m <= workspace.partial.numel()
    _skinny[(blocks, t.split_k)](
        x, weight, norm, bias, out, workspace.partial, workspace.counter, m_size, k_size, n_size, eps,
        BLOCK_M=block_m, BLOCK_N=t.block_n, BLOCK_K=t.block_k, SPLIT_K=t.split_k, EVEN_K=k_size % t.block_k == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32", **flags,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip
    return out
