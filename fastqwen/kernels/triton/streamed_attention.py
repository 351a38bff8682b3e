"""Attention of rows with one new token each, whose keys and values are on their way before the kernel in front has ended.

What attention.py's kernel computes, in Gluon for Hopper: older tokens' keys and values depend on nothing that this step
computes, so a program asks for its first ones at once, and waits for the queries afterwards. Keys are the left operand of
the tensor cores, the query heads that share them the right one, so that no rows are computed for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import AttentionParts, HeadShape, LayerCache, StepTokens
from fastqwen.kernels.triton.attention import LOG2_E, DecodeWorkspace, expected_rows
from fastqwen.kernels.triton.launch import overlapping
from fastqwen.kernels.triton.streamed import async_load, barrier


@gluon.jit
def _ask(buffer, cache_ptr, table, kv_head, first, position, stop, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
         BLOCK_SIZE: gl.constexpr, KEYS: gl.constexpr, COPY: gl.constexpr):  # fmt: skip
    """Start copying the keys, or the values, of tokens ``first`` to ``first + KEYS``; of those at ``position`` and behind,
    where a block may hold anything, even NaN, zeros."""
    PAGE: gl.constexpr = min(KEYS, BLOCK_SIZE)  # lies together in the cache
    if first < stop:
        key = gl.arange(0, PAGE, layout=gl.SliceLayout(1, COPY))
        dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, COPY))
        for page in gl.static_range(KEYS // PAGE):
            at = first + page * PAGE
            block = gl.load(table + gl.minimum(at, position) // BLOCK_SIZE).to(gl.int64)
            home = cache_ptr + ((block * KV_HEADS + kv_head) * BLOCK_SIZE + at % BLOCK_SIZE) * DIM
            live = (at + key < position)[:, None]
            async_load(buffer.slice(page * PAGE, PAGE), home + key[:, None] * DIM + dim[None, :], mask=live)
    async_copy.commit_group()


@gluon.jit
def rotated(x_ptr, norm_ptr, cos_sin_ptr, rows, dim, live, eps, DIM: gl.constexpr, NORM: gl.constexpr):
    """Heads at ``x_ptr + rows``, normalised and rotated, float32 [heads, DIM]: number d turns with d + DIM / 2."""
    HALF: gl.constexpr = DIM // 2
    other = (dim + HALF) % DIM
    x = gl.load(x_ptr + rows[:, None] + dim[None, :], mask=live[:, None], other=0.0).to(gl.float32)
    partner = gl.load(x_ptr + rows[:, None] + other[None, :], mask=live[:, None], other=0.0).to(gl.float32)
    if NORM:
        scale = gl.rsqrt(gl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x = x * scale * gl.load(norm_ptr + dim).to(gl.float32)[None, :]
        partner = partner * scale * gl.load(norm_ptr + other).to(gl.float32)[None, :]
    cos = gl.load(cos_sin_ptr + dim % HALF)
    sin = gl.load(cos_sin_ptr + HALF + dim % HALF)
    return x * cos[None, :] + partner * gl.where(dim < HALF, -sin, sin)[None, :]


@gluon.jit
def _store_new_token(q, qkv, kv_head, k_cache_ptr, v_cache_ptr, home, norm_ptr, cos_sin_ptr, head, dim, eps, scale,
                     HEADS: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr, NORM: gl.constexpr,
                     MMA: gl.constexpr):  # fmt: skip
    """The new token's key, normalised and rotated, and its value go to the cache. Its scores, float32 [heads], and the
    value [DIM], where MMA has its columns and rows."""
    # The same key in every line, so that it stands where the queries do.
    k = rotated(qkv + (HEADS + kv_head) * DIM, norm_ptr, cos_sin_ptr, head * 0, dim, head >= 0, eps, DIM, NORM)
    k = k.to(q.dtype)
    gl.store(k_cache_ptr + home + dim[None, :] + head[:, None] * 0, k, mask=(head == 0)[:, None])
    scores = gl.convert_layout(gl.sum(q.to(gl.float32) * k.to(gl.float32), axis=1) * scale, gl.SliceLayout(0, MMA))
    high = gl.arange(0, DIM, layout=gl.SliceLayout(1, MMA))
    v = gl.load(qkv + (HEADS + KV_HEADS + kv_head) * DIM + high)
    gl.store(v_cache_ptr + home + high, v)
    return scores, v


@gluon.jit
def _combine(partial_ptr, stats_ptr, out_ptr, slab, parts, GROUP: gl.constexpr, HEADS_2: gl.constexpr,
             DIM: gl.constexpr):  # fmt: skip
    """Add the parts of a context up, in their order, eight at a time."""
    AT_ONCE: gl.constexpr = 8
    cube: gl.constexpr = gl.BlockedLayout([AT_ONCE, 1, 4], [1, 128 // DIM, DIM // 4], [1, 4, 1], [2, 1, 0])
    flat: gl.constexpr = gl.SliceLayout(0, cube)
    group = gl.arange(0, HEADS_2, layout=gl.SliceLayout(1, flat))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, flat))
    part = gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, gl.SliceLayout(2, cube)))
    head = gl.arange(0, HEADS_2, layout=gl.SliceLayout(0, gl.SliceLayout(2, cube)))
    deep = gl.arange(0, DIM, layout=gl.SliceLayout(0, gl.SliceLayout(0, cube)))
    top = gl.full((HEADS_2,), float("-inf"), gl.float32, gl.SliceLayout(1, flat))
    total = gl.full((HEADS_2,), 0.0, gl.float32, gl.SliceLayout(1, flat))
    acc = gl.full((HEADS_2, DIM), 0.0, gl.float32, flat)
    for first in range(0, parts, AT_ONCE):
        here = (first + part < parts)[:, None] & (head < GROUP)[None, :]
        spot = stats_ptr + (slab + first + part)[:, None] * 2 * GROUP + head[None, :]
        tops = gl.load(spot, mask=here, other=float("-inf"), cache_modifier=".cg")
        sums = gl.load(spot + GROUP, mask=here, other=0.0, cache_modifier=".cg")
        line = gl.expand_dims((slab + first + part)[:, None] * GROUP + head[None, :], 2)
        place = partial_ptr + line * DIM + gl.expand_dims(gl.expand_dims(deep, 0), 0)
        vectors = gl.load(place, mask=gl.expand_dims(here, 2), other=0.0, cache_modifier=".cg")
        new_top = gl.maximum(top, gl.convert_layout(gl.max(tops, axis=0), gl.SliceLayout(1, flat)))
        new_top = gl.where(group < GROUP, new_top, 0.0)
        fade = gl.exp2(top - new_top)
        weights = gl.exp2(tops - gl.convert_layout(new_top, gl.SliceLayout(0, gl.SliceLayout(2, cube)))[None, :])
        total = total * fade + gl.convert_layout(gl.sum(sums * weights, axis=0), gl.SliceLayout(1, flat))
        acc = acc * fade[:, None] + gl.sum(vectors * gl.expand_dims(weights, 2), axis=0)
        top = new_top
    found = acc / gl.where(group < GROUP, total, 1.0)[:, None]
    gl.store(
        out_ptr + group[:, None] * DIM + dim[None, :], found.to(out_ptr.dtype.element_ty), mask=(group < GROUP)[:, None]
    )


@gluon.jit
def write(acc, top, total, out_ptr, partial_ptr, stats_ptr, counter_ptr, kv_head, row, split, splits, parts,
           HEADS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS_2: gl.constexpr, DIM: gl.constexpr,
           MMA: gl.constexpr):  # fmt: skip
    """The result, if this is the context's only part; else this part, and if it is the last to arrive, the sum of all."""
    along: gl.constexpr = gl.BlockedLayout([4, 1], [DIM // 4, 128 // DIM], [1, 4], [0, 1])
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(1, along))
    head = gl.arange(0, HEADS_2, layout=gl.SliceLayout(0, along))
    live = (head < GROUP)[None, :]
    place = head[None, :] * DIM + dim[:, None]
    out_row = out_ptr + (row.to(gl.int64) * HEADS + kv_head * GROUP) * DIM
    if parts == 1:
        found = gl.convert_layout(acc / total[None, :], along)
        gl.store(out_row + place, found.to(out_ptr.dtype.element_ty), mask=live)
    else:
        slab = (row.to(gl.int64) * KV_HEADS + kv_head) * splits
        mine = slab + split
        gl.store(partial_ptr + mine * GROUP * DIM + place, gl.convert_layout(acc, along), mask=live)
        spot = gl.arange(0, HEADS_2, layout=gl.SliceLayout(0, MMA))
        gl.store(stats_ptr + mine * 2 * GROUP + spot, top, mask=spot < GROUP)
        gl.store(stats_ptr + mine * 2 * GROUP + GROUP + spot, total, mask=spot < GROUP)
        barrier()
        arrived = gl.atomic_add(counter_ptr + row * KV_HEADS + kv_head, 1, sem="acq_rel")
        if arrived == parts - 1:
            barrier()
            _combine(partial_ptr, stats_ptr, out_row, slab, parts, GROUP, HEADS_2, DIM)
            gl.store(counter_ptr + row * KV_HEADS + kv_head, 0)


@gluon.jit(do_not_specialize=["splits"])
def _decode_streamed(
    qkv_ptr,  # [rows, WIDTH]
    cos_sin_ptr,  # float32 [rows, DIM]
    q_scale_ptr,  # float32 [rows]
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,  # int32 [rows]
    tables_ptr,  # int32 [slots, table_width]
    positions_ptr,  # int32 [rows]
    count_ptr,  # int32 [1], if COUNTED: how many of the rows there are
    k_cache_ptr,  # [blocks, KV_HEADS, BLOCK_SIZE, DIM]
    v_cache_ptr,
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
    dtype: gl.constexpr = k_cache_ptr.dtype.element_ty
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
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    keys = gl.allocate_shared_memory(dtype, [KEYS, DIM], shared)
    values = gl.allocate_shared_memory(dtype, [KEYS, DIM], shared)
    queries = gl.allocate_shared_memory(dtype, [HEADS_2, DIM], shared)
    chances = gl.allocate_shared_memory(dtype, [HEADS_2, KEYS], shared)
    table = tables_ptr + gl.load(slots_ptr + row).to(gl.int64) * table_width
    _ask(keys, k_cache_ptr, table, kv_head, begin, position, stop, KV_HEADS, DIM, BLOCK_SIZE, KEYS, copy)
    _ask(values, v_cache_ptr, table, kv_head, begin, position, stop, KV_HEADS, DIM, BLOCK_SIZE, KEYS, copy)
    if PDL:
        gdc_wait()

    head = gl.arange(0, HEADS_2, layout=gl.SliceLayout(1, copy))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, copy))
    qkv = qkv_ptr + row.to(gl.int64) * WIDTH
    cos_sin = cos_sin_ptr + row * DIM
    q = rotated(qkv + kv_head * GROUP * DIM, q_norm_ptr, cos_sin, head * DIM, dim, head < GROUP, eps, DIM, NORM)
    if LOGN:
        q *= gl.load(q_scale_ptr + row)
    q = q.to(dtype)
    queries.store(q)

    top = gl.full((HEADS_2,), float("-inf"), gl.float32, gl.SliceLayout(0, mma))
    total = gl.full((HEADS_2,), 0.0, gl.float32, gl.SliceLayout(0, mma))
    acc = gl.zeros((DIM, HEADS_2), gl.float32, mma)
    if split == parts - 1:
        block = gl.load(table + position // BLOCK_SIZE).to(gl.int64)
        home = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE) * DIM
        top, v = _store_new_token(
            q, qkv, kv_head, k_cache_ptr, v_cache_ptr, home, k_norm_ptr, cos_sin, head, dim, eps, scale,
            HEADS, KV_HEADS, DIM, NORM, mma,
        )  # fmt: skip
        total += 1.0
        acc += v.to(gl.float32)[:, None]

    key = gl.arange(0, KEYS, layout=gl.SliceLayout(1, mma))
    for at in range(begin, stop, KEYS):
        async_copy.wait_group(1)  # the keys; the values may be on their way
        fence_async_shared()
        barrier()
        scores = warpgroup_mma(keys, queries.permute((1, 0)), gl.zeros((KEYS, HEADS_2), gl.float32, mma), use_acc=False)
        barrier()
        _ask(keys, k_cache_ptr, table, kv_head, at + KEYS, position, stop, KV_HEADS, DIM, BLOCK_SIZE, KEYS, copy)
        seen = at + key < position
        if WINDOW > 0:
            seen = seen & (at + key > position - WINDOW)
        scores = gl.where(seen[:, None], scores * scale, float("-inf"))
        new_top = gl.maximum(top, gl.max(scores, axis=0))
        fade = gl.exp2(top - new_top)
        weights = gl.exp2(scores - new_top[None, :])
        total = total * fade + gl.sum(weights, axis=0)
        chances.store(gl.permute(weights.to(dtype), (1, 0)))
        acc *= fade[None, :]
        top = new_top
        async_copy.wait_group(1)
        fence_async_shared()
        barrier()
        acc = warpgroup_mma(values.permute((1, 0)), chances.permute((1, 0)), acc)
        barrier()
        _ask(values, v_cache_ptr, table, kv_head, at + KEYS, position, stop, KV_HEADS, DIM, BLOCK_SIZE, KEYS, copy)
    async_copy.wait_group(0)

    write(
        acc, top, total, out_ptr, partial_ptr, stats_ptr, counter_ptr, kv_head, row, split, splits, parts,
        HEADS, KV_HEADS, GROUP, HEADS_2, DIM, mma,
    )  # fmt: skip


