"""What surrounds the layers in a decode step: tokens in, tokens out, all on the device."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqwen.kernels.limits import SAMPLE_CHUNK


@triton.jit
def _prepare(
    row_slots_ptr,  # int32 [rows]
    starts_ptr,  # int32 [rows]: each row's position
    token_ids_ptr,  # int32 [slots, length]
    frequencies_ptr,  # float32 [slots, HALF]
    rope_scale_ptr,  # float32 [slots]
    embed_ptr,  # [vocab, hidden]
    residual_ptr,  # [rows, hidden]
    cos_sin_ptr,  # float32 [rows, 2 * HALF]
    q_scale_ptr,  # float32 [rows]
    length,
    hidden,
    first_id,  # the embedding's lines are of the ids from here on;
    num_ids,  # so many: those of others are zeros
    inverse_log,  # 1 / ln(logn_len)
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    LOGN: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    position = tl.load(starts_ptr + row)
    token = tl.load(token_ids_ptr + slot * length + position).to(tl.int64) - first_id
    here = (token >= 0) & (token < num_ids)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    vector = tl.load(embed_ptr + token * hidden + at, mask=here & (at < hidden), other=0.0)
    tl.store(residual_ptr + row.to(tl.int64) * hidden + at, vector, mask=at < hidden)
    if tl.program_id(1) == 0:
        half = tl.arange(0, HALF_BLOCK)
        live = half < HALF
        angle = position.to(tl.float32) * tl.load(frequencies_ptr + slot * HALF + half, mask=live, other=0.0)
        scale = tl.load(rope_scale_ptr + slot)
        tl.store(cos_sin_ptr + row * 2 * HALF + half, tl.cos(angle) * scale, mask=live)
        tl.store(cos_sin_ptr + row * 2 * HALF + HALF + half, tl.sin(angle) * scale, mask=live)
        if LOGN:
            stretch = tl.log((position + 1).to(tl.float32)) * inverse_log
            tl.store(q_scale_ptr + row, tl.maximum(stretch, 1.0))


def prepare(
    row_slots: Tensor,
    starts: Tensor,
    *,
    token_ids: Tensor,
    frequencies: Tensor,
    rope_scale: Tensor,
    embed: Tensor,
    first_id: int = 0,
    logn_len: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of one token each: embeddings [rows, hidden], cos_sin [rows, head_dim], logN's q_scale [rows] or None"""
    rows, hidden, half = row_slots.shape[0], embed.shape[1], frequencies.shape[1]
    residual = torch.empty((rows, hidden), dtype=embed.dtype, device=embed.device)
    cos_sin = torch.empty((rows, 2 * half), dtype=torch.float32, device=embed.device)
    q_scale = None if logn_len is None else torch.empty(rows, dtype=torch.float32, device=embed.device)
    _prepare[(rows, triton.cdiv(hidden, 1024))](
        row_slots, starts, token_ids, frequencies, rope_scale, embed, residual, cos_sin, q_scale,
        token_ids.shape[1], hidden, first_id, embed.shape[0], 1.0 / math.log(logn_len) if logn_len else 0.0,
        HALF=half, HALF_BLOCK=triton.next_power_of_2(half), BLOCK=1024, LOGN=logn_len is not None, num_warps=4,
    )  # fmt: skip
    return residual, cos_sin, q_scale


