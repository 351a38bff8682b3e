"""Attention of rows with one new token each: contexts split over programs, and everything around it fused."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import AttentionParts, HeadShape, LayerCache, StepTokens
from fastqwen.kernels.limits import DECODE_PARTS, DECODE_ROWS, decode_stages
from fastqwen.kernels.triton.cache_numbers import UNIT, bits_of, raised, spread, store_head
from fastqwen.kernels.triton.launch import card_of, overlapping, prefetch, supports_overlap
from fastqwen.kernels.triton.pointwise import normed_and_rotated, turn_of

LOG2_E = 1.4426950408889634


@triton.jit
def _load_tile(k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, home, keys, at, HALF: tl.constexpr,
               SCALED: tl.constexpr):  # fmt: skip
    """A block of one head, whose first line is ``home``: keys as two halves [BLOCK_SIZE, HALF], values
    [BLOCK_SIZE, 2 * HALF], and both's scales [BLOCK_SIZE]."""
    row = (home + keys)[:, None] * 2 * HALF
    k_low = tl.load(k_cache_ptr + row + at[None, :])
    k_high = tl.load(k_cache_ptr + row + HALF + at[None, :])
    v = tl.load(v_cache_ptr + row + tl.arange(0, 2 * HALF)[None, :])
    k_scale = keys.to(tl.float16)
    v_scale = k_scale
    if SCALED:
        k_scale = tl.load(k_scale_ptr + home + keys)
        v_scale = tl.load(v_scale_ptr + home + keys)
    return k_low, k_high, v, k_scale, v_scale


