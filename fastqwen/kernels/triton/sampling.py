"""The next tokens, on the device: the same that runner/sampler.py gives, up to the rounding of logarithms.

One pass over the logits, by many programs a row, each with a chunk of the vocabulary: they bend the logits (penalties, biases,
tokens that must not come yet, a grammar's mask), and leave their largest one. A row that is cut (top_k, top_p, min_p) gets a
list of each chunk's largest logits, and a bound: no other logit is above it. One program a row then cuts and draws among the
lists, and is right if what remains is above the bound: nearly always. Rows for which it is not (flat distributions) are done by
a third kernel, which looks at all logits as often as it must, and which tells log-probabilities: of the model's own logits,
from lists of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastqwen.kernels import limits
from fastqwen.kernels.limits import LISTED, SAMPLE_CHUNK
from fastqwen.kernels.triton.wishes import NUM_TOLD, WISH_WORDS, bent, cuts_of, seed_of

CORRUPT = -1  # the token id that says: this row's logits were not finite
SEGMENT = tl.constexpr(64)  # neighbours in a program's share of the vocabulary: frequent tokens have neighbouring ids
NEVER = tl.constexpr(2147483647)
MAX_TOLD = tl.constexpr(limits.MAX_TOLD)
TOLD_WORDS = 2 + 2 * limits.MAX_TOLD  # of a row: the chosen token's log-probability and rank, the others', their ids

# Words of what a program leaves of its chunk; behind them two lists of LISTED: numbers, ids.
BEST = tl.constexpr(0)  # the largest number, with noise if nothing is cut
INDEX = tl.constexpr(1)  # its id, CORRUPT where a logit is not finite
MASS = tl.constexpr(2)  # of lists: the sum of exp(number - the largest)
BOUND = tl.constexpr(3)  # of lists: what no number that is not listed is above, as ordered bits
HEAD = tl.constexpr(4)


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
def _list(x, ids, part_ptr, LISTED: tl.constexpr):
    """A chunk's largest numbers with their ids, of equal ones any, the sum of all, and the bound."""
    keys = _ordered(x)
    bound = _kth(keys, LISTED)
    above, equal = (keys > bound).to(tl.int32), (keys == bound).to(tl.int32)
    before = tl.cumsum(above + (equal << 16), axis=0)  # two sums in one: a chunk has fewer than 65,536 numbers
    spot = tl.where(above == 1, before & 0xFFFF, tl.sum(above, axis=0) + (before >> 16)) - 1
    listed = (keys >= bound) & (spot < LISTED)
    tl.store(part_ptr + HEAD + spot, x.to(tl.int32, bitcast=True), mask=listed)
    tl.store(part_ptr + HEAD + LISTED + spot, ids, mask=listed)
    best = tl.max(x, axis=0)
    tl.store(part_ptr + BEST, best.to(tl.int32, bitcast=True))
    tl.store(part_ptr + MASS, tl.sum(tl.exp(x - best), axis=0).to(tl.int32, bitcast=True))
    tl.store(part_ptr + BOUND, bound.to(tl.int32, bitcast=True))


