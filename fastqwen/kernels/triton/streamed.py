"""Matrix products of 2 to 64 rows whose weights are on their way before the kernel in front has ended.

A program first asks for as many of its weights as its shared memory holds, and only then waits for the kernel in front
(programmatic dependent launch): the weights arrive while that kernel still runs. Between two products of a small model
waiting for the first byte is what takes the time, not reading. Triton's own pipelines cannot do this: they start both
operands' loads together, and one of the two must wait. So this kernel is written in Gluon, Triton's lower level, for
Hopper's wgmma instructions; linear.py has the one for other GPUs, shapes and types.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import DenseWeight
from fastqwen.kernels.triton.launch import overlapping
from fastqwen.kernels.triton.linear import sizes_and_output
from fastqwen.kernels.triton.workspace import Workspace

# Names up to Triton 3.6, and since.
barrier = getattr(gl, "thread_barrier", None) or gl.barrier
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _ask_weights(ring, rows, stage, begin, stop, BLOCK_K: gl.constexpr, LAYOUT: gl.constexpr):
    """Start copying one stage's weights, unless it lies behind this program's last."""
    if begin < stop:
        k = begin + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
        async_load(ring.index(stage), rows + k[None, :])


@gluon.jit
def _ask_inputs(ring, rows, live, stage, begin, stop, BLOCK_K: gl.constexpr, LAYOUT: gl.constexpr):
    if begin < stop:
        k = begin + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
        async_load(ring.index(stage), rows + k[None, :], mask=live)


@gluon.jit
def _add_parts(acc, acc_up, partial_ptr, counter_ptr, pid_n, pid_k, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
               SPLIT_K: gl.constexpr, GATED: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """Leave this program's part of a tile. Whether it was the last of them, and then the sum of all, in their order: the
    result has the same bits whoever is last."""
    n_at = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, MMA))
    m_at = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, MMA))
    tile = n_at[:, None] * BLOCK_M + m_at[None, :]
    size: gl.constexpr = BLOCK_N * BLOCK_M * (2 if GATED else 1)
    blocks = gl.num_programs(0)
    mine = partial_ptr + (pid_k * blocks + pid_n) * size
    gl.store(mine + tile, acc)
    if GATED:
        gl.store(mine + BLOCK_N * BLOCK_M + tile, acc_up)
    barrier()
    arrived = gl.atomic_add(counter_ptr + pid_n, 1, sem="acq_rel")
    last = arrived == SPLIT_K - 1
    if last:
        barrier()
        acc = gl.zeros((BLOCK_N, BLOCK_M), dtype=gl.float32, layout=MMA)
        acc_up = gl.zeros((BLOCK_N, BLOCK_M), dtype=gl.float32, layout=MMA)
        for part in gl.static_range(SPLIT_K):  # unrolled: all parts are on their way at once
            theirs = partial_ptr + (part * blocks + pid_n) * size
            acc += gl.load(theirs + tile, cache_modifier=".cg")
            if GATED:
                acc_up += gl.load(theirs + BLOCK_N * BLOCK_M + tile, cache_modifier=".cg")
        gl.store(counter_ptr + pid_n, 0)
    return last, acc, acc_up


@gluon.jit(do_not_specialize=["m_size"])
def _streamed(
    x_ptr,  # [m, k]
    w_ptr,  # [n, k], or [2 * n, k] if GATED
    bias_ptr,
    out_ptr,  # [m, n]
    partial_ptr,  # float32 [SPLIT_K, n blocks, ROWS, BLOCK_M]
    counter_ptr,  # int32 [n blocks], zero between launches
    m_size,
    k_size,
    n_size,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SPLIT_K: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    ADD: gl.constexpr,
    BIAS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Weights are the left operand of the tensor cores, as in linear.py, and so are the parts of a split product."""
    ROWS: gl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    # Lanes that share a row of weights read 16 bytes each of it: whole rows of a stage, up to 256 bytes at once.
    LANES: gl.constexpr = min(16, BLOCK_K // 8)
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    weights = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], shared)
    inputs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], shared)

    pid_n = gl.program_id(0)
    pid_k = gl.program_id(1)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, copy))
    n_row = pid_n * BLOCK_N + row % BLOCK_N
    w_row = gl.where(row < BLOCK_N, n_row, n_row + n_size) if GATED else n_row
    w_rows = w_ptr + w_row.to(gl.int64)[:, None] * k_size
    tiles = k_size // BLOCK_K
    begin = tiles * pid_k // SPLIT_K * BLOCK_K
    stop = tiles * (pid_k + 1) // SPLIT_K * BLOCK_K
    if PDL:
        gdc_launch_dependents()
    for stage in gl.static_range(STAGES):
        _ask_weights(weights, w_rows, stage, begin + stage * BLOCK_K, stop, BLOCK_K, copy)
    async_copy.commit_group()
    if PDL:
        gdc_wait()
    # The output's place, and what is there: its program may be the last one, and then need not wait for it.
    along: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    out_n = pid_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, along))
    out_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, along))
    place = out_ptr + out_m.to(gl.int64)[None, :] * n_size + out_n[:, None]
    written = (out_m < m_size)[None, :]
    if ADD:
        residual = gl.load(place, mask=written, other=0.0)
    m_row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, copy))
    live = (m_row < m_size)[:, None]
    x_rows = x_ptr + m_row[:, None] * k_size
    for stage in gl.static_range(STAGES):
        _ask_inputs(inputs, x_rows, live, stage, begin + stage * BLOCK_K, stop, BLOCK_K, copy)
        async_copy.commit_group()

    acc = gl.zeros((BLOCK_N, BLOCK_M), dtype=gl.float32, layout=mma)
    acc_up = gl.zeros((BLOCK_N, BLOCK_M), dtype=gl.float32, layout=mma)
    for at in range(begin, stop, BLOCK_K):
        slot = (at - begin) // BLOCK_K % STAGES
        # One group is made for each stage, so all but the newest STAGES - 1 are the ones up to this stage.
        async_copy.wait_group(STAGES - 1)
        fence_async_shared()
        barrier()
        x = inputs.index(slot).permute((1, 0))
        if GATED:
            acc = warpgroup_mma(weights.index(slot).slice(0, BLOCK_N), x, acc)
            acc_up = warpgroup_mma(weights.index(slot).slice(BLOCK_N, BLOCK_N), x, acc_up)
        else:
            acc = warpgroup_mma(weights.index(slot), x, acc)
        barrier()
        ahead = at + STAGES * BLOCK_K
        _ask_weights(weights, w_rows, slot, ahead, stop, BLOCK_K, copy)
        _ask_inputs(inputs, x_rows, live, slot, ahead, stop, BLOCK_K, copy)
        async_copy.commit_group()

    last = True
    if SPLIT_K > 1:
        last, acc, acc_up = _add_parts(
            acc, acc_up, partial_ptr, counter_ptr, pid_n, pid_k, BLOCK_M, BLOCK_N, SPLIT_K, GATED, mma
        )
    if last:
        if BIAS:
            bias = bias_ptr + pid_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, mma))
            acc += gl.load(bias).to(gl.float32)[:, None]
            if GATED:
                acc_up += gl.load(bias + n_size).to(gl.float32)[:, None]
        if GATED:
            acc = acc / (1.0 + gl.exp(-acc)) * acc_up
        found = gl.convert_layout(acc, along)
        if ADD:
            found += residual.to(gl.float32)
        gl.store(place, found.to(dtype), mask=written)


