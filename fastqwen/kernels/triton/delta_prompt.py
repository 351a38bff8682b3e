"""The gated delta rule for prompts, in chunks of 64 tokens (arXiv 2412.06464, section 3.2).

What a chunk's tokens write depends on each other by a triangular system, which needs no memory: all chunks are solved at
once. Then each memory passes its row's chunks in their order. Chunks begin where rows begin, wherever that is in a sequence.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqwen.kernels import DeltaParts, DeltaState, StepTokens
from fastqwen.kernels.limits import DELTA_CHUNK
from fastqwen.kernels.triton.delta import LENGTH_EPS, log_fade, scratch, silu
from fastqwen.kernels.triton.launch import card_of, stages_that_fit

VALUE_BLOCK = 32  # columns of a memory that one program takes through a row's chunks
OPERAND_BYTES = (
    48 * 1024
)  # of shared memory for products, beside the chunks on their way (tests/kernels/compile_for_gpu.py)


@triton.jit
def _find_chunk(row_starts_ptr, number, first_row, num_rows, ROWS_2: tl.constexpr, CHUNK: tl.constexpr):
    """The row of the step's chunk of that number, and the chunk's place in the row; a row behind the last if there is none.
    Rows before ``first_row`` have no chunks."""
    rows = tl.arange(0, ROWS_2)
    there = (rows >= first_row) & (rows < num_rows)
    begins = tl.load(row_starts_ptr + rows, mask=there, other=0)
    ends = tl.load(row_starts_ptr + rows + 1, mask=there, other=0)
    counts = tl.cdiv(ends - begins, CHUNK)
    upto = tl.cumsum(counts, axis=0)
    row = tl.sum((upto <= number).to(tl.int32), axis=0)
    return row, number - tl.sum(tl.where(rows < row, counts, 0), axis=0)


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
def _inverse(system, CHUNK: tl.constexpr):
    """(1 + system)^-1 of a matrix that has numbers below its diagonal only: row after row, by substitution. Products of its
    powers would be faster, and overflow where a key is repeated."""
    at = tl.arange(0, CHUNK)
    found = -system
    for i in range(1, CHUNK):
        own = tl.sum(tl.where((at == i)[:, None], found, 0.0), axis=0)
        own += tl.sum(own[:, None] * found, axis=0)
        found = tl.where((at == i)[:, None], own[None, :], found)
    return found + tl.where(at[:, None] == at[None, :], 1.0, 0.0)


@triton.jit
def _solve(
    projected_ptr,  # [tokens, width]
    conv_ptr,
    decay_ptr,
    bias_ptr,
    slots_ptr,
    positions_ptr,
    row_starts_ptr,  # int32 [num_rows + 1]
    count_ptr,  # int32 [1], if COUNTED: the rows before the first of more tokens
    inputs_ptr,  # [slots, TAPS, CHANNELS]
    q_ptr,  # [tokens, HEADS / GROUP * DK]
    k_ptr,
    keys_ptr,  # [tokens, HEADS * DK]: what of the memory each token takes back
    values_ptr,  # [tokens, HEADS * DV]: what it writes, if the memory were empty
    seen_ptr,  # [tokens, HEADS * CHUNK]: how much it sees of what the chunk's tokens write
    fades_ptr,  # float32 [tokens, HEADS]: logarithms since the chunk's beginning
    width,
    scale,
    first_row,
    num_rows,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_2: tl.constexpr,
    DV_2: tl.constexpr,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS_2: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One value head of a chunk."""
    head = tl.program_id(0)
    if COUNTED:
        first_row = tl.load(count_ptr)
    row, chunk = _find_chunk(row_starts_ptr, tl.program_id(1), first_row, num_rows, ROWS_2, CHUNK)
    if row >= num_rows:
        return
    KEYS: tl.constexpr = HEADS // GROUP * DK
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * DV
    begin, end = tl.load(row_starts_ptr + row), tl.load(row_starts_ptr + row + 1)
    at, i, j = tl.arange(0, CHUNK), tl.arange(0, DK_2), tl.arange(0, DV_2)
    token = begin + chunk * CHUNK + at
    live = token < end
    position = tl.load(positions_ptr + begin) + token - begin
    ring = inputs_ptr + tl.load(slots_ptr + begin).to(tl.int64) * TAPS * CHANNELS
    here_k, here_v = i < DK, j < DV
    key_head = head // GROUP
    channel = key_head * DK + i
    is_first = chunk == 0
    q = _mixed_tile(projected_ptr, width, ring, conv_ptr, token, begin, end, position, channel, here_k, is_first,
                    CHANNELS, TAPS)  # fmt: skip
    k = _mixed_tile(projected_ptr, width, ring, conv_ptr, token, begin, end, position, KEYS + channel, here_k, is_first,
                    CHANNELS, TAPS)  # fmt: skip
    q = q * (tl.rsqrt(tl.sum(q * q, axis=1) + LENGTH_EPS) * scale)[:, None]
    k = k * tl.rsqrt(tl.sum(k * k, axis=1) + LENGTH_EPS)[:, None]
    wide = token.to(tl.int64)
    inside_k = live[:, None] & here_k[None, :]
    if head % GROUP == 0:
        home = wide[:, None] * KEYS + channel[None, :]
        tl.store(q_ptr + home, q.to(q_ptr.dtype.element_ty), mask=inside_k)
        tl.store(k_ptr + home, k.to(k_ptr.dtype.element_ty), mask=inside_k)

    gates = projected_ptr + wide * width + CHANNELS + HEADS * DV + head
    beta = tl.where(live, tl.sigmoid(tl.load(gates, mask=live, other=0.0).to(tl.float32)), 0.0)
    a = tl.load(gates + HEADS, mask=live, other=0.0).to(tl.float32)
    fade = tl.where(live, log_fade(a, tl.load(decay_ptr + head), tl.load(bias_ptr + head)), 0.0)
    total = tl.cumsum(fade, axis=0)
    tl.store(fades_ptr + wide * HEADS + head, total, mask=live)
    not_above = at[:, None] >= at[None, :]
    between = tl.exp(tl.where(not_above, total[:, None] - total[None, :], 0.0))
    number = q_ptr.dtype.element_ty
    turned = tl.trans(k.to(number))
    alike = tl.dot(k.to(number), turned, input_precision=PRECISION) * between * beta[:, None]
    seen = tl.where(not_above, tl.dot(q.to(number), turned, input_precision=PRECISION) * between, 0.0)
    home = (wide * HEADS + head)[:, None] * CHUNK + at[None, :]
    tl.store(seen_ptr + home, seen.to(number), mask=live[:, None])
    solver = _inverse(tl.where(at[:, None] > at[None, :], alike, 0.0), CHUNK)

    right = k * (beta * tl.exp(total))[:, None]
    keys = tl.dot(solver, right, input_precision=PRECISION)
    home = (wide * HEADS + head)[:, None] * DK + i[None, :]
    tl.store(keys_ptr + home, keys.to(number), mask=inside_k)
    v = _mixed_tile(projected_ptr, width, ring, conv_ptr, token, begin, end, position, 2 * KEYS + head * DV + j, here_v,
                    is_first, CHANNELS, TAPS)  # fmt: skip
    values = tl.dot(solver, v * beta[:, None], input_precision=PRECISION)
    home = (wide * HEADS + head)[:, None] * DV + j[None, :]
    tl.store(values_ptr + home, values.to(number), mask=live[:, None] & here_v[None, :])


