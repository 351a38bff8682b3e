"""Attention over the paged cache: split-KV decode with everything around it fused, and prefill in tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import AttentionBatch, HeadShape, LayerCache
from fastqwen.kernels.triton.launch import overlapping, prefetch, supports_overlap
from fastqwen.kernels.triton.pointwise import normed_and_rotated

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["splits"])
def _decode(
    qkv_ptr,  # [rows, (HEADS + 2 * KV_HEADS) * 2 * HALF]
    cos_sin_ptr,  # float32 [rows, 2 * HALF]
    q_scale_ptr,  # float32 [rows]
    q_norm_ptr,
    k_norm_ptr,
    table_rows_ptr,  # int32 [rows]: row of the block tables
    tables_ptr,  # int32 [slots, table_width]
    positions_ptr,  # int32 [rows]
    k_cache_ptr,  # [blocks, KV_HEADS, BLOCK_SIZE, 2 * HALF]
    v_cache_ptr,
    out_ptr,  # [rows, HEADS * 2 * HALF]
    partial_ptr,  # float32 [rows, KV_HEADS, splits, GROUP, 2 * HALF]
    stats_ptr,  # float32 [rows, KV_HEADS, splits, 2, GROUP]: maxima (base 2) and sums
    counter_ptr,  # int32 [rows, KV_HEADS], zero between launches
    table_width,
    scale,
    eps,
    splits,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    NORM: tl.constexpr,
    LOGN: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One new token per row. A program has one KV head, all of its query heads, and one part of the context.

    The part that ends with the new token also normalises, rotates and stores its key and value. The last program of a
    row's head adds the parts up, in their order.
    """
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    DIM: tl.constexpr = 2 * HALF
    if PDL:
        gdc_launch_dependents()
    position = tl.load(positions_ptr + row)
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(position + 1 - WINDOW, 0) // BLOCK_SIZE
    num_tiles = position // BLOCK_SIZE + 1 - first_tile
    per_split = tl.cdiv(num_tiles, splits)
    parts = tl.cdiv(num_tiles, per_split)
    if split >= parts:
        return
    start = first_tile + split * per_split
    stop = tl.minimum(start + per_split, first_tile + num_tiles)

    at = tl.arange(0, HALF)
    wide = tl.arange(0, DIM)
    table = tables_ptr + tl.load(table_rows_ptr + row).to(tl.int64) * table_width
    head_stride = BLOCK_SIZE * DIM
    if PDL:
        # Older keys and values do not depend on the kernel before: ask for the first tile's while it still runs.
        base = (tl.load(table + start).to(tl.int64) * KV_HEADS + kv_head) * head_stride
        lines = tl.arange(0, BLOCK_SIZE * DIM * k_cache_ptr.dtype.element_ty.primitive_bitwidth // 1024)
        step: tl.constexpr = 1024 // k_cache_ptr.dtype.element_ty.primitive_bitwidth
        prefetch(k_cache_ptr + base + lines * step)
        prefetch(v_cache_ptr + base + lines * step)
        gdc_wait()
    cos = tl.load(cos_sin_ptr + row * DIM + at)[None, :]
    sin = tl.load(cos_sin_ptr + row * DIM + HALF + at)[None, :]
    qkv = qkv_ptr + row.to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
    group = tl.arange(0, 16)
    live = (group < GROUP)[:, None]
    place = (kv_head * GROUP + group)[:, None] * DIM + at[None, :]
    q_low = tl.load(qkv + place, mask=live, other=0.0).to(tl.float32)
    q_high = tl.load(qkv + place + HALF, mask=live, other=0.0).to(tl.float32)
    q_low, q_high = normed_and_rotated(q_low, q_high, q_norm_ptr, cos, sin, eps, HALF, NORM)
    if LOGN:
        stretch = tl.load(q_scale_ptr + row)
        q_low *= stretch
        q_high *= stretch
    q_low = q_low.to(qkv_ptr.dtype.element_ty).to(k_cache_ptr.dtype.element_ty)
    q_high = q_high.to(qkv_ptr.dtype.element_ty).to(k_cache_ptr.dtype.element_ty)

    keys = tl.arange(0, BLOCK_SIZE)
    in_block = keys[:, None] * DIM
    top = tl.full((16,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((16,), dtype=tl.float32)
    acc = tl.zeros((16, DIM), dtype=tl.float32)

    # The new token's own key and value go to the cache first; then its tile is like any other.
    if stop == first_tile + num_tiles:
        one = tl.arange(0, 16)  # a row of its own, padded to the shape that the rotation wants
        own = (one == 0)[:, None]
        source = qkv + (HEADS + kv_head) * DIM + one[:, None] * 0 + at[None, :]
        k_low = tl.load(source, mask=own, other=0.0).to(tl.float32)
        k_high = tl.load(source + HALF, mask=own, other=0.0).to(tl.float32)
        k_low, k_high = normed_and_rotated(k_low, k_high, k_norm_ptr, cos, sin, eps, HALF, NORM)
        v_new = tl.load(qkv + (HEADS + KV_HEADS + kv_head) * DIM + wide)
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        home = (block * KV_HEADS + kv_head) * head_stride + (position % BLOCK_SIZE) * DIM
        spot = k_cache_ptr + home + one[:, None] * 0 + at[None, :]
        tl.store(spot, k_low.to(k_cache_ptr.dtype.element_ty), mask=own)
        tl.store(spot + HALF, k_high.to(k_cache_ptr.dtype.element_ty), mask=own)
        tl.store(v_cache_ptr + home + wide, v_new.to(v_cache_ptr.dtype.element_ty))
        tl.debug_barrier()

    for tile in tl.range(start, stop, num_stages=STAGES):
        block = tl.load(table + tile).to(tl.int64)
        base = (block * KV_HEADS + kv_head) * head_stride
        k_low_t = tl.load(k_cache_ptr + base + in_block + at[None, :])
        k_high_t = tl.load(k_cache_ptr + base + in_block + HALF + at[None, :])
        v = tl.load(v_cache_ptr + base + in_block + wide[None, :])
        scores = tl.dot(q_low, tl.trans(k_low_t), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(k_high_t), scores, input_precision=PRECISION) * scale
        spot_of = tile * BLOCK_SIZE + keys
        seen = spot_of <= position
        if WINDOW > 0:
            seen = seen & (spot_of > position - WINDOW)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        v = tl.where(seen[:, None], v, 0.0)  # beyond the context a block may hold anything, even NaN
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top

    out_place = (row.to(tl.int64) * HEADS + kv_head * GROUP + group)[:, None] * DIM + wide[None, :]
    if parts == 1:
        tl.store(out_ptr + out_place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live)
    else:
        slab = (row.to(tl.int64) * KV_HEADS + kv_head) * splits
        mine = slab + split
        part_place = group[:, None] * DIM + wide[None, :]
        tl.store(partial_ptr + mine * GROUP * DIM + part_place, acc, mask=live)
        tl.store(stats_ptr + mine * 2 * GROUP + group, top, mask=group < GROUP)
        tl.store(stats_ptr + mine * 2 * GROUP + GROUP + group, total, mask=group < GROUP)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + row * KV_HEADS + kv_head, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.debug_barrier()
            # First all parts' maxima and sums at once; then their vectors, whose loads do not wait for each other.
            every = tl.arange(0, MAX_SPLITS)
            place_of = (slab + every)[:, None] * 2 * GROUP + group[None, :]
            given = (every < parts)[:, None] & (group < GROUP)[None, :]
            tops = tl.load(stats_ptr + place_of, mask=given, other=float("-inf"), cache_modifier=".cg")
            sums = tl.load(stats_ptr + place_of + GROUP, mask=given, other=0.0, cache_modifier=".cg")
            top = tl.max(tops, axis=0)
            top = tl.where(group < GROUP, top, 0.0)
            total = tl.where(group < GROUP, tl.sum(sums * tl.exp2(tops - top[None, :]), axis=0), 1.0)
            acc = tl.zeros((16, DIM), dtype=tl.float32)
            for part in tl.range(parts, loop_unroll_factor=4):
                from_part = slab + part
                part_top = tl.load(
                    stats_ptr + from_part * 2 * GROUP + group, mask=group < GROUP, other=0.0, cache_modifier=".cg"
                )
                part_acc = tl.load(
                    partial_ptr + from_part * GROUP * DIM + part_place, mask=live, other=0.0, cache_modifier=".cg"
                )
                acc += part_acc * tl.exp2(part_top - top)[:, None]
            tl.store(out_ptr + out_place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live)
            tl.store(counter_ptr + row * KV_HEADS + kv_head, 0)


class DecodeWorkspace:
    """Scratch for split contexts: room for ``max_parts`` parts of all rows and KV heads of a step."""

    def __init__(self, device: torch.device, *, max_rows: int, shape: HeadShape, max_parts: int) -> None:
        group = shape.num_heads // shape.num_kv_heads
        self.max_parts = max_parts
        self.partial = torch.empty(max_parts * group * shape.head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(max_parts * 2 * group, dtype=torch.float32, device=device)
        self.counter = torch.zeros(max_rows * shape.num_kv_heads, dtype=torch.int32, device=device)
        self.overlap = supports_overlap(device)

    def splits(self, rows: int, num_kv_heads: int) -> int:
        """How many parts a context may be cut into: enough programs for the whole device, no more."""
        return max(
            1, min(MAX_SPLITS, PROGRAMS_WANTED // (rows * num_kv_heads), self.max_parts // (rows * num_kv_heads))
        )


MAX_SPLITS = 64
PROGRAMS_WANTED = 528  # four for each of an H200's multiprocessors


def decode_attention(
    qkv: Tensor,
    batch: AttentionBatch,
    cache: LayerCache,
    shape: HeadShape,
    workspace: DecodeWorkspace,
    *,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    window: int | None,
    out: Tensor,
    splits: int | None = None,
    num_stages: int = 3,
    num_warps: int = 4,
) -> None:
    """Rotation, cache write and attention of rows that have one token each: qkv [rows, ...] -> out [rows, heads * dim]"""
    rows = qkv.shape[0]
    splits = splits or workspace.splits(rows, shape.num_kv_heads)
    group = shape.num_heads // shape.num_kv_heads
    assert group <= 16, "more than 16 query heads for a KV head"
    _decode[(rows, shape.num_kv_heads, splits)](
        qkv, batch.cos_sin, batch.q_scale, q_norm, k_norm, batch.table_rows, batch.block_tables, batch.positions,
        cache.k, cache.v, out, workspace.partial, workspace.stats, workspace.counter,
        batch.block_tables.shape[1], shape.head_dim**-0.5 * LOG2_E, eps, splits,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, HALF=shape.head_dim // 2, BLOCK_SIZE=cache.k.shape[2],
        GROUP=group, MAX_SPLITS=MAX_SPLITS, WINDOW=window or 0, NORM=q_norm is not None, LOGN=batch.q_scale is not None,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", STAGES=num_stages, PDL=workspace.overlap,
        num_warps=num_warps, **overlapping(workspace.overlap),
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "first_token"])
def _prefill(
    q_ptr,  # [tokens from first_token on, HEADS, DIM], rotated
    k_cache_ptr,  # [blocks, KV_HEADS, BLOCK_SIZE, DIM]
    v_cache_ptr,
    out_ptr,  # [all tokens, HEADS * DIM]
    row_starts_ptr,  # int32 [rows + 1]
    context_lens_ptr,  # int32 [rows]
    table_rows_ptr,  # int32 [rows]
    tables_ptr,
    table_width,
    scale,
    first_row,
    first_token,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of one row's new tokens for one head: online softmax over the row's blocks (arXiv 2205.14135)."""
    row = first_row + tl.program_id(2)
    head = tl.program_id(1)
    begin = tl.load(row_starts_ptr + row)
    count = tl.load(row_starts_ptr + row + 1) - begin
    # Later tiles see more keys and take longer: they go first, so that none of them is left over at the end.
    tile_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if tile_start >= count:
        return
    before = tl.load(context_lens_ptr + row) - count
    m = tile_start + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, DIM)
    live = (m < count)[:, None]
    place = ((begin + m).to(tl.int64) * HEADS + head)[:, None] * DIM + dim[None, :]
    q_place = place - first_token * HEADS * DIM
    q = tl.load(q_ptr + q_place, mask=live, other=0.0).to(k_cache_ptr.dtype.element_ty)
    position = before + m
    table = tables_ptr + tl.load(table_rows_ptr + row).to(tl.int64) * table_width
    kv_head = head // (HEADS // KV_HEADS)
    keys = tl.arange(0, BLOCK_SIZE)
    in_block = keys[:, None] * DIM + dim[None, :]
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
    last = before + tl.minimum(tile_start + BLOCK_M, count)  # keys up to the tile's last token
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(before + tile_start + 1 - WINDOW, 0) // BLOCK_SIZE
    whole = (before + tile_start + 1) // BLOCK_SIZE  # tiles that every token of the tile sees in full
    if WINDOW > 0:
        whole = first_tile
    for tile in tl.range(first_tile, whole, num_stages=STAGES):
        base = (tl.load(table + tile).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE * DIM
        k = tl.load(k_cache_ptr + base + in_block)
        v = tl.load(v_cache_ptr + base + in_block)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    for tile in tl.range(tl.maximum(whole, first_tile), tl.cdiv(last, BLOCK_SIZE), num_stages=1):
        base = (tl.load(table + tile).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE * DIM
        spot = tile * BLOCK_SIZE + keys
        k = tl.load(k_cache_ptr + base + in_block)
        v = tl.load(v_cache_ptr + base + in_block, mask=(spot < last)[:, None], other=0.0)
        seen = spot[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (spot[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # a window may hide a whole tile from a token
        fade = tl.exp2(top - safe_top)
        weights = tl.exp2(scores - safe_top[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live)


def prefill_attention(
    q: Tensor,
    batch: AttentionBatch,
    cache: LayerCache,
    shape: HeadShape,
    *,
    first_row: int,
    first_token: int,
    window: int | None,
    out: Tensor,
) -> None:
    """Rows from ``first_row`` on, of any number of tokens: q [their tokens, heads, dim] -> out [all tokens, ...]"""
    rows = batch.row_starts.shape[0] - 1 - first_row
    if rows <= 0:
        return
    block_m = 128 if batch.max_row_tokens >= 128 else max(16, triton.next_power_of_2(batch.max_row_tokens))
    _prefill[(triton.cdiv(batch.max_row_tokens, block_m), shape.num_heads, rows)](
        q, cache.k, cache.v, out, batch.row_starts, batch.context_lens, batch.table_rows, batch.block_tables,
        batch.block_tables.shape[1], shape.head_dim**-0.5 * LOG2_E, first_row, first_token,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim, BLOCK_SIZE=cache.k.shape[2],
        BLOCK_M=block_m, WINDOW=window or 0, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        STAGES=3, num_warps=8 if block_m >= 128 else 4,
    )  # fmt: skip
