"""What the chunks of prompts need before memories pass them: all chunks at once (arXiv 2412.06464, section 3.2).

What a chunk's 64 tokens write depends on each other by a triangular system, which needs no memory. Five kernels, each small
enough that several programs share a multiprocessor: where the chunks are, the convolution, how alike a chunk's keys are, the
system's inverse, and with that what each token takes back of the memory and writes into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqwen.kernels import DeltaParts, DeltaState, StepTokens
from fastqwen.kernels.limits import DELTA_CHUNK
from fastqwen.kernels.triton.delta import LENGTH_EPS, log_fade, scratch, silu

TILE = 16  # of the triangular system: solved by substitution


@triton.jit
def _find_chunks(row_starts_ptr, count_ptr, chunks_ptr, first_row, num_rows, ROWS_2: tl.constexpr, CHUNK: tl.constexpr,
                 COUNTED: tl.constexpr):  # fmt: skip
    """Of the step's chunk of this number: where its row begins, where it begins itself, where its row ends; -1 where there is
    none. Rows before ``first_row`` have no chunks."""
    number = tl.program_id(0)
    if COUNTED:
        first_row = tl.load(count_ptr)
    rows = tl.arange(0, ROWS_2)
    there = (rows >= first_row) & (rows < num_rows)
    begins = tl.load(row_starts_ptr + rows, mask=there, other=0)
    ends = tl.load(row_starts_ptr + rows + 1, mask=there, other=0)
    counts = tl.cdiv(ends - begins, CHUNK)
    upto = tl.cumsum(counts, axis=0)
    mine = (number >= upto - counts) & (number < upto)
    found = tl.sum(mine.to(tl.int32), axis=0)
    begin = tl.sum(tl.where(mine, begins, 0), axis=0)
    start = tl.sum(tl.where(mine, begins + (number - upto + counts) * CHUNK, 0), axis=0)
    tl.store(chunks_ptr + number * 3, begin)
    tl.store(chunks_ptr + number * 3 + 1, tl.where(found > 0, start, -1))
    tl.store(chunks_ptr + number * 3 + 2, tl.sum(tl.where(mine, ends, 0), axis=0))


@triton.jit
def _mixed_tile(x_ptr, width, ring, conv_ptr, token, begin, end, position, channel, here, is_first,
                CHANNELS: tl.constexpr, TAPS: tl.constexpr):  # fmt: skip
    """A chunk's channels after convolution and SiLU, float32 [CHUNK, channels]. What stands before a row is in the ring."""
    live = (token < end)[:, None] & here[None, :]
    total = tl.zeros(live.shape, dtype=tl.float32)
    for back in tl.static_range(0, TAPS):
        source = token - back
        mask = live & (source >= begin)[:, None]
        x = tl.load(x_ptr + source.to(tl.int64)[:, None] * width + channel[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        if is_first and back > 0:
            before = live & ((source < begin) & (position >= back))[:, None]
            line = (position + TAPS - back) % TAPS
            place = ring + line[:, None] * CHANNELS + channel[None, :]
            x += tl.load(place, mask=before, other=0.0).to(tl.float32)
        total += x * tl.load(conv_ptr + channel * TAPS + TAPS - 1 - back, mask=here, other=0.0).to(tl.float32)[None, :]
    return tl.where(live, silu(total), 0.0)


@triton.jit
def _mix(
    projected_ptr,  # [tokens, width]
    conv_ptr,  # [CHANNELS, TAPS]
    slots_ptr,
    positions_ptr,
    inputs_ptr,  # [slots, TAPS, CHANNELS]
    chunks_ptr,
    mixed_ptr,  # [tokens, CHANNELS]
    width,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    WIDE_2: tl.constexpr,  # at least DK and DV
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One head of a chunk's queries, keys or values: convolution, SiLU, and length 1 for the former two."""
    KEY_HEADS: tl.constexpr = HEADS // GROUP
    KEYS: tl.constexpr = KEY_HEADS * DK
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * DV
    part = tl.program_id(0)  # query heads, key heads, value heads
    chunk = chunks_ptr + tl.program_id(1) * 3
    begin, start, end = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
    if start < 0:
        return
    has_length = part < 2 * KEY_HEADS
    first = tl.where(has_length, part * DK, 2 * KEYS + (part - 2 * KEY_HEADS) * DV)
    i = tl.arange(0, WIDE_2)
    here = i < tl.where(has_length, DK, DV)
    token = start + tl.arange(0, CHUNK)
    position = tl.load(positions_ptr + begin) + token - begin
    ring = inputs_ptr + tl.load(slots_ptr + begin).to(tl.int64) * TAPS * CHANNELS
    x = _mixed_tile(projected_ptr, width, ring, conv_ptr, token, begin, end, position, first + i, here, start == begin,
                    CHANNELS, TAPS)  # fmt: skip
    length = tl.rsqrt(tl.sum(x * x, axis=1) + LENGTH_EPS) * tl.where(part < KEY_HEADS, scale, 1.0)
    x = x * tl.where(has_length, length, 1.0)[:, None]
    place = mixed_ptr + token.to(tl.int64)[:, None] * CHANNELS + (first + i)[None, :]
    tl.store(place, x.to(mixed_ptr.dtype.element_ty), mask=(token < end)[:, None] & here[None, :])


@triton.jit
def _compare(
    projected_ptr,
    mixed_ptr,
    decay_ptr,
    bias_ptr,
    chunks_ptr,
    betas_ptr,  # float32 [tokens, HEADS]
    fades_ptr,  # float32 [tokens, HEADS]: logarithms since the chunk's beginning
    system_ptr,  # float32 [tokens, HEADS * CHUNK]: what each token's write takes from those before it
    seen_ptr,  # [tokens, HEADS * CHUNK]: how much it sees of what the chunk's tokens write
    width,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_2: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One key head of a chunk, and the value heads that share it."""
    key_head = tl.program_id(0)
    chunk = chunks_ptr + tl.program_id(1) * 3
    start, end = tl.load(chunk + 1), tl.load(chunk + 2)
    if start < 0:
        return
    KEYS: tl.constexpr = HEADS // GROUP * DK
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * DV
    at, i = tl.arange(0, CHUNK), tl.arange(0, DK_2)
    token = start + at
    live = token < end
    wide = token.to(tl.int64)
    inside = live[:, None] & (i < DK)[None, :]
    home = mixed_ptr + wide[:, None] * CHANNELS + (key_head * DK + i)[None, :]
    q = tl.load(home, mask=inside, other=0.0)
    turned = tl.trans(tl.load(home + KEYS, mask=inside, other=0.0))
    alike = tl.dot(tl.trans(turned), turned, input_precision=PRECISION)
    seen = tl.dot(q, turned, input_precision=PRECISION)

    for one in range(GROUP):
        head = key_head * GROUP + one
        gates = projected_ptr + wide * width + CHANNELS + HEADS * DV + head
        beta = tl.where(live, tl.sigmoid(tl.load(gates, mask=live, other=0.0).to(tl.float32)), 0.0)
        a = tl.load(gates + HEADS, mask=live, other=0.0).to(tl.float32)
        fade = tl.where(live, log_fade(a, tl.load(decay_ptr + head), tl.load(bias_ptr + head)), 0.0)
        total = tl.cumsum(fade, axis=0)
        tl.store(betas_ptr + wide * HEADS + head, beta, mask=live)
        tl.store(fades_ptr + wide * HEADS + head, total, mask=live)
        between = tl.exp(tl.where(at[:, None] >= at[None, :], total[:, None] - total[None, :], 0.0))
        place = (wide * HEADS + head)[:, None] * CHUNK + at[None, :]
        system = tl.where(at[:, None] > at[None, :], alike * between * beta[:, None], 0.0)
        tl.store(system_ptr + place, system, mask=live[:, None])
        own = tl.where(at[:, None] >= at[None, :], seen * between, 0.0)
        tl.store(seen_ptr + place, own.to(seen_ptr.dtype.element_ty), mask=live[:, None])


@triton.jit
def _tile(system_ptr, first, end, row, column, stride, SIZE: tl.constexpr):
    """Pointers and mask of a square of one head's system: its rows from ``row`` of the chunk that begins at ``first``."""
    at = tl.arange(0, SIZE)
    token = first + row + at
    home = system_ptr + token.to(tl.int64)[:, None] * stride + column + at[None, :]
    return home, (token < end)[:, None] & (at < SIZE)[None, :]


@triton.jit
def _fill_below(system_ptr, first, end, row, column, stride, SIZE: tl.constexpr):
    """The inverse of (A 0; C B) below its diagonal is -B^-1 C A^-1; A^-1 and B^-1, of SIZE, stand where A and B stood."""
    upper, upper_mask = _tile(system_ptr, first, end, column, column, stride, SIZE)
    lower, lower_mask = _tile(system_ptr, first, end, row, row, stride, SIZE)
    place, mask = _tile(system_ptr, first, end, row, column, stride, SIZE)
    c = tl.load(place, mask=mask, other=0.0)
    found = tl.dot(c, tl.load(upper, mask=upper_mask, other=0.0), input_precision="ieee")
    found = tl.dot(tl.load(lower, mask=lower_mask, other=0.0), found, input_precision="ieee")
    tl.store(place, -found, mask=mask)


@triton.jit
def _invert(system_ptr, chunks_ptr, HEADS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """(1 + system)^-1, in its place, of one head's chunk: tiles on the diagonal by substitution, row after row; then twice
    what stands below two neighbours. Products of the system's powers would be faster, and overflow where a key is repeated."""
    head = tl.program_id(0)
    chunk = chunks_ptr + tl.program_id(1) * 3
    first, end = tl.load(chunk + 1), tl.load(chunk + 2)
    if first < 0:
        return
    STRIDE: tl.constexpr = HEADS * CHUNK
    own = system_ptr + head * CHUNK
    tile, i, j = tl.arange(0, CHUNK // TILE), tl.arange(0, TILE), tl.arange(0, TILE)
    token = first + tile[:, None] * TILE + i[None, :]
    column = tile[:, None, None] * TILE + j[None, None, :]
    place = own + token.to(tl.int64)[:, :, None] * STRIDE + column
    live = (token < end)[:, :, None] & (j < TILE)[None, None, :]
    found = -tl.load(place, mask=live, other=0.0)
    for step in range(1, TILE):
        row = tl.sum(tl.where((i == step)[None, :, None], found, 0.0), axis=1)
        row += tl.sum(row[:, :, None] * found, axis=1)
        found = tl.where((i == step)[None, :, None], row[:, None, :], found)
    found += tl.where((i[:, None] == j[None, :])[None, :, :], 1.0, 0.0)
    tl.store(place, found, mask=live)
    SPAN: tl.constexpr = 2 * TILE
    tl.debug_barrier()
    for pair in range(CHUNK // SPAN):
        _fill_below(own, first, end, pair * SPAN + TILE, pair * SPAN, STRIDE, TILE)
    tl.debug_barrier()
    _fill_below(own, first, end, SPAN, 0, STRIDE, SPAN)


@triton.jit
def _spread(
    mixed_ptr,
    chunks_ptr,
    betas_ptr,
    fades_ptr,
    solver_ptr,  # float32 [tokens, HEADS * CHUNK]: the system's inverse
    keys_ptr,  # [tokens, HEADS * DK]: what of the memory each token takes back
    values_ptr,  # [tokens, HEADS * DV]: what it writes, if the memory were empty
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_2: tl.constexpr,
    DV_2: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One value head of a chunk."""
    head = tl.program_id(0)
    chunk = chunks_ptr + tl.program_id(1) * 3
    start, end = tl.load(chunk + 1), tl.load(chunk + 2)
    if start < 0:
        return
    KEYS: tl.constexpr = HEADS // GROUP * DK
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * DV
    at, i, j = tl.arange(0, CHUNK), tl.arange(0, DK_2), tl.arange(0, DV_2)
    token = (start + at).to(tl.int64)
    live = token < end
    own = token * HEADS + head
    number = keys_ptr.dtype.element_ty
    solver = tl.load(solver_ptr + own[:, None] * CHUNK + at[None, :], mask=live[:, None], other=0.0).to(number)
    beta = tl.load(betas_ptr + own, mask=live, other=0.0)
    fade = tl.load(fades_ptr + own, mask=live, other=0.0)
    home = mixed_ptr + token[:, None] * CHANNELS
    inside = live[:, None] & (i < DK)[None, :]
    k = tl.load(home + (KEYS + head // GROUP * DK + i)[None, :], mask=inside, other=0.0).to(tl.float32)
    keys = tl.dot(solver, (k * (beta * tl.exp(fade))[:, None]).to(number), input_precision=PRECISION)
    tl.store(keys_ptr + own[:, None] * DK + i[None, :], keys.to(number), mask=inside)
    inside = live[:, None] & (j < DV)[None, :]
    v = tl.load(home + (2 * KEYS + head * DV + j)[None, :], mask=inside, other=0.0).to(tl.float32)
    values = tl.dot(solver, (v * beta[:, None]).to(number), input_precision=PRECISION)
    tl.store(values_ptr + own[:, None] * DV + j[None, :], values.to(number), mask=inside)


@dataclass(frozen=True)
class Chunks:
    """Of all tokens; those of rows of one token have nothing in them. The kernels above name the sizes."""

    mixed: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor
    fades: Tensor


def solve_chunks(
    projected: Tensor, step: StepTokens, state: DeltaState, parts: DeltaParts, sizes: dict[str, int], first_row: int
) -> Chunks:
    """``sizes`` are the constants of all kernels of prompts, ``first_row`` the first row of more than one token."""
    shape, tokens, num_rows = parts.shape, projected.shape[0], step.row_starts.shape[0] - 1
    heads, width, device = shape.num_value_heads, projected.stride(0), projected.device
    most_chunks = tokens // DELTA_CHUNK + min(num_rows, tokens)
    keys_2, values_2 = (max(16, triton.next_power_of_2(size)) for size in (shape.key_dim, shape.value_dim))
    # Of two products of different widths in one kernel the second came out wrong (Triton 3.6 for 9.0, widths of 32 and 16).
    wide_2 = max(64, keys_2, values_2)
    warps = 8 if wide_2 >= 128 else 4
    mixed, keys, values, seen = scratch(
        tokens, shape.channels, heads * shape.key_dim, shape.value_size, heads * DELTA_CHUNK, like=projected
    )
    betas, fades = (torch.empty((tokens, heads), dtype=torch.float32, device=device) for _ in range(2))
    system = torch.empty((tokens, heads * DELTA_CHUNK), dtype=torch.float32, device=device)
    chunks = torch.empty((most_chunks, 3), dtype=torch.int32, device=device)
    _find_chunks[(most_chunks,)](
        step.row_starts, step.decode_count, chunks, first_row, num_rows,
        ROWS_2=triton.next_power_of_2(num_rows), CHUNK=DELTA_CHUNK, COUNTED=step.decode_count is not None, num_warps=1,
    )  # fmt: skip
    _mix[(2 * shape.num_key_heads + heads, most_chunks)](
        projected, parts.conv, step.slots, step.positions, state.inputs, chunks, mixed, width, shape.key_dim**-0.5,
        WIDE_2=wide_2, TAPS=shape.taps, num_warps=16 if wide_2 >= 128 else 4, **sizes,
    )  # fmt: skip
    _compare[(shape.num_key_heads, most_chunks)](
        projected, mixed, parts.decay, parts.decay_bias, chunks, betas, fades, system, seen, width,
        DK_2=keys_2, PRECISION="ieee", num_warps=warps, **sizes,
    )  # fmt: skip
    _invert[(heads, most_chunks)](system, chunks, HEADS=heads, CHUNK=DELTA_CHUNK, TILE=TILE, num_warps=1)
    _spread[(heads, most_chunks)](
        mixed, chunks, betas, fades, system, keys, values, DK_2=wide_2, DV_2=wide_2, PRECISION="ieee", num_warps=warps,
        **sizes,
    )  # fmt: skip
    return Chunks(mixed, keys, values, seen, fades)