@triton.jit
def _keep_inputs(x_ptr, width, ring, begin, end, position, channel, here, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """A row's last inputs into its ring."""
    for back in tl.static_range(0, TAPS):
        token = end - 1 - back
        mask = here & (token >= begin)
        x = tl.load(x_ptr + token.to(tl.int64) * width + channel, mask=mask, other=0.0)
        tl.store(ring + (position + token - begin) % TAPS * CHANNELS + channel, x, mask=mask)


@triton.jit
def _advance(
    projected_ptr,
    slots_ptr,
    positions_ptr,
    held_ptr,  # int32 [num_rows]
    row_starts_ptr,
    count_ptr,
    memory_ptr,  # float32 [slots, HEADS, DK, DV]
    inputs_ptr,
    q_ptr,
    k_ptr,
    keys_ptr,
    values_ptr,
    seen_ptr,
    fades_ptr,
    out_ptr,  # [tokens, HEADS * DV]
    width,
    first_row,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    DK_2: tl.constexpr,
    BLOCK: tl.constexpr,
    TAPS: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some columns of one memory pass all chunks of a row."""
    head = tl.program_id(0)
    row = tl.program_id(2)
    if COUNTED:
        first_row = tl.load(count_ptr)
    begin, end = tl.load(row_starts_ptr + row), tl.load(row_starts_ptr + row + 1)
    if (row < first_row) | (begin == end):
        return
    KEYS: tl.constexpr = HEADS // GROUP * DK
    CHANNELS: tl.constexpr = 2 * KEYS + HEADS * DV
    at, i, j = tl.arange(0, CHUNK), tl.arange(0, DK_2), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here_k, here_v = i < DK, j < DV
    slot = tl.load(slots_ptr + begin).to(tl.int64)
    place = memory_ptr + ((slot * HEADS + head) * DK + i)[:, None] * DV + j[None, :]
    inside = here_k[:, None] & here_v[None, :]
    memory = tl.load(place, mask=inside & (tl.load(held_ptr + row) > 0), other=0.0)
    for start in range(begin, end, CHUNK):
        token = (start + at).to(tl.int64)
        live = token < end
        inside_k, inside_v = live[:, None] & here_k[None, :], live[:, None] & here_v[None, :]
        shared = token[:, None] * KEYS + (head // GROUP * DK + i)[None, :]
        own = token * HEADS + head
        home = own[:, None] * DV + j[None, :]
        keys = tl.load(keys_ptr + own[:, None] * DK + i[None, :], mask=inside_k, other=0.0).to(tl.float32)
        new = tl.load(values_ptr + home, mask=inside_v, other=0.0).to(tl.float32)
        new -= tl.dot(keys, memory, input_precision=PRECISION)
        total = tl.load(fades_ptr + own, mask=live, other=0.0)
        last = tl.load(fades_ptr + (tl.minimum(start + CHUNK, end) - 1).to(tl.int64) * HEADS + head)
        q = tl.load(q_ptr + shared, mask=inside_k, other=0.0).to(tl.float32)
        found = tl.dot(q, memory, input_precision=PRECISION) * tl.exp(total)[:, None]
        seen = tl.load(seen_ptr + own[:, None] * CHUNK + at[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        found += tl.dot(seen, new, input_precision=PRECISION)
        tl.store(out_ptr + home, found.to(out_ptr.dtype.element_ty), mask=inside_v)
        left = tl.where(live, tl.exp(last - total), 0.0)
        k = tl.load(k_ptr + shared, mask=inside_k, other=0.0).to(tl.float32) * left[:, None]
        memory = memory * tl.exp(last) + tl.dot(tl.trans(k), new, input_precision=PRECISION)
    tl.store(place, memory, mask=inside)
    ring = inputs_ptr + slot * TAPS * CHANNELS
    position = tl.load(positions_ptr + begin)
    _keep_inputs(projected_ptr, width, ring, begin, end, position, 2 * KEYS + head * DV + j, here_v, CHANNELS, TAPS)
    if (head % GROUP == 0) & (tl.program_id(1) == 0):
        channel = head // GROUP * DK + i
        _keep_inputs(projected_ptr, width, ring, begin, end, position, channel, here_k, CHANNELS, TAPS)
        _keep_inputs(projected_ptr, width, ring, begin, end, position, KEYS + channel, here_k, CHANNELS, TAPS)


@triton.jit
def _gated_norm(out_ptr, projected_ptr, norm_ptr, row_starts_ptr, count_ptr, width, eps, first_row, num_rows,
                HEADS: tl.constexpr, HEADS_2: tl.constexpr, DV: tl.constexpr, DV_2: tl.constexpr,
                CHANNELS: tl.constexpr, COUNTED: tl.constexpr):  # fmt: skip
    """All heads of a token, in place."""
    if COUNTED:
        first_row = tl.load(count_ptr)
    token = first_row + tl.program_id(0)  # rows before have one token each
    if token >= tl.load(row_starts_ptr + num_rows):
        return
    head, j = tl.arange(0, HEADS_2), tl.arange(0, DV_2)
    inside = (head < HEADS)[:, None] & (j < DV)[None, :]
    at = head[:, None] * DV + j[None, :]
    home = out_ptr + token.to(tl.int64) * HEADS * DV + at
    x = tl.load(home, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(projected_ptr + token.to(tl.int64) * width + CHANNELS + at, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / DV + eps)[:, None]
    x = x * tl.load(norm_ptr + j, mask=j < DV, other=0.0)[None, :] * silu(z)
    tl.store(home, x.to(out_ptr.dtype.element_ty), mask=inside)


def delta_prompts(projected: Tensor, step: StepTokens, state: DeltaState, parts: DeltaParts, *, out: Tensor) -> None:
    """The step's rows of more than one token: projected [tokens, width] of all rows -> out [tokens, value_size]"""
    shape, tokens, num_rows = parts.shape, projected.shape[0], step.row_starts.shape[0] - 1
    heads, width = shape.num_value_heads, projected.stride(0)
    assert projected.stride(1) == 1 and step.held is not None
    counted = step.decode_count is not None
    first_row = 0 if counted else step.num_decode_rows
    most_chunks = tokens // DELTA_CHUNK + min(num_rows, tokens)
    precision = "ieee" if projected.dtype == torch.float32 else "tf32"
    keys_2, values_2 = (max(16, triton.next_power_of_2(size)) for size in (shape.key_dim, shape.value_dim))
    sizes = (shape.key_size, shape.key_size, heads * shape.key_dim, shape.value_size, heads * DELTA_CHUNK)
    kept = scratch(tokens, *sizes, like=projected)
    kept.append(torch.empty((tokens, heads), dtype=torch.float32, device=projected.device))
    common = {
        "HEADS": heads, "GROUP": shape.group, "DK": shape.key_dim, "DV": shape.value_dim, "DK_2": keys_2,
        "TAPS": shape.taps, "CHUNK": DELTA_CHUNK, "COUNTED": counted, "PRECISION": precision,
    }  # fmt: skip
    _solve[(heads, most_chunks)](
        projected, parts.conv, parts.decay, parts.decay_bias, step.slots, step.positions, step.row_starts,
        step.decode_count, state.inputs, *kept, width, shape.key_dim**-0.5, first_row, num_rows,
        DV_2=values_2, ROWS_2=triton.next_power_of_2(num_rows), num_warps=8, **common,
    )  # fmt: skip
    block = min(VALUE_BLOCK, values_2)
    stage_bytes = DELTA_CHUNK * (3 * keys_2 + block + DELTA_CHUNK) * projected.element_size()
    card = card_of(projected.device)
    stages = stages_that_fit(3, stage_bytes, replace(card, shared_bytes=card.shared_bytes - OPERAND_BYTES))
    _advance[(heads, triton.cdiv(shape.value_dim, block), num_rows)](
        projected, step.slots, step.positions, step.held, step.row_starts, step.decode_count, state.memory, state.inputs,
        *kept, out, width, first_row, BLOCK=block, num_warps=4, num_stages=stages, **common,
    )  # fmt: skip
    _gated_norm[(tokens - first_row,)](
        out, projected, parts.norm.weight, step.row_starts, step.decode_count, width, parts.norm.eps, first_row, num_rows,
        HEADS=heads, HEADS_2=triton.next_power_of_2(heads), DV=shape.value_dim, DV_2=values_2,
        CHANNELS=shape.channels, COUNTED=counted, num_warps=4,
    )  # fmt: skip