@triton.jit
def _add_tile(q_low, q_high, k_low, k_high, v, k_scale, v_scale, seen, scale, top, total, acc,
              PRECISION: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """Online softmax (arXiv 1805.02867): the maximum, the sum and the weighted values with one more tile in them."""
    if SCALED:
        k_low, k_high = raised(k_low, q_low.dtype), raised(k_high, q_low.dtype)
    scores = tl.dot(q_low, tl.trans(k_low.to(q_low.dtype)), input_precision=PRECISION)
    scores = tl.dot(q_high, tl.trans(k_high.to(q_high.dtype)), scores, input_precision=PRECISION) * scale
    if SCALED:
        scores *= (k_scale.to(tl.float32) * UNIT)[None, :]
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    fade = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top[:, None])
    total = total * fade + tl.sum(weights, axis=1)
    # Beyond the context a block may hold anything, even NaN; 8-bit numbers are finite, their scales need not be.
    if SCALED:
        v = raised(v, q_low.dtype)
        weights *= tl.where(seen, v_scale.to(tl.float32) * UNIT, 0.0)[None, :]
    else:
        v = tl.where(seen[:, None], v.to(q_low.dtype), 0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _combine(partial_ptr, stats_ptr, out_ptr, slab, parts, GROUP: tl.constexpr, GROUP_2: tl.constexpr,
             DIM: tl.constexpr, MAX_SPLITS: tl.constexpr):  # fmt: skip
    """Add the parts of a context up, in their order, as many at a time as registers hold."""
    group = tl.arange(0, GROUP_2)
    wide = tl.arange(0, DIM)
    every = tl.arange(0, MAX_SPLITS)
    given = (every < parts)[:, None] & (group < GROUP)[None, :]
    place = (slab + every)[:, None] * 2 * GROUP + group[None, :]
    top = tl.max(tl.load(stats_ptr + place, mask=given, other=float("-inf"), cache_modifier=".cg"), axis=0)
    top = tl.where(group < GROUP, top, 0.0)
    total = tl.zeros((GROUP_2,), dtype=tl.float32)
    acc = tl.zeros((GROUP_2, DIM), dtype=tl.float32)
    AT_ONCE: tl.constexpr = min(MAX_SPLITS, max(1, 8192 // (GROUP_2 * DIM)))
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        here = (part < parts)[:, None] & (group < GROUP)[None, :]
        spot = (slab + part)[:, None] * 2 * GROUP + group[None, :]
        tops = tl.load(stats_ptr + spot, mask=here, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(stats_ptr + spot + GROUP, mask=here, other=0.0, cache_modifier=".cg")
        vector = (slab + part)[:, None, None] * GROUP * DIM + group[None, :, None] * DIM + wide[None, None, :]
        vectors = tl.load(partial_ptr + vector, mask=here[:, :, None], other=0.0, cache_modifier=".cg")
        weights = tl.exp2(tops - top[None, :])
        total += tl.sum(sums * weights, axis=0)
        acc += tl.sum(vectors * weights[:, :, None], axis=0)
    found = acc / tl.where(group < GROUP, total, 1.0)[:, None]
    home = group[:, None] * DIM + wide[None, :]
    tl.store(out_ptr + home, found.to(out_ptr.dtype.element_ty), mask=(group < GROUP)[:, None])


@triton.jit
def _query(qkv, kv_head, cos, sin, stretch_ptr, row, norm_ptr, eps, HALF: tl.constexpr, ROTARY: tl.constexpr,
           GROUP: tl.constexpr, NORM: tl.constexpr, LOGN: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """A row's query heads for one key head, normalised, rotated and, with logN, stretched: two halves [16, HALF]."""
    group = tl.arange(0, 16)
    live = (group < GROUP)[:, None]
    place = (kv_head * GROUP + group)[:, None] * 2 * HALF + tl.arange(0, HALF)[None, :]
    low, high = normed_and_rotated(qkv, place, live, norm_ptr, cos, sin, eps, HALF, ROTARY, NORM)
    if LOGN:
        stretch = tl.load(stretch_ptr + row)
        low *= stretch
        high *= stretch
    if SCALED:
        low, high = spread(low, high, HALF)
    return low.to(qkv.dtype.element_ty), high.to(qkv.dtype.element_ty)


@triton.jit
def _store_new_token(k, v, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, home, cos, sin, norm_ptr, eps,
                     HALF: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """The new token's key, normalised and rotated, and its value go to line ``home`` of the cache. Returned as they are
    there, in float32: the key's halves [1, HALF], the value [2 * HALF]."""
    at = tl.arange(0, HALF)
    place = tl.arange(0, 1)[:, None] + at[None, :]
    low, high = normed_and_rotated(k, place, True, norm_ptr, cos, sin, eps, HALF, ROTARY, NORM)
    if SCALED:
        low, high = spread(low, high, HALF)
    v_low = tl.load(v + place).to(tl.float32)
    v_high = tl.load(v + HALF + place).to(tl.float32)
    line = tl.arange(0, 1) * 0 + home
    low, high = store_head(k_cache_ptr, k_scale_ptr, line, low, high, True, HALF, SCALED)
    v_low, v_high = store_head(v_cache_ptr, v_scale_ptr, line, v_low, v_high, True, HALF, SCALED)
    value = tl.join(v_low, v_high).permute(0, 2, 1).reshape(2 * HALF)
    return low, high, value


@triton.jit(do_not_specialize=["splits"])
def _decode(
    qkv_ptr,  # [rows, WIDTH]
    cos_sin_ptr,  # float32 [rows, ROTARY]
    q_scale_ptr,  # float32 [rows]
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,  # int32 [rows]
    tables_ptr,  # int32 [slots, table_width]
    positions_ptr,  # int32 [rows]
    count_ptr,  # int32 [1], if COUNTED: how many of the rows there are
    k_cache_ptr,  # [blocks, KV_HEADS, BLOCK_SIZE, 2 * HALF]
    v_cache_ptr,
    k_scale_ptr,  # float16 [blocks, KV_HEADS, BLOCK_SIZE], if SCALED
    v_scale_ptr,
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
    ROTARY: tl.constexpr,
    WIDTH: tl.constexpr,  # from one row's numbers to the next one's
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_2: tl.constexpr,  # the next power of two
    MAX_SPLITS: tl.constexpr,  # a power of two, at least splits
    WINDOW: tl.constexpr,
    NORM: tl.constexpr,
    LOGN: tl.constexpr,
    COUNTED: tl.constexpr,
    SCALED: tl.constexpr,
    HOLD: tl.constexpr,  # load the first tile into registers before the kernel in front has ended
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One new token per row. A program has one KV head, all of its query heads, and one part of the context.

    The last part also normalises, rotates and stores the new token's key and value, which it takes from registers: what
    is read from the cache are older tokens, so those loads need not wait for the kernel in front. The last program of a
    row's head adds the parts up.
    """
    kv_head = tl.program_id(0)
    row = tl.program_id(1)
    split = tl.program_id(2)
    DIM: tl.constexpr = 2 * HALF
    if PDL:
        gdc_launch_dependents()
    if COUNTED:  # noqa: SIM102 (the second condition needs the pointer that the first one promises)
        if row >= tl.load(count_ptr):
            if PDL:
                gdc_wait()  # or this kernel could end, and the next one begin, before the one in front has ended
            return
    position = tl.load(positions_ptr + row)
    first_tile = 0
    if WINDOW > 0:
        first_tile = tl.maximum(position + 1 - WINDOW, 0) // BLOCK_SIZE
    num_tiles = tl.maximum(tl.cdiv(position, BLOCK_SIZE) - first_tile, 0)  # of older tokens
    per_split = tl.maximum(tl.cdiv(num_tiles, splits), 1)
    parts = tl.maximum(tl.cdiv(num_tiles, per_split), 1)
    if split >= parts:
        return
    start = first_tile + split * per_split
    stop = first_tile + tl.minimum((split + 1) * per_split, num_tiles)

    at = tl.arange(0, HALF)
    wide = tl.arange(0, DIM)
    keys = tl.arange(0, BLOCK_SIZE)
    table = tables_ptr + tl.load(slots_ptr + row).to(tl.int64) * table_width
    if HOLD:
        home = (tl.load(table + start).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE
        held_k_low, held_k_high, held_v, held_k_scale, held_v_scale = _load_tile(
            k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, home, keys, at, HALF, SCALED
        )
    elif PDL:
        base = (tl.load(table + start).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE * DIM
        lines = tl.arange(0, BLOCK_SIZE * DIM * k_cache_ptr.dtype.element_ty.primitive_bitwidth // 1024)
        step: tl.constexpr = 1024 // k_cache_ptr.dtype.element_ty.primitive_bitwidth
        prefetch(k_cache_ptr + base + lines * step)
        prefetch(v_cache_ptr + base + lines * step)
    if PDL:
        gdc_wait()
    cos, sin = turn_of(cos_sin_ptr + row * ROTARY, HALF, ROTARY)
    qkv = qkv_ptr + row.to(tl.int64) * WIDTH
    q_low, q_high = _query(
        qkv, kv_head, cos, sin, q_scale_ptr, row, q_norm_ptr, eps, HALF, ROTARY, GROUP, NORM, LOGN, SCALED
    )

    top = tl.full((16,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((16,), dtype=tl.float32)
    acc = tl.zeros((16, DIM), dtype=tl.float32)
    if split == parts - 1:
        block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        home = (block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
        k, v = qkv + (HEADS + kv_head) * DIM, qkv + (HEADS + KV_HEADS + kv_head) * DIM
        k_low, k_high, v_new = _store_new_token(
            k, v, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, home, cos, sin, k_norm_ptr, eps,
            HALF, ROTARY, NORM, SCALED,
        )  # fmt: skip
        products = q_low.to(tl.float32) * k_low + q_high.to(tl.float32) * k_high
        top = tl.sum(products, axis=1) * scale
        total += 1.0
        acc += v_new[None, :]

    if HOLD:
        seen = start * BLOCK_SIZE + keys < position
        if WINDOW > 0:
            seen = seen & (start * BLOCK_SIZE + keys > position - WINDOW)
        top, total, acc = _add_tile(
            q_low, q_high, held_k_low, held_k_high, held_v, held_k_scale, held_v_scale, seen, scale, top, total, acc,
            PRECISION, SCALED,
        )  # fmt: skip
        start += 1
    for tile in tl.range(start, stop, num_stages=STAGES):
        home = (tl.load(table + tile).to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE
        k_low_t, k_high_t, v, k_scale, v_scale = _load_tile(
            k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, home, keys, at, HALF, SCALED
        )
        seen = tile * BLOCK_SIZE + keys < position
        if WINDOW > 0:
            seen = seen & (tile * BLOCK_SIZE + keys > position - WINDOW)
        top, total, acc = _add_tile(
            q_low, q_high, k_low_t, k_high_t, v, k_scale, v_scale, seen, scale, top, total, acc, PRECISION, SCALED
        )

    group = tl.arange(0, 16)
    live = (group < GROUP)[:, None]
    out_row = out_ptr + (row.to(tl.int64) * HEADS + kv_head * GROUP) * DIM
    part_place = group[:, None] * DIM + wide[None, :]
    if parts == 1:
        tl.store(out_row + part_place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live)
    else:
        slab = (row.to(tl.int64) * KV_HEADS + kv_head) * splits
        mine = slab + split
        tl.store(partial_ptr + mine * GROUP * DIM + part_place, acc, mask=live)
        tl.store(stats_ptr + mine * 2 * GROUP + group, top, mask=group < GROUP)
        tl.store(stats_ptr + mine * 2 * GROUP + GROUP + group, total, mask=group < GROUP)
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + row * KV_HEADS + kv_head, 1, sem="acq_rel")
        if arrived == parts - 1:
            tl.debug_barrier()
            _combine(partial_ptr, stats_ptr, out_row, slab, parts, GROUP, GROUP_2, DIM, MAX_SPLITS)
            tl.store(counter_ptr + row * KV_HEADS + kv_head, 0)


class DecodeWorkspace:
    """Scratch for split contexts: room for ``max_parts`` parts of all rows and KV heads of a step."""

    def __init__(
        self, device: torch.device, *, shape: HeadShape, max_rows: int = DECODE_ROWS, max_parts: int = DECODE_PARTS
    ) -> None:
        self.max_parts = max_parts
        self.partial = torch.empty(max_parts * shape.group * shape.head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(max_parts * 2 * shape.group, dtype=torch.float32, device=device)
        self.counter = torch.zeros(max_rows * shape.num_kv_heads, dtype=torch.int32, device=device)
        self.overlap = supports_overlap(device)
        self.programs_wanted = PROGRAMS_EACH * card_of(device).multiprocessors

    def splits(self, rows: int, num_kv_heads: int) -> tuple[int, bool]:
        """How many parts a context may be cut into, and whether a program holds its first tile in registers.

        Such programs need twice the registers: so many that all run at once, two on a multiprocessor, are fastest; of the
        others four (bench/results/h200-tune-attention.json). A power of two, so that few variants are compiled.
        """
        pairs = rows * num_kv_heads
        hold = pairs * 4 <= self.programs_wanted // 2
        wanted = (self.programs_wanted // 2 if hold else self.programs_wanted) // pairs
        return int(2 ** math.floor(math.log2(max(1, min(MAX_SPLITS, wanted, self.max_parts // pairs))))), hold


MAX_SPLITS = 64
RECORDED_SPLITS = 8
PROGRAMS_EACH = 4  # wanted for each multiprocessor


def expected_rows(rows: int, step: StepTokens) -> int:
    """Of a recorded step's rows most are not there: more parts for those that are cost little."""
    return rows if step.decode_count is None else -(-rows // RECORDED_SPLITS)


def decode_attention(
    qkv: Tensor,
    step: StepTokens,
    cache: LayerCache,
    parts: AttentionParts,
    workspace: DecodeWorkspace,
    *,
    out: Tensor,
    splits: int | None = None,
    hold: bool = False,
) -> None:
    """Rotation, cache write and attention of rows that have one token each: qkv [rows, ...] -> out [rows, heads * dim]"""
    rows, shape = qkv.shape[0], parts.shape
    if splits is None:
        splits, hold = workspace.splits(expected_rows(rows, step), shape.num_kv_heads)
        splits = min(splits, workspace.max_parts // (rows * shape.num_kv_heads) or 1)
    assert shape.group <= 16, "more than 16 query heads for a KV head"
    pdl, counted = workspace.overlap, step.decode_count is not None
    block_size, card = cache.k.shape[2], card_of(qkv.device)
    stages = decode_stages(block_size, shape.head_dim, cache.k.element_size(), card.shared_bytes)
    _decode[(shape.num_kv_heads, rows, splits)](
        qkv, step.cos_sin, step.q_scale, parts.q_norm, parts.k_norm, step.slots, step.block_tables, step.positions,
        step.decode_count, bits_of(cache.k), bits_of(cache.v), cache.k_scale, cache.v_scale, out,
        workspace.partial, workspace.stats, workspace.counter,
        step.block_tables.shape[1], shape.head_dim**-0.5 * LOG2_E, parts.eps, splits,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, HALF=shape.head_dim // 2, ROTARY=shape.rotary_dim,
        WIDTH=qkv.stride(0), BLOCK_SIZE=block_size, GROUP=shape.group, GROUP_2=triton.next_power_of_2(shape.group),
        MAX_SPLITS=triton.next_power_of_2(splits), WINDOW=parts.window or 0, NORM=parts.q_norm is not None,
        LOGN=step.q_scale is not None, COUNTED=counted, SCALED=cache.k_scale is not None, HOLD=hold,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32", STAGES=stages, PDL=pdl, num_warps=4, **overlapping(pdl),
    )  # fmt: skip