@triton.jit
def _look(
    logits_ptr,  # [rows, vocab]
    raw_ptr,  # [rows, vocab]: the model's own logits, whose probabilities are told
    row_slots_ptr,
    positions_ptr,  # int32 [rows]: of the token to be sampled
    wishes_ptr,  # int32 [slots, WISH_WORDS]
    bent_ptr,  # int32 [slots, MAX_BENT, 2]: ids, and what is added to their logits
    token_ids_ptr,  # int32 [slots, length]
    allowed_ptr,  # int32 [rows, vocab / 32], if MASKED: a bit for each token
    parts_ptr,  # int32 [rows, chunks, HEAD + 2 * LISTED]
    told_ptr,  # int32 [rows, chunks, HEAD + 2 * MAX_TOLD]: the same of the model's own logits
    vocab,
    length,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    row, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    slot, position = tl.load(row_slots_ptr + row).to(tl.int64), tl.load(positions_ptr + row)
    temperature, _, _, _, cuts = cuts_of(wishes_ptr, slot, vocab)
    own = tl.arange(0, BLOCK)
    ids = own // SEGMENT * (chunks * SEGMENT) + chunk * SEGMENT + own % SEGMENT
    live = ids < vocab
    place = row * chunks + chunk
    if tl.load(wishes_ptr + slot * WISH_WORDS + NUM_TOLD) >= 0:
        x = tl.load(raw_ptr + row.to(tl.int64) * vocab + ids, mask=live, other=float("-inf")).to(tl.float32)
        _list(x, ids, told_ptr + place * (HEAD + 2 * MAX_TOLD), MAX_TOLD)
    x = tl.load(logits_ptr + row.to(tl.int64) * vocab + ids, mask=live, other=0.0).to(tl.float32)
    corrupt = tl.sum((tl.abs(x) < float("inf")).to(tl.int32), axis=0) < BLOCK
    x = bent(x, ids, live, row, slot, position, wishes_ptr, bent_ptr, token_ids_ptr, allowed_ptr,
              vocab, length, MASKED)  # fmt: skip
    x = tl.where(live, x, float("-inf"))
    if temperature > 0.0:
        x = x * (1.0 / temperature)
    part = parts_ptr + place * (HEAD + 2 * LISTED)
    if cuts:
        _list(x, ids, part, LISTED)
    elif temperature > 0.0:
        x = _noisy(x, ids, seed_of(wishes_ptr, slot), position)
    best = tl.max(x, axis=0)
    index = tl.min(tl.where(x == best, ids, NEVER), axis=0)  # the lowest id among equals
    tl.store(part + BEST, best.to(tl.int32, bitcast=True))
    tl.store(part + INDEX, tl.where(corrupt, -1, index))


@triton.jit
def _put(token, row, slot, position, token_ids_ptr, out_ptr, length):
    tl.store(token_ids_ptr + slot * length + position, tl.where(token < 0, 0, token))
    tl.store(out_ptr + row, token)


@triton.jit
def _column(parts_ptr, row, word, chunks, other, CHUNKS: tl.constexpr, LISTED: tl.constexpr):
    """One word of each chunk of a row, int32 [CHUNKS]"""
    each = tl.arange(0, CHUNKS)
    start = parts_ptr + row * chunks * (HEAD + 2 * LISTED) + word
    return tl.load(start + each * (HEAD + 2 * LISTED), mask=each < chunks, other=other)


@triton.jit
def _listed_in(parts_ptr, row, chunks, CHUNKS: tl.constexpr, LISTED: tl.constexpr):
    """The lists of a row: numbers, -inf where there is none, and ids [CHUNKS * LISTED]"""
    spot = tl.arange(0, CHUNKS * LISTED)
    start = parts_ptr + (row * chunks + spot // LISTED) * (HEAD + 2 * LISTED) + HEAD + spot % LISTED
    live = spot // LISTED < chunks
    x = tl.load(start, mask=live, other=0).to(tl.float32, bitcast=True)
    return tl.where(live, x, float("-inf")), tl.load(start + LISTED, mask=live, other=0)


LOWEST = tl.constexpr(-8388608)  # the bits of -inf


@triton.jit
def _pick(
    parts_ptr,
    row_slots_ptr,
    positions_ptr,
    wishes_ptr,
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
    slot, position = tl.load(row_slots_ptr + row).to(tl.int64), tl.load(positions_ptr + row)
    _, top_k, top_p, min_p, cuts = cuts_of(wishes_ptr, slot, vocab)
    best = _column(parts_ptr, row, BEST, chunks, LOWEST, CHUNKS, LISTED).to(tl.float32, bitcast=True)
    index = _column(parts_ptr, row, INDEX, chunks, NEVER, CHUNKS, LISTED)
    largest = tl.max(best, axis=0)
    token = tl.min(tl.where(best == largest, index, NEVER), axis=0)
    suffices = row >= 0
    if cuts:
        bounds = _column(parts_ptr, row, BOUND, chunks, 0, CHUNKS, LISTED).to(tl.uint32, bitcast=True)
        bound = tl.max(bounds, axis=0)
        masses = _column(parts_ptr, row, MASS, chunks, 0, CHUNKS, LISTED).to(tl.float32, bitcast=True)
        x, ids = _listed_in(parts_ptr, row, chunks, CHUNKS, LISTED)
        live = x > float("-inf")
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
        noisy = _noisy(x, ids, seed_of(wishes_ptr, slot), position)
        noisy = tl.where(live & (keys >= cut), noisy, float("-inf"))
        token = tl.min(tl.where(live & (noisy == tl.max(noisy, axis=0)), ids, NEVER), axis=0)
    if tl.min(index, axis=0) < 0:
        token = tl.full((), -1, dtype=tl.int32)
        suffices = row >= 0
    tl.store(left_ptr + row, 1 - suffices.to(tl.int32))
    if suffices:
        _put(token, row, slot, position, token_ids_ptr, out_ptr, length)


@triton.jit
def _bent_part(start, row, slot, position, logits_ptr, wishes_ptr, bent_ptr, token_ids_ptr, allowed_ptr, vocab,
               length, inverse, BLOCK: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Bent logits over the temperature of ids from ``start`` on, -inf behind the last."""
    ids = start + tl.arange(0, BLOCK)
    live = ids < vocab
    x = tl.load(logits_ptr + row.to(tl.int64) * vocab + ids, mask=live, other=0.0).to(tl.float32)
    x = bent(x, ids, live, row, slot, position, wishes_ptr, bent_ptr, token_ids_ptr, allowed_ptr,
              vocab, length, MASKED)  # fmt: skip
    return tl.where(live, x * inverse, float("-inf"))


@triton.jit
def _look_again(
    logits_ptr,
    row,
    row_slots_ptr,
    positions_ptr,
    wishes_ptr,
    bent_ptr,
    token_ids_ptr,
    allowed_ptr,
    vocab,
    length,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A row's token by walking the vocabulary once for each bit of a threshold."""
    slot, position = tl.load(row_slots_ptr + row).to(tl.int64), tl.load(positions_ptr + row)
    temperature, top_k, top_p, min_p, _ = cuts_of(wishes_ptr, slot, vocab)
    inverse, at = 1.0 / temperature, tl.arange(0, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        x = _bent_part(start, row, slot, position, logits_ptr, wishes_ptr, bent_ptr, token_ids_ptr,
                       allowed_ptr, vocab, length, inverse, BLOCK, MASKED)  # fmt: skip
        tops = tl.maximum(tops, x)
    top = tl.max(tops, axis=0)
    cut = tl.zeros((), dtype=tl.uint32)
    if top_k > 0:
        for bit in range(32):
            trial = cut | (tl.full((), 1, dtype=tl.uint32) << (31 - bit))
            count = tl.zeros((BLOCK,), dtype=tl.int32)
            for start in range(0, vocab, BLOCK):
                x = _bent_part(start, row, slot, position, logits_ptr, wishes_ptr, bent_ptr, token_ids_ptr,
                               allowed_ptr, vocab, length, inverse, BLOCK, MASKED)  # fmt: skip
                count += ((_ordered(x) >= trial) & (start + at < vocab)).to(tl.int32)
            cut = tl.where(tl.sum(count, axis=0) >= top_k, trial, cut)
    if top_p < 1.0:
        mass = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            x = _bent_part(start, row, slot, position, logits_ptr, wishes_ptr, bent_ptr, token_ids_ptr,
                           allowed_ptr, vocab, length, inverse, BLOCK, MASKED)  # fmt: skip
            mass += tl.where(_ordered(x) >= cut, tl.exp(x - top), 0.0)
        wanted = tl.sum(mass, axis=0) * top_p
        found = tl.zeros((), dtype=tl.uint32)
        for bit in range(32):
            trial = found | (tl.full((), 1, dtype=tl.uint32) << (31 - bit))
            mass = tl.zeros((BLOCK,), dtype=tl.float32)
            for start in range(0, vocab, BLOCK):
                x = _bent_part(start, row, slot, position, logits_ptr, wishes_ptr, bent_ptr, token_ids_ptr,
                               allowed_ptr, vocab, length, inverse, BLOCK, MASKED)  # fmt: skip
                mass += tl.where(_ordered(x) >= tl.maximum(trial, cut), tl.exp(x - top), 0.0)
            found = tl.where(tl.sum(mass, axis=0) >= wanted, trial, found)
        cut = tl.maximum(cut, found)
    if min_p > 0.0:
        cut = tl.maximum(cut, _ordered(top + tl.log(min_p)))
    seed = seed_of(wishes_ptr, slot)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    index = tl.full((BLOCK,), 0, dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        x = _bent_part(start, row, slot, position, logits_ptr, wishes_ptr, bent_ptr, token_ids_ptr,
                       allowed_ptr, vocab, length, inverse, BLOCK, MASKED)  # fmt: skip
        noisy = tl.where(_ordered(x) >= cut, _noisy(x, start + at, seed, position), float("-inf"))
        index = tl.where(noisy > best, start + at, index)
        best = tl.maximum(best, noisy)
    return tl.min(tl.where(best == tl.max(best, axis=0), index, NEVER), axis=0)


@triton.jit
def _tell(raw_ptr, row, token, num_told, told_ptr, out_ptr, vocab, chunks, BLOCK: tl.constexpr, CHUNKS: tl.constexpr):
    """The chosen token's log-probability and rank, and the most likely tokens' in any order."""
    best = _column(told_ptr, row, BEST, chunks, LOWEST, CHUNKS, MAX_TOLD).to(tl.float32, bitcast=True)
    masses = _column(told_ptr, row, MASS, chunks, 0, CHUNKS, MAX_TOLD).to(tl.float32, bitcast=True)
    top = tl.max(best, axis=0)
    total = top + tl.log(tl.sum(tl.where(best > float("-inf"), masses * tl.exp(best - top), 0.0), axis=0))
    line = raw_ptr + row.to(tl.int64) * vocab
    chosen = tl.load(line + tl.maximum(token, 0)).to(tl.float32) - total
    more = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = tl.load(line + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        more += (x - total > chosen).to(tl.int32)
    out = out_ptr + row * (2 + 2 * MAX_TOLD)
    tl.store(out, chosen.to(tl.int32, bitcast=True))
    tl.store(out + 1, tl.sum(more, axis=0) + 1)
    x, ids = _listed_in(told_ptr, row, chunks, CHUNKS, MAX_TOLD)
    keys = _ordered(x)
    bound = _kth(keys, num_told)
    above, equal = (keys > bound).to(tl.int32), (keys == bound).to(tl.int32)
    before = tl.cumsum(above + (equal << 16), axis=0)
    spot = tl.where(above == 1, before & 0xFFFF, tl.sum(above, axis=0) + (before >> 16)) - 1
    listed = (keys >= bound) & (spot < num_told)
    tl.store(out + 2 + spot, (x - total).to(tl.int32, bitcast=True), mask=listed)
    tl.store(out + 2 + MAX_TOLD + spot, ids, mask=listed)


@triton.jit
def _finish(
    logits_ptr,
    raw_ptr,
    left_ptr,
    row_slots_ptr,
    positions_ptr,
    wishes_ptr,
    bent_ptr,
    token_ids_ptr,
    allowed_ptr,
    told_ptr,
    out_ptr,
    out_told_ptr,  # int32 [rows, 2 + 2 * MAX_TOLD]
    vocab,
    chunks,
    length,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows that are left, and what is to be told: one program a row, which has nothing to do for most."""
    row = tl.program_id(0)
    slot = tl.load(row_slots_ptr + row).to(tl.int64)
    left, num_told = tl.load(left_ptr + row), tl.load(wishes_ptr + slot * WISH_WORDS + NUM_TOLD)
    token = tl.load(out_ptr + row)
    if left != 0:
        token = _look_again(
            logits_ptr, row, row_slots_ptr, positions_ptr, wishes_ptr, bent_ptr, token_ids_ptr, allowed_ptr,
            vocab, length, BLOCK, MASKED,
        )  # fmt: skip
        _put(token, row, slot, tl.load(positions_ptr + row), token_ids_ptr, out_ptr, length)
    if num_told >= 0:
        _tell(raw_ptr, row, token, num_told, told_ptr, out_told_ptr, vocab, chunks, BLOCK, CHUNKS)


def sample(
    logits: Tensor,
    row_slots: Tensor,
    positions: Tensor,
    *,
    wishes: Tensor,
    bent: Tensor,
    token_ids: Tensor,
    raw: Tensor | None = None,
    allowed: Tensor | None = None,
    listed: int = LISTED,
) -> tuple[Tensor, Tensor]:
    """The next token of each row, int32 [rows], CORRUPT where logits are not finite; also written into ``token_ids``. And what
    is told of rows that wish it: int32 [rows, TOLD_WORDS], float32 numbers as their bits.

    logits [rows, vocab]; row_slots, positions int32 [rows]. By slot: wishes (kernels/wishes.py), bent int32
    [slots, MAX_BENT, 2], token_ids int32 [slots, length]. ``raw`` [rows, vocab] are the model's own
    logits, where those were changed since; ``allowed`` int32 [rows, vocab / 32] has a bit for each token that may come.
    ``listed`` logits of each chunk are kept. The same tokens as runner/sampler.py gives, up to the rounding of logarithms.
    """
    rows, vocab = logits.shape
    chunks = triton.cdiv(vocab, SAMPLE_CHUNK)

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=logits.device)

    parts, told = scratch(rows, chunks, 4 + 2 * listed), scratch(rows, chunks, 4 + 2 * limits.MAX_TOLD)
    out, left, out_told = scratch(rows), scratch(rows), scratch(rows, TOLD_WORDS)
    raw, length, masked = logits if raw is None else raw, token_ids.shape[1], allowed is not None
    where, all_chunks = (row_slots, positions), triton.next_power_of_2(chunks)
    _look[(rows, chunks)](
        logits, raw, *where, wishes, bent, token_ids, allowed, parts, told, vocab, length,
        LISTED=listed, BLOCK=SAMPLE_CHUNK, MASKED=masked, num_warps=8,
    )  # fmt: skip
    _pick[(rows,)](
        parts,
        *where,
        wishes,
        token_ids,
        out,
        left,
        vocab,
        chunks,
        length,
        LISTED=listed,
        CHUNKS=all_chunks,
        num_warps=8,
    )
    _finish[(rows,)](
        logits, raw, left, *where, wishes, bent, token_ids, allowed, told, out, out_told, vocab, chunks, length,
        BLOCK=8192, CHUNKS=all_chunks, MASKED=masked, num_warps=16,
    )  # fmt: skip
    return out, out_told
