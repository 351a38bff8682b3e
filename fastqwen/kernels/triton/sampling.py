"""The next tokens, on the device: the same that runner/sampler.py gives, up to the rounding of logarithms.

One pass over the logits, by many programs a row. A row that is cut (top_k, top_p, min_p) leaves a list of its largest logits,
from each program the largest ones, and a bound: no other logit is above it. One program a row then cuts and draws among the
list, and is right if what remains is above the bound: nearly always. Rows for which it is not (flat distributions) are done by
a third kernel, which looks at all logits as often as it must.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqwen.kernels.limits import LISTED, SAMPLE_CHUNK

CORRUPT = -1  # the token id that says: this row's logits were not finite
SEGMENT = tl.constexpr(64)  # neighbours in a program's share of the vocabulary: frequent tokens have neighbouring ids
NEVER = tl.constexpr(2147483647)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _noisy(x, ids, seed, position):
    """x with standard Gumbel noise, a hash of seed, position and token (sampler.py, gumbel)."""
    low = _mix32(seed.to(tl.uint32))
    high = _mix32((seed >> 32).to(tl.uint32) ^ low)
    key = _mix32(high ^ (position.to(tl.uint32) * 0x9E3779B1))
    bits = _mix32((ids.to(tl.uint32) * 0x85EBCA77) ^ key)
    bits = _mix32(bits + low)
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return x - tl.log(-tl.log(uniform))


@triton.jit
def _ordered(x):
    """float32 as uint32 of the same order, so that bisection over bits finds an exact value."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 0, bits | 0x80000000, bits ^ 0xFFFFFFFF)


@triton.jit
def _kth(keys, count):
    """The ``count``-th largest of ``keys``, or 0 if there are fewer: the largest threshold that so many reach."""
    found = tl.zeros((), dtype=tl.uint32)
    for bit in range(32):
        trial = found | (tl.full((), 1, dtype=tl.uint32) << (31 - bit))
        found = tl.where(tl.sum((keys >= trial).to(tl.int32), axis=0) >= count, trial, found)
    return found


@triton.jit
def _least_with_mass(keys, masses, wanted):
    """The largest threshold above which, itself included, there is so much mass, or 0."""
    found = tl.zeros((), dtype=tl.uint32)
    for bit in range(32):
        trial = found | (tl.full((), 1, dtype=tl.uint32) << (31 - bit))
        found = tl.where(tl.sum(tl.where(keys >= trial, masses, 0.0), axis=0) >= wanted, trial, found)
    return found


