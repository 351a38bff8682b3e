"""Attention of rows with one new token each over a cache of 8-bit numbers, for few query heads to a key head, in Gluon for
Hopper.

Tensor cores take 16 bits from shared memory, where streamed_narrow.py puts each number, with three barriers a tile; they earn
that where many heads share the numbers. For one to four heads ordinary arithmetic is enough: a few lanes hold one key,
raise it and multiply it where it is. Each such group of lanes, a part, has keys, values, maximum and sum of its own, so that
nothing waits for anything but memory until all parts are added up at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import AttentionParts, HeadShape, LayerCache, StepTokens
from fastqwen.kernels.triton import streamed_narrow
from fastqwen.kernels.triton.attention import LOG2_E, DecodeWorkspace, expected_rows
from fastqwen.kernels.triton.cache_numbers import UNIT, bits_of
from fastqwen.kernels.triton.launch import overlapping
from fastqwen.kernels.triton.streamed_attention import DecodeTiling, rotated, write
from fastqwen.kernels.triton.streamed_narrow import numbers_of, spread_heads, store_new_head

MOST_HEADS = 1  # to one key head: four need so many registers that tensor cores are faster
LANE_NUMBERS = gl.constexpr(16)  # of a key in one lane: 16 bytes, one load


@gluon.jit
def _lines(table, kv_head, first, position, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, PARTS: gl.constexpr,
           FLAT: gl.constexpr):  # fmt: skip
    """The cache's lines of the tokens from ``first`` on, one for each part; behind the last token its block again."""
    token = first + gl.arange(0, PARTS, layout=gl.SliceLayout(1, FLAT))
    block = gl.load(table + gl.minimum(token, position) // BLOCK_SIZE)
    return (block * KV_HEADS + kv_head) * BLOCK_SIZE + token % BLOCK_SIZE


@gluon.jit
def _four_lines(table, kv_head, first, position, KV_HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr,
                PARTS: gl.constexpr, FLAT: gl.constexpr):  # fmt: skip
    """Those of four keys of each part."""
    return (
        _lines(table, kv_head, first, position, KV_HEADS, BLOCK_SIZE, PARTS, FLAT),
        _lines(table, kv_head, first + PARTS, position, KV_HEADS, BLOCK_SIZE, PARTS, FLAT),
        _lines(table, kv_head, first + 2 * PARTS, position, KV_HEADS, BLOCK_SIZE, PARTS, FLAT),
        _lines(table, kv_head, first + 3 * PARTS, position, KV_HEADS, BLOCK_SIZE, PARTS, FLAT),
    )


@gluon.jit
def _ask(cache_ptr, scale_ptr, line, first, last, DIM: gl.constexpr, PARTS: gl.constexpr, FLAT: gl.constexpr):
    """A key, or a value, for each part, four numbers to a word [PARTS, DIM / 4], and their scales times UNIT; zeros from the
    token ``last`` on, where a block may hold anything."""
    words_ptr = cache_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    word = gl.arange(0, DIM // 4, layout=gl.SliceLayout(0, FLAT))
    live = first + gl.arange(0, PARTS, layout=gl.SliceLayout(1, FLAT)) < last
    place = words_ptr + line.to(gl.int64)[:, None] * (DIM // 4) + word[None, :]
    words = gl.load(place, mask=live[:, None], other=0)
    return words, gl.load(scale_ptr + line, mask=live, other=0.0).to(gl.float32) * UNIT


@gluon.jit
def _ask_four(cache_ptr, scale_ptr, lines, first, last, DIM: gl.constexpr, PARTS: gl.constexpr, FLAT: gl.constexpr):
    """All on their way at once."""
    return (
        _ask(cache_ptr, scale_ptr, lines[0], first, last, DIM, PARTS, FLAT),
        _ask(cache_ptr, scale_ptr, lines[1], first + PARTS, last, DIM, PARTS, FLAT),
        _ask(cache_ptr, scale_ptr, lines[2], first + 2 * PARTS, last, DIM, PARTS, FLAT),
        _ask(cache_ptr, scale_ptr, lines[3], first + 3 * PARTS, last, DIM, PARTS, FLAT),
    )


@gluon.jit
def _score(q, asked, first, position, scale, kind: gl.constexpr, PARTS: gl.constexpr, WINDOW: gl.constexpr,
           CUBE: gl.constexpr):  # fmt: skip
    """Of one key of each part with all heads, base 2: [heads, parts]"""
    side: gl.constexpr = gl.SliceLayout(0, CUBE)
    words, unit = asked
    k = gl.convert_layout(numbers_of(words, kind, gl.float32), side)
    score = gl.sum(q * gl.expand_dims(k, 0), axis=2)
    part: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, CUBE))
    token = first + gl.arange(0, PARTS, layout=part)
    seen = token < position
    if WINDOW > 0:
        seen = seen & (token > position - WINDOW)
    return gl.where(seen[None, :], score * (gl.convert_layout(unit, part) * scale)[None, :], float("-inf"))


@gluon.jit
def _add(acc, total, score, safe, asked, kind: gl.constexpr, CUBE: gl.constexpr):
    """One value of each part, weighted: acc [heads, parts, DIM], total and score [heads, parts]"""
    words, unit = asked
    weight = gl.exp2(score - safe)
    v = gl.convert_layout(numbers_of(words, kind, gl.float32), gl.SliceLayout(0, CUBE))
    own = weight * gl.convert_layout(unit, gl.SliceLayout(0, gl.SliceLayout(2, CUBE)))[None, :]
    return acc + gl.expand_dims(own, 2) * gl.expand_dims(v, 0), total + weight


@gluon.jit
def _of_first_rows(x, HEADS: gl.constexpr):
    """The first HEADS rows of x [rows, ...]."""
    ROWS: gl.constexpr = x.shape[0]
    if len(x.shape) == 1:
        wide = x.reshape([ROWS // HEADS, HEADS])
        row = gl.arange(0, ROWS // HEADS, layout=gl.SliceLayout(1, wide.type.layout))
        return gl.sum(gl.where((row == 0)[:, None], wide, 0.0), axis=0)
    else:
        deep = x.reshape([ROWS // HEADS, HEADS, x.shape[1]])
        row = gl.arange(0, ROWS // HEADS, layout=gl.SliceLayout(1, gl.SliceLayout(2, deep.type.layout)))
        return gl.sum(gl.where(gl.expand_dims((row == 0)[:, None], 2), deep, 0.0), axis=0)


@gluon.jit
def _add_parts_up(acc, top, total, ROWS: gl.constexpr, OUT: gl.constexpr):
    """acc [heads, parts, DIM], top and total [heads, parts] -> [DIM, ROWS], [ROWS], [ROWS], heads again and again."""
    HEADS: gl.constexpr = acc.shape[0]
    DIM: gl.constexpr = acc.shape[2]
    best = gl.max(top, axis=1)
    fade = gl.exp2(top - gl.where(best == float("-inf"), 0.0, best)[:, None])
    sums = gl.sum(acc * gl.expand_dims(fade, 2), axis=1)
    total = gl.sum(total * fade, axis=1)
    flat: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [4, 1, 1], [2, 1, 0])
    thin: gl.constexpr = gl.SliceLayout(2, flat)
    column: gl.constexpr = gl.SliceLayout(0, OUT)
    sums = gl.convert_layout(sums, gl.SliceLayout(0, flat))
    sums = (gl.zeros((ROWS // HEADS, HEADS, DIM), gl.float32, flat) + gl.expand_dims(sums, 0)).reshape([ROWS, DIM])
    found = gl.convert_layout(gl.permute(sums, (1, 0)), OUT)
    nothing = gl.zeros((ROWS // HEADS, HEADS), gl.float32, thin)
    best = (nothing + gl.convert_layout(best, gl.SliceLayout(0, thin))[None, :]).reshape([ROWS])
    total = (nothing + gl.convert_layout(total, gl.SliceLayout(0, thin))[None, :]).reshape([ROWS])
    return found, gl.convert_layout(best, column), gl.convert_layout(total, column)


@gluon.jit(do_not_specialize=["splits"])
def _decode_scalar(
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
    GROUP_2: gl.constexpr,  # the next power of two
    WINDOW: gl.constexpr,
    NORM: gl.constexpr,
    LOGN: gl.constexpr,
    COUNTED: gl.constexpr,
    PDL: gl.constexpr,
):
    """A program has one KV head, its query heads, and one stretch of the context; the last has the new token as well."""
    kv_head = gl.program_id(0)
    row = gl.program_id(1)
    split = gl.program_id(2)
    ROWS: gl.constexpr = 8  # of heads while they are rotated and written
    LANES: gl.constexpr = DIM // LANE_NUMBERS
    PARTS: gl.constexpr = 128 // LANES
    KEYS: gl.constexpr = 4 * PARTS  # looked at together, while as many are on their way
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
    stretches = gl.maximum(gl.cdiv(num_chunks, per_split), 1)
    if split >= stretches:
        return
    begin = (first_chunk + split * per_split) * KEYS
    stop = (first_chunk + gl.minimum((split + 1) * per_split, num_chunks)) * KEYS
    last = gl.minimum(position, stop)

    cube: gl.constexpr = gl.BlockedLayout([GROUP_2, 1, LANE_NUMBERS], [1, 32 // LANES, LANES], [1, 4, 1], [2, 1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, LANE_NUMBERS // 4], [32 // LANES, LANES], [4, 1], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    pairs: gl.constexpr = gl.SliceLayout(2, cube)
    table = tables_ptr + gl.load(slots_ptr + row).to(gl.int64) * table_width
    lines = _four_lines(table, kv_head, begin, position, KV_HEADS, BLOCK_SIZE, PARTS, flat)
    ks = _ask_four(k_cache_ptr, k_scale_ptr, lines, begin, last, DIM, PARTS, flat)
    vs = _ask_four(v_cache_ptr, v_scale_ptr, lines, begin, last, DIM, PARTS, flat)
    lines = _four_lines(table, kv_head, begin + KEYS, position, KV_HEADS, BLOCK_SIZE, PARTS, flat)
    if PDL:
        gdc_wait()

    head = gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
    dim = gl.arange(0, DIM, layout=gl.SliceLayout(0, wide))
    qkv = qkv_ptr + row.to(gl.int64) * WIDTH
    cos_sin = cos_sin_ptr + row * DIM
    q = rotated(qkv + kv_head * GROUP * DIM, q_norm_ptr, cos_sin, head * DIM, dim, head < GROUP, eps, DIM, NORM)
    if LOGN:
        q *= gl.load(q_scale_ptr + row)
    q = spread_heads(q, dim, DIM, wide)
    queries = gl.expand_dims(gl.convert_layout(_of_first_rows(q, GROUP_2), gl.SliceLayout(1, cube)), 1)

    top = gl.full((GROUP_2, PARTS), float("-inf"), gl.float32, pairs)
    total = gl.zeros((GROUP_2, PARTS), gl.float32, pairs)
    acc = gl.zeros((GROUP_2, PARTS, DIM), gl.float32, cube)
    if split == stretches - 1:
        block = gl.load(table + position // BLOCK_SIZE).to(gl.int64)
        line = (block * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
        new = qkv + (HEADS + kv_head) * DIM  # the same in every row, so that it stands where the queries do
        new_k = rotated(new, k_norm_ptr, cos_sin, head * 0, dim, head >= 0, eps, DIM, NORM)
        new_k = store_new_head(spread_heads(new_k, dim, DIM, wide), k_cache_ptr, k_scale_ptr, line, head, dim, DIM)
        new_v = gl.load(new + KV_HEADS * DIM + dim[None, :] + head[:, None] * 0).to(gl.float32)
        new_v = store_new_head(new_v, v_cache_ptr, v_scale_ptr, line, head, dim, DIM)
        score = gl.convert_layout(_of_first_rows(gl.sum(q * new_k, axis=1) * scale, GROUP_2), gl.SliceLayout(1, pairs))
        value = gl.convert_layout(_of_first_rows(new_v, GROUP_2), gl.SliceLayout(1, cube))
        mine = (gl.arange(0, PARTS, layout=gl.SliceLayout(0, pairs)) == 0)[None, :]
        top = gl.where(mine, score[:, None], top)
        total = gl.where(mine, 1.0, total)
        acc = gl.where(gl.expand_dims(mine, 2), gl.expand_dims(value, 1), acc)

    for at in range(begin, stop, KEYS):
        first = at + KEYS
        next_ks = _ask_four(k_cache_ptr, k_scale_ptr, lines, first, last, DIM, PARTS, flat)
        next_vs = _ask_four(v_cache_ptr, v_scale_ptr, lines, first, last, DIM, PARTS, flat)
        lines = _four_lines(table, kv_head, first + KEYS, position, KV_HEADS, BLOCK_SIZE, PARTS, flat)
        s0 = _score(queries, ks[0], at, position, scale, kind, PARTS, WINDOW, cube)
        s1 = _score(queries, ks[1], at + PARTS, position, scale, kind, PARTS, WINDOW, cube)
        s2 = _score(queries, ks[2], at + 2 * PARTS, position, scale, kind, PARTS, WINDOW, cube)
        s3 = _score(queries, ks[3], at + 3 * PARTS, position, scale, kind, PARTS, WINDOW, cube)
        new_top = gl.maximum(top, gl.maximum(gl.maximum(s0, s1), gl.maximum(s2, s3)))
        safe = gl.where(new_top == float("-inf"), 0.0, new_top)  # a part may have seen nothing yet
        fade = gl.exp2(top - safe)
        acc *= gl.expand_dims(fade, 2)
        total *= fade
        acc, total = _add(acc, total, s0, safe, vs[0], kind, cube)
        acc, total = _add(acc, total, s1, safe, vs[1], kind, cube)
        acc, total = _add(acc, total, s2, safe, vs[2], kind, cube)
        acc, total = _add(acc, total, s3, safe, vs[3], kind, cube)
        top = new_top
        ks = next_ks
        vs = next_vs

    out: gl.constexpr = gl.BlockedLayout([4, 1], [DIM // 4, 128 // DIM], [1, 4], [0, 1])
    acc, top, total = _add_parts_up(acc, top, total, ROWS, out)
    write(
        acc, top, total, out_ptr, partial_ptr, stats_ptr, counter_ptr, kv_head, row, split, splits, stretches,
        HEADS, KV_HEADS, GROUP, ROWS, DIM, out,
    )  # fmt: skip


def takes(qkv: Tensor, cache: LayerCache, shape: HeadShape) -> bool:
    """Whether the kernel is made for these shapes and types, and faster than tensor cores."""
    return streamed_narrow.takes(qkv, cache, shape) and shape.group <= MOST_HEADS


def splits_wanted(pairs: int) -> int:
    """Parts of a context, by how many pairs of a row and a KV head there are: all programs run at once, four on a
    multiprocessor. With three parts for 256 pairs a quarter of them began when the others had ended (42 instead of 34 us)."""
    return max(1, min(64, 512 // pairs))


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
    pairs = rows * shape.num_kv_heads
    splits = splits_wanted(expected_rows(rows, step) * shape.num_kv_heads) if tiling is None else tiling.splits
    splits = max(1, min(splits, workspace.max_parts // pairs))
    pdl = workspace.overlap
    _decode_scalar[(shape.num_kv_heads, rows, splits)](
        qkv, step.cos_sin, step.q_scale, parts.q_norm, parts.k_norm, step.slots, step.block_tables, step.positions,
        step.decode_count, bits_of(cache.k), bits_of(cache.v), cache.k_scale, cache.v_scale, out,
        workspace.partial, workspace.stats, workspace.counter,
        step.block_tables.shape[1], shape.head_dim**-0.5 * LOG2_E, parts.eps, splits,
        HEADS=shape.num_heads, KV_HEADS=shape.num_kv_heads, DIM=shape.head_dim, WIDTH=qkv.stride(0),
        BLOCK_SIZE=cache.k.shape[2], GROUP=shape.group, GROUP_2=1 << (shape.group - 1).bit_length(),
        WINDOW=parts.window or 0, NORM=parts.q_norm is not None, LOGN=step.q_scale is not None,
        COUNTED=step.decode_count is not None, PDL=pdl, num_warps=4, maxnreg=128 if shape.group == 1 else None, **overlapping(pdl),
    )  # fmt: skip


def try_out(device: torch.device) -> None:
    """Raises whatever Triton raises where it cannot compile this kernel, RuntimeError where that computes wrongly."""
    streamed_narrow.try_out_kernel(device, decode_attention)