@dataclass(frozen=True)
class StreamTiling:
    block_k: int
    split_k: int
    num_stages: int


BLOCK_N = 64  # rows of weights that one tensor-core instruction takes


def is_faster(x: Tensor, weight: Tensor, *, gated: bool) -> bool:
    """Whether this kernel takes these shapes, and was faster with them on an H200 than linear.py's
    (bench/results/h200-streamed.json). cuBLAS's kernels wait for the one in front and make the next one wait."""
    (m_size, k_size), n_size = x.shape, weight.shape[0] // 2 if gated else weight.shape[0]
    if x.element_size() != 2 or n_size % BLOCK_N or k_size % 128 or n_size < 1024:
        return False
    if m_size <= 16:
        return m_size > 1
    if m_size <= 32:
        return gated or n_size > 4096
    return not gated and (n_size > 8192 or (n_size > 4096 and k_size < 4096))


def stream_tiling(m_size: int, n_size: int, k_size: int, *, gated: bool) -> StreamTiling:
    """Up to three programs for each of 132 multiprocessors, their rings in half its shared memory or less."""
    blocks, steps = n_size // BLOCK_N, k_size // 128
    if gated:
        if k_size >= 4096 or m_size > 16:
            return StreamTiling(64, 1, 3 if 8 < m_size <= 16 else 4)
        return StreamTiling(128, min(3, max(1, steps * 3 // 8)) if m_size <= 8 else 1, 3)
    if m_size > 16:
        return StreamTiling(128, 2 if blocks < 128 else 1, 4 if m_size <= 32 else 3)
    programs = 384 if m_size <= 8 and k_size >= 4096 else 256
    return StreamTiling(128, max(1, min(6, programs // blocks, steps * 3 // 8)), 4)


def streamed_linear(
    x: Tensor,
    weight: DenseWeight,
    workspace: Workspace,
    *,
    gated: bool = False,
    add_to: Tensor | None = None,
    tiling: StreamTiling | None = None,
) -> Tensor:
    """x [m <= 64, k], weight [n, k] ([2n, k] if gated) -> [m, n], with SiLU or the residual behind."""
    m_size, n_size, k_size, out = sizes_and_output(x, weight.weight, gated=gated, add_to=add_to)
    t = tiling or stream_tiling(m_size, n_size, k_size, gated=gated)
    block_m = max(8, triton.next_power_of_2(m_size))
    blocks = n_size // BLOCK_N
    assert t.split_k == 1 or t.split_k * n_size * (2 if gated else 1) * block_m <= workspace.partial.numel()
    _streamed[(blocks, t.split_k)](
        x, weight.weight, weight.bias, out, workspace.partial, workspace.counter, m_size, k_size, n_size,
        BLOCK_M=block_m, BLOCK_N=BLOCK_N, BLOCK_K=t.block_k, SPLIT_K=t.split_k, STAGES=t.num_stages, GATED=gated,
        ADD=add_to is not None, BIAS=weight.bias is not None, PDL=workspace.overlap,
        num_warps=4, **overlapping(workspace.overlap),
    )  # fmt: skip
    return out


def try_out(device: torch.device) -> None:
    """Raises whatever Triton raises where it cannot compile this kernel, RuntimeError where that computes wrongly."""
    x = torch.randn(4, 512, device=device).bfloat16()
    weight = torch.randn(BLOCK_N, 512, device=device).bfloat16()
    found = streamed_linear(x, DenseWeight(weight), Workspace(device, 2**14, 16), tiling=StreamTiling(128, 2, 3))
    expected = x.float() @ weight.float().t()
    if not torch.allclose(found.float(), expected, rtol=0.02, atol=0.5):
        raise RuntimeError("a product came out wrong")