@triton.jit
def _wishes(row_slots_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab):
    """Of a row: its slot, temperature, top_k (0: none), top_p, min_p, and whether they cut anything."""
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    temperature = tl.load(temperature_ptr + slot)
    top_k, top_p, min_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot), tl.load(min_p_ptr + slot)
    top_k = tl.where(top_k < vocab, top_k, 0)
    cuts = (temperature > 0.0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
    return slot, temperature, top_k, top_p, min_p, cuts


@triton.jit
def _look(
    logits_ptr,  # [rows, vocab]
    row_slots_ptr,
    positions_ptr,  # int32 [rows]: of the token to be sampled
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,  # int64 [slots]
    best_ptr,  # float32 [rows, chunks]: the largest, with noise if nothing is cut
    index_ptr,  # int32 [rows, chunks]: its id, CORRUPT where a logit is not finite
    mass_ptr,  # float32 [rows, chunks]: of rows that are cut, the sum of exp(logit - best)
    bound_ptr,  # uint32 [rows, chunks]: of these, what no logit that is not listed is above, as ordered bits
    number_ptr,  # int32 [rows, chunks]: how many are listed
    value_ptr,  # float32 [rows, chunks, LISTED]
    id_ptr,  # int32 [rows, chunks, LISTED]
    vocab,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot, temperature, _, _, _, cuts = _wishes(
        row_slots_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab
    )
    own = tl.arange(0, BLOCK)
    ids = own // SEGMENT * (chunks * SEGMENT) + chunk * SEGMENT + own % SEGMENT
    live = ids < vocab
    x = tl.load(logits_ptr + row.to(tl.int64) * vocab + ids, mask=live, other=0.0).to(tl.float32)
    corrupt = tl.sum((tl.abs(x) < float("inf")).to(tl.int32), axis=0) < BLOCK
    x = tl.where(live, x, float("-inf"))
    if temperature > 0.0:
        x = x * (1.0 / temperature)
    place = row * chunks + chunk
    if cuts:
        largest = tl.max(x, axis=0)
        keys = _ordered(x)
        bound = _kth(keys, LISTED)
        listed = keys > bound
        spot = place * LISTED + tl.cumsum(listed.to(tl.int32), axis=0) - 1
        tl.store(value_ptr + spot, x, mask=listed)
        tl.store(id_ptr + spot, ids, mask=listed)
        tl.store(bound_ptr + place, bound)
        tl.store(number_ptr + place, tl.sum(listed.to(tl.int32), axis=0))
        tl.store(mass_ptr + place, tl.sum(tl.exp(x - largest), axis=0))
    elif temperature > 0.0:
        x = _noisy(x, ids, tl.load(seed_ptr + slot), tl.load(positions_ptr + row))
    best = tl.max(x, axis=0)
    index = tl.min(tl.where(x == best, ids, NEVER), axis=0)  # the lowest id among equals
    tl.store(best_ptr + place, best)
    tl.store(index_ptr + place, tl.where(corrupt, -1, index))


@triton.jit
def _put(token, row, slot, position, token_ids_ptr, out_ptr, length):
    tl.store(token_ids_ptr + slot * length + position, tl.where(token < 0, 0, token))
    tl.store(out_ptr + row, token)


@triton.jit
def _pick(
    best_ptr,
    index_ptr,
    mass_ptr,
    bound_ptr,
    number_ptr,
    value_ptr,
    id_ptr,
    row_slots_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    token_ids_ptr,  # int32 [slots, length]; the new token is written here
    out_ptr,  # int32 [rows]
    left_ptr,  # int32 [rows]: 1 where the lists do not suffice
    vocab,
    chunks,
    length,
    LISTED: tl.constexpr,
    CHUNKS: tl.constexpr,  # a power of two, at least chunks
):
    row = tl.program_id(0)
    slot, _, top_k, top_p, min_p, cuts = _wishes(
        row_slots_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab
    )
    position = tl.load(positions_ptr + row)
    each = tl.arange(0, CHUNKS)
    here = each < chunks
    best = tl.load(best_ptr + row * chunks + each, mask=here, other=float("-inf"))
    index = tl.load(index_ptr + row * chunks + each, mask=here, other=NEVER)
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, index, NEVER), axis=0)
    suffices = row >= 0
    if cuts:
        bound = tl.max(tl.load(bound_ptr + row * chunks + each, mask=here, other=0), axis=0)
        masses = tl.load(mass_ptr + row * chunks + each, mask=here, other=0.0)
        spot = tl.arange(0, CHUNKS * LISTED)
        number = tl.load(number_ptr + row * chunks + spot // LISTED, mask=spot // LISTED < chunks, other=0)
        live = spot % LISTED < number
        x = tl.load(value_ptr + row * chunks * LISTED + spot, mask=live, other=float("-inf"))
        ids = tl.load(id_ptr + row * chunks * LISTED + spot, mask=live, other=0)
        keys = tl.where(live, _ordered(x), 0)
        cut = tl.zeros((), dtype=tl.uint32)
        if top_k > 0:
            cut = _kth(keys, top_k)
            suffices = cut > bound
        if top_p < 1.0:
            shares = tl.where(live & (keys >= cut), tl.exp(x - largest), 0.0)
            mass = tl.sum(shares, axis=0)
            if top_k == 0:
                mass = tl.sum(masses * tl.exp(best - largest), axis=0)
            cut = tl.maximum(cut, _least_with_mass(keys, shares, mass * top_p))
        if min_p > 0.0:
            cut = tl.maximum(cut, _ordered(largest + tl.log(min_p)))
        suffices = suffices & (cut > bound)
        noisy = _noisy(x, ids, tl.load(seed_ptr + slot), position)
        noisy = tl.where(live & (keys >= cut), noisy, float("-inf"))
        token = tl.min(tl.where(live & (noisy == tl.max(noisy, axis=0)), ids, NEVER), axis=0)
    if tl.min(index, axis=0) < 0:
        token = tl.full((), -1, dtype=tl.int32)
        suffices = row >= 0
    tl.store(left_ptr + row, 1 - suffices.to(tl.int32))
    if suffices:
        _put(token, row, slot, position, token_ids_ptr, out_ptr, length)


@triton.jit
def _scaled(line, start, at, vocab, inverse):
    return tl.load(line + start + at, mask=start + at < vocab, other=float("-inf")).to(tl.float32) * inverse


@triton.jit
def _look_again(
    logits_ptr,
    left_ptr,
    row_slots_ptr,
    positions_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seed_ptr,
    token_ids_ptr,
    out_ptr,
    vocab,
    length,
    BLOCK: tl.constexpr,
):
    """Rows that are left: one program each, which walks the vocabulary once for each bit of a threshold."""
    row = tl.program_id(0)
    if tl.load(left_ptr + row) == 0:
        return
    slot, temperature, top_k, top_p, min_p, _ = _wishes(
        row_slots_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, vocab
    )
    line, inverse, at = logits_ptr + row.to(tl.int64) * vocab, 1.0 / temperature, tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        tops = tl.maximum(tops, _scaled(line, start, at, vocab, inverse))
    top = tl.max(tops, axis=0)
    cut = tl.zeros((), dtype=tl.uint32)
    if top_k > 0:
        for bit in range(32):
            trial = cut | (tl.full((), 1, dtype=tl.uint32) << (31 - bit))
            count = tl.zeros((BLOCK,), dtype=tl.int32)
            for start in range(0, vocab, BLOCK):
                reach = _ordered(_scaled(line, start, at, vocab, inverse)) >= trial
                count += (reach & (start + at < vocab)).to(tl.int32)
            cut = tl.where(tl.sum(count, axis=0) >= top_k, trial, cut)
    if top_p < 1.0:
        mass = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            x = _scaled(line, start, at, vocab, inverse)
            mass += tl.where(_ordered(x) >= cut, tl.exp(x - top), 0.0)
        wanted = tl.sum(mass, axis=0) * top_p
        found = tl.zeros((), dtype=tl.uint32)
        for bit in range(32):
            trial = found | (tl.full((), 1, dtype=tl.uint32) << (31 - bit))
            mass = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, vocab, BLOCK):
                x = _scaled(line, start, at, vocab, inverse)
                mass += tl.where(_ordered(x) >= tl.maximum(trial, cut), tl.exp(x - top), 0.0)
            found = tl.where(tl.sum(mass, axis=0) >= wanted, trial, found)
        cut = tl.maximum(cut, found)
    if min_p > 0.0:
        cut = tl.maximum(cut, _ordered(top + tl.log(min_p)))
    seed, position = tl.load(seed_ptr + slot), tl.load(positions_ptr + row)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    index = tl.full((BLOCK,), 0, dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        x = _scaled(line, start, at, vocab, inverse)
        noisy = tl.where(_ordered(x) >= cut, _noisy(x, start + at, seed, position), float("-inf"))
        index = tl.where(noisy > best, start + at, index)
        best = tl.maximum(best, noisy)
    token = tl.min(tl.where(best == tl.max(best, axis=0), index, NEVER), axis=0)
    _put(token, row, slot, position, token_ids_ptr, out_ptr, length)


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
    listed: int = LISTED,
) -> Tensor:
    """The next token of each row, int32 [rows], CORRUPT where logits are not finite; also written into ``token_ids``.

    logits [rows, vocab]; row_slots, positions int32 [rows]; the other tensors are per slot. The same tokens as
    runner/sampler.py gives, up to the rounding of logarithms. ``listed`` logits of each chunk are kept at most, one fewer in fact.
    """
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, SAMPLE_CHUNK)

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    best, mass = scratch(rows, chunks, dtype=torch.float32), scratch(rows, chunks, dtype=torch.float32)
    index, number, bound = scratch(rows, chunks), scratch(rows, chunks), scratch(rows, chunks, dtype=torch.uint32)
    value, ids = scratch(rows, chunks, listed, dtype=torch.float32), scratch(rows, chunks, listed)
    out, left = scratch(rows), scratch(rows)
    wishes = (row_slots, positions, temperature, top_k, top_p, min_p, seed)
    _look[(rows, chunks)](
        logits,
        *wishes,
        best,
        index,
        mass,
        bound,
        number,
        value,
        ids,
        vocab,
        LISTED=listed,
        BLOCK=SAMPLE_CHUNK,
        num_warps=8,
    )
    _pick[(rows,)](
        best, index, mass, bound, number, value, ids, *wishes, token_ids, out, left, vocab, chunks, token_ids.shape[1],
        LISTED=listed, CHUNKS=triton.next_power_of_2(chunks), num_warps=8,
    )  # fmt: skip
    _look_again[(rows,)](logits, left, *wishes, token_ids, out, vocab, token_ids.shape[1], BLOCK=8192, num_warps=16)
    return out
