"""The gated delta rule for prompts, in chunks of 64 tokens (arXiv 2412.06464, section 3.2).

delta_chunks.py has what needs no memory, for all chunks at once. Then each memory passes its row's chunks in their order.
Chunks begin where rows begin, wherever that is in a sequence.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from fastqwen.kernels import DeltaParts, DeltaState, StepTokens
from fastqwen.kernels.limits import DELTA_CHUNK
from fastqwen.kernels.triton.delta import silu
from fastqwen.kernels.triton.delta_chunks import solve_chunks
from fastqwen.kernels.triton.launch import card_of, stages_that_fit

# Columns of a memory that one program takes through a row's chunks. 64 were 9 % faster for two rows, and slower for one.
VALUE_BLOCK = 32
OPERAND_BYTES = (
    24 * 1024
)  # of shared memory for products, beside the chunks on their way (tests/kernels/compile_for_gpu.py)


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
    mixed_ptr,  # the arrays of delta_chunks.py
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
    number = mixed_ptr.dtype.element_ty
    for start in range(begin, end, CHUNK):
        token = (start + at).to(tl.int64)
        live = token < end
        inside_k, inside_v = live[:, None] & here_k[None, :], live[:, None] & here_v[None, :]
        shared = mixed_ptr + token[:, None] * CHANNELS + (head // GROUP * DK + i)[None, :]
        own = token * HEADS + head
        home = own[:, None] * DV + j[None, :]
        held = memory.to(number)
        keys = tl.load(keys_ptr + own[:, None] * DK + i[None, :], mask=inside_k, other=0.0)
        new = tl.load(values_ptr + home, mask=inside_v, other=0.0).to(tl.float32)
        new -= tl.dot(keys, held, input_precision=PRECISION)
        total = tl.load(fades_ptr + own, mask=live, other=0.0)
        last = tl.min(total, axis=0)  # they only fall
        q = tl.load(shared, mask=inside_k, other=0.0)
        found = tl.dot(q, held, input_precision=PRECISION) * tl.exp(total)[:, None]
        seen = tl.load(seen_ptr + own[:, None] * CHUNK + at[None, :], mask=live[:, None], other=0.0)
        found += tl.dot(seen, new.to(number), input_precision=PRECISION)
        tl.store(out_ptr + home, found.to(out_ptr.dtype.element_ty), mask=inside_v)
        left = (new * tl.exp(last - total)[:, None]).to(number)
        k = tl.load(shared + KEYS, mask=inside_k, other=0.0)
        memory = memory * tl.exp(last) + tl.dot(tl.trans(k), left, input_precision=PRECISION)
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
    keys_2, values_2 = (max(16, triton.next_power_of_2(size)) for size in (shape.key_dim, shape.value_dim))
    sizes = {
        "HEADS": heads, "GROUP": shape.group, "DK": shape.key_dim, "DV": shape.value_dim, "CHUNK": DELTA_CHUNK,
    }  # fmt: skip
    chunks = solve_chunks(projected, step, state, parts, sizes, first_row)
    card = card_of(projected.device)
    block = min(VALUE_BLOCK, values_2)
    stage_bytes = DELTA_CHUNK * (3 * keys_2 + block + DELTA_CHUNK) * projected.element_size()
    stages = stages_that_fit(3, stage_bytes, replace(card, shared_bytes=card.shared_bytes - OPERAND_BYTES))
    _advance[(heads, triton.cdiv(shape.value_dim, block), num_rows)](
        projected, step.slots, step.positions, step.held, step.row_starts, step.decode_count, state.memory, state.inputs,
        chunks.mixed, chunks.keys, chunks.values, chunks.seen, chunks.fades, out, width, first_row,
        DK_2=keys_2, BLOCK=block, TAPS=shape.taps, COUNTED=counted, PRECISION="ieee", num_warps=4, num_stages=stages, **sizes,
    )  # fmt: skip
    _gated_norm[(tokens - first_row,)](
        out, projected, parts.norm.weight, step.row_starts, step.decode_count, width, parts.norm.eps, first_row, num_rows,
        HEADS=heads, HEADS_2=triton.next_power_of_2(heads), DV=shape.value_dim, DV_2=values_2,
        CHANNELS=shape.channels, COUNTED=counted, num_warps=4,
    )  # fmt: skip
