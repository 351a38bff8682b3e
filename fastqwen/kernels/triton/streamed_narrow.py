"""Attention of rows with one new token each over a cache of 8-bit numbers, in Gluon for Hopper.

As streamed_attention.py, but tensor cores take 16 bits: keys and values wait in registers, where a tile of them is 64 bytes a
thread, are raised there, and go to shared memory just before they are used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import AttentionParts, HeadShape, LayerCache, StepTokens
from fastqwen.kernels.triton import cache_numbers
from fastqwen.kernels.triton.attention import LOG2_E, DecodeWorkspace, expected_rows
from fastqwen.kernels.triton.cache_numbers import UNIT, bits_of
from fastqwen.kernels.triton.launch import overlapping
from fastqwen.kernels.triton.streamed import barrier
from fastqwen.kernels.triton.streamed_attention import DecodeTiling, decode_tiling, rotated, try_out_with, write

# The same lines as Triton's other kernels compile.
raised = gluon.jit(cache_numbers.raised.fn)
lowered = gluon.jit(cache_numbers.lowered.fn)
scale_of = gluon.jit(cache_numbers.scale_of.fn)


@gluon.jit
def _fetch(cache_ptr, scale_ptr, table, kv_head, first, position, stop, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
           BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, COPY: gl.constexpr, MMA: gl.constexpr):  # fmt: skip
    """Keys, or values, of tokens ``first`` to ``first + KEYS``, four to a word [KEYS, DIM / 4], and their scales times UNIT,
    float32; of those at ``position`` or ``stop`` and behind, where a block may hold anything, zeros. As words, since each of
    what waits in registers takes a whole one."""
    last = gl.minimum(position, stop)
    words_ptr = cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    word = gl.arange(0, DIM // 4, layout=gl.SliceLayout(0, COPY))
    token = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, COPY))
    block = gl.load(table + gl.minimum(token, position) // BLOCK_SIZE).to(gl.int64)
    line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE
    words = gl.load(words_ptr + line[:, None] * (DIM // 4) + word[None, :], mask=(token < last)[:, None], other=0)
    token = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, MMA))
    block = gl.load(table + gl.minimum(token, position) // BLOCK_SIZE).to(gl.int64)
    line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE
    scales = gl.load(scale_ptr + line, mask=token < last, other=0.0)
    return words, scales.to(gl.float32) * UNIT


@gluon.jit
def numbers_of(words, kind: gl.constexpr, dtype: gl.constexpr):
    """The numbers / UNIT of words of four, in ``dtype``: [KEYS, DIM / 4] -> [KEYS, DIM]"""
    KEYS: gl.constexpr = words.shape[0]
    DIM: gl.constexpr = 4 * words.shape[1]
    even = gl.join(raised(words.to(kind), dtype), raised((words >> 16).to(kind), dtype))
    odd = gl.join(raised((words >> 8).to(kind), dtype), raised((words >> 24).to(kind), dtype))
    return gl.join(even, odd).reshape([KEYS, DIM])


@gluon.jit
def _add_mates(x, size: gl.constexpr):
    """a + b and a - b in place of numbers that stand ``size`` apart, in one thread's registers."""
    HEADS: gl.constexpr = x.shape[0]
    DIM: gl.constexpr = x.shape[1]
    a, b = gl.split(x.reshape([HEADS, DIM // (2 * size), 2, size]).permute((0, 1, 3, 2)))
    return gl.join(a + b, a - b).permute((0, 1, 3, 2)).reshape([HEADS, DIM])


@gluon.jit
def spread_heads(x, dim, DIM: gl.constexpr, LAYOUT: gl.constexpr):
    """Heads as sums of all their numbers with signs (reference.py), float32 [heads, DIM]. Eight numbers of a head stand in one
    thread, the others in its neighbours."""
    for stage in gl.static_range(3):
        x = gl.convert_layout(_add_mates(x, 1 << stage), LAYOUT)
    for stage in gl.static_range(3, 8):
        if 1 << stage < DIM:
            lanes = gl.zeros_like(x).to(gl.int32) + (1 << stage) // 8
            mate = gl.inline_asm_elementwise(
                "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;",
                "=f,f,r",
                [x, lanes],
                dtype=gl.float32,
                is_pure=True,
                pack=1,
            )
            x = x * gl.where((dim & (1 << stage)) == 0, 1.0, -1.0)[None, :] + mate
    return x * DIM**-0.5


@gluon.jit
def store_new_head(x, cache_ptr, scale_ptr, line, head, dim, DIM: gl.constexpr):
    """A head to its line of the cache: x float32 [heads, DIM], the same in every line. Returned as it is there."""
    nothing = gl.sum(x * 0.0, axis=1)  # NaN where a number is not finite: no 8 bits would say so
    scale = scale_of(gl.max(gl.abs(x), axis=1), cache_ptr) + nothing.to(gl.float16)
    numbers = lowered(x, scale[:, None], cache_ptr)
    once = (head == 0)[:, None]
    gl.store(cache_ptr + line * DIM + dim[None, :] + head[:, None] * 0, numbers, mask=once)
    gl.store(scale_ptr + line + head, scale, mask=head == 0)
    return raised(numbers, gl.float32) * (scale.to(gl.float32) * UNIT)[:, None]


@gluon.jit(do_not_specialize=["splits"])
def _decode_narrow(
    qkv_ptr,  # [rows, WIDTH]
    cos_sin_ptr,  # float32 [rows, DIM]
    q_scale_ptr,  # float32 [rows]
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,  # int32 [rows]
    tables_ptr,  # int32 [slots, table_width]
    positions_ptr,  # int32 [rows]
    count_ptr,  # int32 [1], if COUNTED: how many of the rows there are
    k_cache_ptr,  # int8 or uint8 [blocks, KV_HEADS, BLOCK_SIZE, DIM]
    v_cache_ptr,
    k_scale_ptr,  # float16 [blocks, KV_HEADS, BLOCK_SIZE]
    v_scale_ptr,
    out_ptr,  # [rows, HEADS * DIM]
    partial_ptr,  # float32 [rows, KV_HEADS, splits, GROUP, DIM]
    stats_ptr,  # float32 [rows, KV_HEADS, splits, 2, GROUP]: maxima (base 2) and sums
    counter_ptr,  # int32 [rows, KV_HEADS], zero between launches
    table_width,
    scale,
    eps,
    splits,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    DIM: gl.constexpr,
    WIDTH: gl.constexpr,  # from one row's numbers to the next one's
    BLOCK_SIZE: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS_2: gl.constexpr,  # 8 or 16, at least GROUP
    KEYS: gl.constexpr,  # looked at together
    WINDOW: gl.constexpr,
    NORM: gl.constexpr,
    LOGN: gl.constexpr,
    COUNTED: gl.constexpr,
    PDL: gl.constexpr,
):
    """A program has one KV head, its query heads, and one part of the context; the last part has the new token as well."""
    kv_head = gl.program_id(0)
    row = gl.program_id(1)
    split = gl.program_id(2)
    dtype: gl.constexpr = qkv_ptr.dtype.element_ty
    kind: gl.constexpr = k_cache_ptr.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
    if COUNTED:  # noqa: SIM102 (the second condition needs the pointer that the first one promises)
        if row >= gl.load(count_ptr):
            if PDL:
                gdc_wait()  # or this kernel could end, and the next one begin, before the one in front has ended
            return
    position = gl.load(positions_ptr + row)
    first_chunk = 0
    if WINDOW > 0:
        first_chunk = gl.maximum(position + 1 - WINDOW, 0) // KEYS
    num_chunks = gl.maximum(gl.cdiv(position, KEYS) - first_chunk, 0)  # of older tokens
    per_split = gl.maximum(gl.cdiv(num_chunks, splits), 1)
    parts = gl.maximum(gl.cdiv(num_chunks, per_split), 1)
    if split >= parts:
        return
    begin = (first_chunk + split * per_split) * KEYS
    stop = (first_chunk + gl.minimum((split + 1) * per_split, num_chunks)) * KEYS

    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS_2, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [512 // DIM, DIM // 16], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    keys = gl.allocate_shared_memory(dtype, [KEYS, DIM], shared)
    values = gl.allocate_shared_memory(dtype, [KEYS, DIM], shared)
    queries = gl.allocate_shared_memory(dtype, [HEADS_2, DIM], shared)
    chances = gl.allocate_shared_memory(dtype, [HEADS_2, KEYS], shared)
    table = tables_ptr + gl.load(slots_ptr + row).to(gl.int64) * table_width
    k, k_unit = _fetch(k_cache_ptr, k_scale_ptr, table, kv_head, begin, position, stop,
                       KV_HEADS, DIM, BLOCK_SIZE, KEYS, narrow, mma)  # fmt: skip
    v, v_unit = _fetch(v_cache_ptr, v_scale_ptr, table, kv_head, begin, position, stop,
                       KV_HEADS, DIM, BLOCK_SIZE, KEYS, narrow, mma)  # fmt: skip
    if PDL:
        gdc_wait()

    head = gl.arange(0, HEADS_2, layout=gl.SliceLayout(1, wide))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    qkv = qkv_ptr + row.to(gl.int64) * WIDTH
    cos_sin = cos_sin_ptr + row * DIM
    q = rotated(qkv + kv_head * GROUP * DIM, q_norm_ptr, cos_sin, head * DIM, dim, head < GROUP, eps, DIM, NORM)
    if LOGN:
        q *= gl.load(q_scale_ptr + row)
    q = spread_heads(q, dim, DIM, wide).to(dtype)
    queries.store(q)

    top = gl.full((HEADS_2,), float("-inf"), gl.float32, gl.SliceLayout(0, mma))
    total = gl.full((HEADS_2,), 0.0, gl.float32, gl.SliceLayout(0, mma))
    acc = gl.zeros((DIM, HEADS_2), gl.float32, mma)
    if split == parts - 1:
        block = gl.load(table + position // BLOCK_SIZE).to(gl.int64)
        line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
        new = qkv + (HEADS + kv_head) * DIM  # the same in every line, so that it stands where the queries do
        new_k = rotated(new, k_norm_ptr, cos_sin, head * 0, dim, head >= 0, eps, DIM, NORM)
        new_k = store_new_head(spread_heads(new_k, dim, DIM, wide), k_cache_ptr, k_scale_ptr, line, head, dim, DIM)
        new_v = gl.load(new + KV_HEADS * DIM + dim[None, :] + head[:, None] * 0).to(gl.float32)
        new_v = store_new_head(new_v, v_cache_ptr, v_scale_ptr, line, head, dim, DIM)
        top = gl.convert_layout(gl.sum(q.to(gl.float32) * new_k, axis=1) * scale, gl.SliceLayout(0, mma))
        total += 1.0
        acc = gl.convert_layout(gl.permute(new_v, (1, 0)), mma)

    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, mma))
    for at in range(begin, stop, KEYS):
        keys.store(numbers_of(k, kind, dtype))
        values.store(numbers_of(v, kind, dtype))
        k_now = k_unit
        v_now = v_unit
        fence_async_shared()
        barrier()
        k, k_unit = _fetch(k_cache_ptr, k_scale_ptr, table, kv_head, at + KEYS, position, stop,
                           KV_HEADS, DIM, BLOCK_SIZE, KEYS, narrow, mma)  # fmt: skip
        v, v_unit = _fetch(v_cache_ptr, v_scale_ptr, table, kv_head, at + KEYS, position, stop,
                           KV_HEADS, DIM, BLOCK_SIZE, KEYS, narrow, mma)  # fmt: skip
        scores = warpgroup_mma(keys, queries.permute((1, 0)), gl.zeros((KEYS, HEADS_2), gl.float32, mma), use_acc=False)
        seen = at + key < position
        if WINDOW > 0:
            seen = seen & (at + key > position - WINDOW)
        scores = gl.where(seen[:, None], scores * (k_now * scale)[:, None], float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, axis=0))
        fade = gl.exp2(top - new_top)
        weights = gl.exp2(scores - new_top[None, :])
        total = total * fade + gl.sum(weights, axis=0)
        chances.store(gl.permute((weights * v_now[:, None]).to(dtype), (1, 0)))
        acc *= fade[None, :]
        top = new_top
        fence_async_shared()
        barrier()
        acc = warpgroup_mma(values.permute((1, 0)), chances.permute((1, 0)), acc)
        barrier()

    write(
        acc, top, total, out_ptr, partial_ptr, stats_ptr, counter_ptr, kv_head, row, split, splits, parts,
        HEADS, KV_HEADS, GROUP, HEADS_2, DIM, mma,
    )  # fmt: skip


def takes(qkv: Tensor, cache: LayerCache, shape: HeadShape) -> bool:
    """Whether the kernel is made for these shapes and types; those of Qwen-1 to Qwen3 in 16 bits are."""
    sizes = shape.head_dim in (64, 128) and shape.rotary_dim == shape.head_dim and shape.group <= 16
    return sizes and cache.k_scale is not None and qkv.element_size() == 2


def decode_attention(
    qkv: Tensor,
    step: StepTokens,
    cache: LayerCache,
    parts: AttentionParts,
    workspace: DecodeWorkspace,
    *,
    out: Tensor,
    tiling: DecodeTiling | None = None,
) -> None:
    """As attention.py's: rotation, cache write and attention of rows that have one token each."""
    rows, shape = qkv.shape[0], parts.shape
    t = tiling or decode_tiling(expected_rows(rows, step), shape.num_kv_heads, workspace.max_parts)
    splits = max(1, min(t.splits, workspace.max_parts // (rows * shape.num_kv_heads)))
    pdl = workspace.overlap
    _decode_narrow[(shape.num_kv_heads, rows, splits)](
        qkv, step.cos_sin, step.q_scale, parts.q_norm, parts.k_norm, step.slots, step.block_tables, step.positions,
        step.decode_count, bits_of(cache.k), bits_of(cache.v), cache.k_scale, cache.v_scale, out,
        workspace.partial, workspace.stats, workspace.counter,
        step.block_tables.shape[1], shape.head_dim**-0.5 * LOG2_E, parts.eps, splits,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim, WIDTH=qkv.stride(0),
        BLOCK_SIZE=cache.k.shape[2], GROUP=shape.group, HEADS_2=max(8, triton.next_power_of_2(shape.group)),
        KEYS=t.keys, WINDOW=parts.window or 0, NORM=parts.q_norm is not None, LOGN=step.q_scale is not None,
        COUNTED=step.decode_count is not None, PDL=pdl, num_warps=4, **overlapping(pdl),
    )  # fmt: skip


def try_out(device: torch.device) -> None:
    """Raises whatever Triton raises where it cannot compile this kernel, RuntimeError where that computes wrongly."""
    try_out_kernel(device, decode_attention)


def try_out_kernel(device: torch.device, attend: Callable[..., None]) -> None:
    numbers = (torch.zeros(1, 1, 64, 64, dtype=torch.int8, device=device) for _ in range(2))
    scales = (torch.zeros(1, 1, 64, dtype=torch.float16, device=device) for _ in range(2))
    try_out_with(LayerCache(*numbers, *scales), attend, tolerance=0.02)