@dataclass(frozen=True)
class DecodeTiling:
    splits: int  # parts that a context may be cut into
    keys: int


def takes(qkv: Tensor, cache: LayerCache, shape: HeadShape) -> bool:
    """Whether the kernel is made for these shapes and types; those of Qwen-1 to Qwen3 in 16 bits are."""
    sizes = shape.head_dim in (64, 128) and shape.rotary_dim == shape.head_dim and shape.group <= 16
    return sizes and qkv.dtype == cache.k.dtype and qkv.element_size() == 2


def decode_tiling(rows: int, num_kv_heads: int, max_parts: int) -> DecodeTiling:
    """By how many pairs of a row and a KV head there are (bench/results/h200-attention.json): about 512 programs for
    few of them; for more of them a few parts each, so that the last programs are short; for many none."""
    pairs = rows * num_kv_heads
    splits = min(64, 512 // pairs) if pairs <= 128 else 3 if pairs <= 768 else 1
    return DecodeTiling(max(1, min(splits, max_parts // pairs)), 64 if rows == 1 or 256 < pairs <= 768 else 128)


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
    _decode_streamed[(shape.num_kv_heads, rows, splits)](
        qkv, step.cos_sin, step.q_scale, parts.q_norm, parts.k_norm, step.slots, step.block_tables, step.positions,
        step.decode_count, cache.k, cache.v, out, workspace.partial, workspace.stats, workspace.counter,
        step.block_tables.shape[1], shape.head_dim**-0.5 * LOG2_E, parts.eps, splits,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim, WIDTH=qkv.stride(0),
        BLOCK_SIZE=cache.k.shape[2], GROUP=shape.group, HEADS_2=max(8, triton.next_power_of_2(shape.group)),
        KEYS=t.keys, WINDOW=parts.window or 0, NORM=parts.q_norm is not None, LOGN=step.q_scale is not None,
        COUNTED=step.decode_count is not None, PDL=pdl, num_warps=4, **overlapping(pdl),
    )  # fmt: skip


def try_out(device: torch.device) -> None:
    """Raises whatever Triton raises where it cannot compile this kernel, RuntimeError where that computes wrongly."""
    cache = LayerCache(*(torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device) for _ in range(2)))
    try_out_with(cache, decode_attention, tolerance=0.0)


def try_out_with(cache: LayerCache, attend: Callable[..., None], *, tolerance: float) -> None:
    """One token alone in one block: what comes out is its value."""
    device, parts = cache.k.device, AttentionParts(HeadShape(2, 1, 64, 64))
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    turn = torch.ones(1, 64, device=device)
    step = StepTokens(zero, zero, zero, turn, None, block_tables=zero.view(1, 1), num_decode_rows=1)
    qkv = torch.randn(1, 4 * 64, device=device).bfloat16()
    out = torch.empty(1, 2 * 64, dtype=torch.bfloat16, device=device)
    space = DecodeWorkspace(device, max_rows=1, shape=parts.shape, max_parts=1)
    attend(qkv, step, cache, parts, space, out=out)
    expected = qkv[:, 3 * 64 :].expand(2, 64)
    if not torch.allclose(out.view(2, 64).float(), expected.float(), rtol=tolerance, atol=4 * tolerance):
        raise RuntimeError("attention came out wrong")
