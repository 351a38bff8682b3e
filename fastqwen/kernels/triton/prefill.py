"""Attention of prompts, or parts of them, over the paged cache: a program has a tile of one row's new tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqwen.kernels import AttentionParts, LayerCache, StepTokens
from fastqwen.kernels.limits import TILE_TOKENS
from fastqwen.kernels.triton.attention import LOG2_E
from fastqwen.kernels.triton.cache_numbers import UNIT, bits_of, raised
from fastqwen.kernels.triton.launch import Card, card_of, stages_that_fit
from fastqwen.kernels.triton.workspace import Workspace

LEAST_KEYS = 512  # of a part of a context: the parts have to be added up
MOST_SPLITS = 16
LARGE_SHARED_BYTES = 160 * 1024  # what an A100 and Hopper have; an RTX 3090 or 5090 has 99 KiB


@triton.jit
def _add_keys(q, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, table, kv_head, first, last, position, scale, top,
              total, acc, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
              MASKED: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, SCALED: tl.constexpr):  # fmt: skip
    """Online softmax (arXiv 1805.02867) with keys ``first`` to ``first + KEYS`` in it; MASKED: not every token sees all."""
    spot = first + tl.arange(0, KEYS)
    there = spot
    if MASKED:
        there = tl.minimum(spot, last - 1)  # the table behind the end may say anything
    block = tl.load(table + there // BLOCK_SIZE).to(tl.int64)
    lines = (block * KV_HEADS + kv_head) * BLOCK_SIZE + there % BLOCK_SIZE
    place = lines[:, None] * DIM + tl.arange(0, DIM)[None, :]
    k = tl.load(k_cache_ptr + place)
    if SCALED:
        k = raised(k, q.dtype)
    scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION) * scale
    if SCALED:
        scores *= (tl.load(k_scale_ptr + lines).to(tl.float32) * UNIT)[None, :]
    if MASKED:
        seen = spot[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (spot[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        v = tl.load(v_cache_ptr + place, mask=(spot < last)[:, None], other=0.0)  # behind the end may be anything
    else:
        v = tl.load(v_cache_ptr + place)
    v = raised(v, q.dtype) if SCALED else v.to(q.dtype)
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    floor = new_top
    if WINDOW > 0:
        floor = tl.where(new_top == float("-inf"), 0.0, new_top)  # a window may hide a whole tile from a token
    fade = tl.exp2(top - floor)
    weights = tl.exp2(scores - floor[:, None])
    total = total * fade + tl.sum(weights, axis=1)
    if SCALED:
        v_scale = tl.load(v_scale_ptr + lines, mask=spot < last, other=0.0)
        weights *= (v_scale.to(tl.float32) * UNIT)[None, :]
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def _add_parts_up(partial_ptr, stats_ptr, slab, parts, out_ptr, place, live, BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    """A tile whose context was split, in the parts' order."""
    m = tl.arange(0, BLOCK_M)
    square = m[:, None] * DIM + tl.arange(0, DIM)[None, :]
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
    for part in range(parts):
        stats = stats_ptr + (slab + part) * 2 * BLOCK_M + m
        own_top = tl.load(stats, cache_modifier=".cg")
        new_top = tl.maximum(top, own_top)
        floor = tl.where(new_top == float("-inf"), 0.0, new_top)  # a window may hide a whole part from a token
        fade, weight = tl.exp2(top - floor), tl.exp2(own_top - floor)
        own = tl.load(partial_ptr + (slab + part) * BLOCK_M * DIM + square, cache_modifier=".cg")
        total = total * fade + tl.load(stats + BLOCK_M, cache_modifier=".cg") * weight
        acc = acc * fade[:, None] + own * weight[:, None]
        top = new_top
    tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["splits"])