CORRUPT = -1  # the token id that says: this row's logits were not finite


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _ordered(x):
    """float32 as uint32 of the same order, so that bisection over bits finds an exact value."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)


@triton.jit
def _row_state(row_slots_ptr, temperature_ptr, row):
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot)
    return slot, temperature


@triton.jit
def _cut(
    logits_ptr,  # [rows, vocab]
    row_slots_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    cut_ptr,  # uint32 [rows]: ordered bits of the least scaled logit that stays
    vocab,
    BLOCK: tl.constexpr,
):
    """The least scaled logit that top_k, then top_p, then min_p let through; equal logits stay together."""
    row = tl.program_id(0)
    slot, temperature = _row_state(row_slots_ptr, temperature_ptr, row)
    top_k = tl.load(top_k_ptr + slot)
    top_p = tl.load(top_p_ptr + slot)
    min_p = tl.load(min_p_ptr + slot)
    cut = tl.zeros((), dtype=tl.uint32)
    if (temperature > 0.0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)):
        line = logits_ptr + row.to(tl.int64) * vocab
        inverse = 1.0 / temperature
        at = tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            x = tl.load(line + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32) * inverse
            best = tl.maximum(best, x)
        top = tl.max(best, axis=0)
        if (top_k > 0) & (top_k < vocab):
            # The largest threshold that at least top_k logits reach is the top_k-th logit itself.
            low = tl.zeros((), dtype=tl.uint32)
            for bit in range(32):
                trial = low | (tl.full((), 1, dtype=tl.uint32) << (31 - bit))
                count = tl.zeros((BLOCK,), dtype=tl.int32)
                for start in range(0, vocab, BLOCK):
                    live = start + at < vocab
                    x = tl.load(line + start + at, mask=live, other=float("-inf")).to(tl.float32) * inverse
                    count += (live & (_ordered(x) >= trial)).to(tl.int32)
                low = tl.where(tl.sum(count, axis=0) >= top_k, trial, low)
            cut = low
        if top_p < 1.0:
            mass = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, vocab, BLOCK):
                x = tl.load(line + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32) * inverse
                mass += tl.where(_ordered(x) >= cut, tl.exp(x - top), 0.0)
            wanted = tl.sum(mass, axis=0) * top_p
            # The largest threshold above which (itself included) there is enough mass.
            low = cut
            found = tl.zeros((), dtype=tl.uint32)
            for bit in range(32):
                trial = found | (tl.full((), 1, dtype=tl.uint32) << (31 - bit))
                mass = tl.zeros((BLOCK,), dtype=tl.float32)
                for start in range(0, vocab, BLOCK):
                    x = (
                        tl.load(line + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32)
                        * inverse
                    )
                    key = _ordered(x)
                    mass += tl.where((key >= trial) & (key >= low), tl.exp(x - top), 0.0)
                found = tl.where(tl.sum(mass, axis=0) >= wanted, trial, found)
            cut = tl.maximum(low, found)
        if min_p > 0.0:
            cut = tl.maximum(cut, _ordered(top + tl.log(min_p)))
    tl.store(cut_ptr + row, cut)


@triton.jit
def _sample_chunk(
    logits_ptr,
    row_slots_ptr,
    positions_ptr,  # int32 [rows]: of the token to be sampled
    temperature_ptr,
    seed_ptr,  # int64 [slots]
    cut_ptr,
    best_ptr,  # float32 [rows, chunks]
    index_ptr,  # int32 [rows, chunks]; CORRUPT where a logit is not finite
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    slot, temperature = _row_state(row_slots_ptr, temperature_ptr, row)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    live = at < vocab
    x = tl.load(logits_ptr + row.to(tl.int64) * vocab + at, mask=live, other=0.0).to(tl.float32)
    corrupt = tl.sum((tl.abs(x) < float("inf")).to(tl.int32), axis=0) < BLOCK
    x = tl.where(live, x, float("-inf"))
    if temperature > 0.0:
        x = x * (1.0 / temperature)
        x = tl.where(_ordered(x) >= tl.load(cut_ptr + row), x, float("-inf"))
        seed = tl.load(seed_ptr + slot)
        low = _mix32(seed.to(tl.uint32))
        high = _mix32((seed >> 32).to(tl.uint32) ^ low)
        key = _mix32(high ^ (tl.load(positions_ptr + row).to(tl.uint32) * 0x9E3779B1))
        bits = _mix32((at.to(tl.uint32) * 0x85EBCA77) ^ key)
        bits = _mix32(bits + low)
        uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
        x = x - tl.log(-tl.log(uniform))
    best = tl.max(x, axis=0)
    index = tl.min(tl.where(x == best, at, 2147483647), axis=0)  # the lowest id among equals
    place = row * tl.num_programs(1) + chunk
    tl.store(best_ptr + place, best)
    tl.store(index_ptr + place, tl.where(corrupt, -1, index))


@triton.jit
def _pick(
    best_ptr,
    index_ptr,
    row_slots_ptr,
    positions_ptr,
    token_ids_ptr,  # int32 [slots, length]; the new token is written here
    out_ptr,  # int32 [rows]
    chunks,
    length,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    live = at < chunks
    best = tl.load(best_ptr + row * chunks + at, mask=live, other=float("-inf"))
    index = tl.load(index_ptr + row * chunks + at, mask=live, other=0)
    top = tl.max(best, axis=0)
    token = tl.min(tl.where(live & (best == top), index, 2147483647), axis=0)
    corrupt = tl.min(index, axis=0) < 0
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    tl.store(token_ids_ptr + slot * length + tl.load(positions_ptr + row), tl.where(corrupt, 0, token))
    tl.store(out_ptr + row, tl.where(corrupt, -1, token))


def sample(
    logits: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    token_ids: Tensor,
) -> Tensor:
    """The next token of each row, int32 [rows], CORRUPT where logits are not finite; also written into ``token_ids``.

    logits [rows, vocab]; row_slots, positions int32 [rows]; the other tensors are per slot. The same tokens as
    runner/sampler.py gives, up to the rounding of logarithms.
    """
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, SAMPLE_CHUNK)

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    cut = scratch(rows, dtype=torch.uint32)
    best, index = scratch(rows, chunks, dtype=torch.float32), scratch(rows, chunks, dtype=torch.int32)
    out = scratch(rows, dtype=torch.int32)
    _cut[(rows,)](logits, row_slots, temperature, top_k, top_p, min_p, cut, vocab, BLOCK=8192, num_warps=16)
    _sample_chunk[(rows, chunks)](
        logits, row_slots, positions, temperature, seed, cut, best, index, vocab, BLOCK=SAMPLE_CHUNK, num_warps=8
    )
    _pick[(rows,)](
        best, index, row_slots, positions, token_ids, out, chunks, token_ids.shape[1],
        BLOCK=triton.next_power_of_2(chunks), num_warps=1,
    )  # fmt: skip
    return out