def _prefill(
    q_ptr,  # [tokens, HEADS, DIM], rotated
    k_cache_ptr,  # [blocks, KV_HEADS, BLOCK_SIZE, DIM]
    v_cache_ptr,
    k_scale_ptr,  # float16 [blocks, KV_HEADS, BLOCK_SIZE], if SCALED
    v_scale_ptr,
    out_ptr,  # [tokens, HEADS * DIM]
    tiles_ptr,  # int32 [tiles, 4]: first token, tokens, first position, slot
    tables_ptr,
    partial_ptr,  # float32 [tiles, HEADS, splits, BLOCK_M, DIM], if SPLIT
    stats_ptr,  # float32 [tiles, HEADS, splits, 2, BLOCK_M]: maxima (base 2) and sums
    counter_ptr,  # int32 [tiles, HEADS], zero before and after
    table_width,
    scale,
    splits,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,  # looked at together
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT: tl.constexpr,
    LEAST: tl.constexpr,  # keys of a part, if there are as many
    STAGES: tl.constexpr,
):
    """One head of a tile (arXiv 2205.14135), and if SPLIT one of at most ``splits`` parts of its context."""
    tile_ptr = tiles_ptr + tl.program_id(1) * 4
    head = tl.program_id(0)
    count = tl.load(tile_ptr + 1)
    if count == 0:
        return
    begin = tl.load(tile_ptr)
    before = tl.load(tile_ptr + 2)
    m = tl.arange(0, BLOCK_M)
    live = (m < count)[:, None]
    place = ((begin + m).to(tl.int64) * HEADS + head)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    q = tl.load(q_ptr + place, mask=live, other=0.0)
    position = before + m
    table = tables_ptr + tl.load(tile_ptr + 3).to(tl.int64) * table_width
    kv_head = head // (HEADS // KV_HEADS)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, DIM), dtype=tl.float32)
    last = before + count  # keys up to the tile's last token
    first = 0
    whole = (before + 1) // KEYS * KEYS  # keys that every token of the tile sees
    if WINDOW > 0:
        first = tl.maximum(before + 1 - WINDOW, 0) // KEYS * KEYS
        whole = first
    stop, parts = last, 1
    if SPLIT:
        num_chunks = tl.cdiv(last - first, KEYS)
        per_split = tl.maximum(tl.cdiv(num_chunks, splits), LEAST // KEYS)
        parts = tl.cdiv(num_chunks, per_split)
        if tl.program_id(2) >= parts:
            return
        first += tl.program_id(2) * per_split * KEYS
        stop = tl.minimum(first + per_split * KEYS, last)
        whole = tl.minimum(tl.maximum(whole, first), stop)
    for at in tl.range(first, whole, KEYS, num_stages=STAGES):
        top, total, acc = _add_keys(
            q, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, table, kv_head, at, last, position, scale, top, total, acc,
            KV_HEADS, DIM, BLOCK_SIZE, KEYS, False, WINDOW, PRECISION, SCALED,
        )  # fmt: skip
    for at in tl.range(whole, stop, KEYS, num_stages=1):
        top, total, acc = _add_keys(
            q, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, table, kv_head, at, last, position, scale, top, total, acc,
            KV_HEADS, DIM, BLOCK_SIZE, KEYS, True, WINDOW, PRECISION, SCALED,
        )  # fmt: skip
    if parts == 1:
        tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=live)
    elif SPLIT:
        own = tl.program_id(1) * HEADS + head
        slab = own.to(tl.int64) * splits
        mine = slab + tl.program_id(2)
        tl.store(partial_ptr + mine * BLOCK_M * DIM + m[:, None] * DIM + tl.arange(0, DIM)[None, :], acc)
        tl.store(stats_ptr + mine * 2 * BLOCK_M + m, top)
        tl.store(stats_ptr + mine * 2 * BLOCK_M + BLOCK_M + m, total)
        tl.debug_barrier()
        if tl.atomic_add(counter_ptr + own, 1, sem="acq_rel") == parts - 1:
            tl.debug_barrier()
            _add_parts_up(partial_ptr, stats_ptr, slab, parts, out_ptr, place, live, BLOCK_M, DIM)
            tl.store(counter_ptr + own, 0)


@dataclass(frozen=True)
class PrefillTiling:
    keys: int
    num_warps: int
    num_stages: int


def prefill_tiling(head_dim: int, element_bytes: int, card: Card) -> PrefillTiling:
    """What was fastest on an H200 (bench/results/h200-prompts.json), with fewer keys on cards with less shared memory. It
    holds the stages' keys and values, and of float32, which tensor cores do not take, the tile's queries as well."""
    if not card.has_dots:
        return PrefillTiling(16, 8, 1)
    # Of heads wider than 128, registers hold the sums beside 64 keys only where tensor cores read from shared memory.
    many = card.shared_bytes >= LARGE_SHARED_BYTES and (head_dim <= 128 or card.capability >= (9, 0))
    keys = 64 if many else 32
    if element_bytes == 2:
        return PrefillTiling(keys, 4, stages_that_fit(3 if head_dim <= 128 else 2, 4 * keys * head_dim, card))
    queries = 4 * TILE_TOKENS * head_dim
    while keys > 16 and queries + keys * (8 * head_dim + 260) > card.shared_bytes:
        keys //= 2
    stages = stages_that_fit(2, 8 * keys * head_dim, replace(card, shared_bytes=card.shared_bytes - queries))
    return PrefillTiling(keys, 4, stages)


def splits_wanted(programs: int, head_dim: int, card: Card) -> int:
    """Into how many parts the contexts of few tiles are cut: a conversation's next turn is a tile or two behind many thousand
    tokens, which a few multiprocessors would pass alone."""
    at_once = card.multiprocessors * (2 if head_dim <= 128 else 1)
    return max(1, min(MOST_SPLITS, at_once // programs))


def prefill_attention(
    q: Tensor,
    step: StepTokens,
    cache: LayerCache,
    parts: AttentionParts,
    workspace: Workspace,
    *,
    out: Tensor,
    tiling: PrefillTiling | None = None,
) -> None:
    """The step's tiles: q [tokens, heads, dim] -> out [tokens, heads * dim]; other tokens are not touched."""
    assert step.prompts is not None
    tiles, height, shape = step.prompts.tiles, step.prompts.height, parts.shape
    programs = tiles.shape[0] * shape.num_heads
    if not programs:
        return
    t = tiling or prefill_tiling(shape.head_dim, q.element_size(), card_of(q.device))
    splits = splits_wanted(programs, shape.head_dim, card_of(q.device))
    split = splits > 1
    partial = stats = None
    if split:
        partial = q.new_empty(programs * splits * height * shape.head_dim, dtype=torch.float32)
        stats = q.new_empty(programs * splits * 2 * height, dtype=torch.float32)
    _prefill[(shape.num_heads, tiles.shape[0], splits)](
        q, bits_of(cache.k), bits_of(cache.v), cache.k_scale, cache.v_scale, out, tiles, step.block_tables,
        partial, stats, workspace.counter if split else None, step.block_tables.shape[1], shape.head_dim**-0.5 * LOG2_E, splits,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim, BLOCK_SIZE=cache.k.shape[2],
        BLOCK_M=height, KEYS=t.keys, WINDOW=parts.window or 0, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        SCALED=cache.k_scale is not None, SPLIT=split, LEAST=max(t.keys, LEAST_KEYS), STAGES=t.num_stages, num_warps=t.num_warps,
    )  # fmt: skip
