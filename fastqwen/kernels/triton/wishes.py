"""Logits as a request wishes them: what a slot's line of wishes (kernels/wishes.py) says, and how it bends its logits."""

from __future__ import annotations

import triton
import triton.language as tl

from fastqwen.kernels import limits, wishes

FORBIDDEN = tl.constexpr(-1e30)  # as sampler.py has it
MAX_BENT = tl.constexpr(limits.MAX_BENT)
MAX_COUNT = tl.constexpr(wishes.MAX_COUNT)

# Words of a slot's wishes.
WISH_WORDS = tl.constexpr(limits.WISH_WORDS)
SEED = tl.constexpr(wishes.COLUMN["seed"] // 2)  # in words of 64 bits
COUNTS = tl.constexpr(wishes.COLUMN["counts"] // 2)
TEMPERATURE = tl.constexpr(wishes.COLUMN["temperature"])
TOP_K = tl.constexpr(wishes.COLUMN["top_k"])
TOP_P = tl.constexpr(wishes.COLUMN["top_p"])
MIN_P = tl.constexpr(wishes.COLUMN["min_p"])
REPETITION = tl.constexpr(wishes.COLUMN["repetition_penalty"])
PRESENCE = tl.constexpr(wishes.COLUMN["presence_penalty"])
FREQUENCY = tl.constexpr(wishes.COLUMN["frequency_penalty"])
BENDS = tl.constexpr(wishes.COLUMN["bends"])
NUM_BIASES = tl.constexpr(wishes.COLUMN["num_biases"])
NUM_BENT = tl.constexpr(wishes.COLUMN["num_bent"])
LEAST_END = tl.constexpr(wishes.COLUMN["least_end"])
NUM_COUNTED = tl.constexpr(wishes.COLUMN["num_counted"])
NUM_TOLD = tl.constexpr(wishes.COLUMN["num_told"])


@triton.jit
def float_at(ptr):
    return tl.load(ptr).to(tl.float32, bitcast=True)


@triton.jit
def cuts_of(wishes_ptr, slot, vocab):
    """Of a slot: temperature, top_k (0: none), top_p, min_p, and whether they cut anything."""
    line = wishes_ptr + slot * WISH_WORDS
    temperature, top_k = float_at(line + TEMPERATURE), tl.load(line + TOP_K)
    top_p, min_p = float_at(line + TOP_P), float_at(line + MIN_P)
    top_k = tl.where(top_k < vocab, top_k, 0)
    cuts = (temperature > 0.0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0))
    return temperature, top_k, top_p, min_p, cuts


@triton.jit
def _long_at(wishes_ptr, slot, place: tl.constexpr):
    return tl.load(wishes_ptr.to(tl.pointer_type(tl.int64), bitcast=True) + slot * (WISH_WORDS // 2) + place)


@triton.jit
def seed_of(wishes_ptr, slot):
    return _long_at(wishes_ptr, slot, SEED)


@triton.jit
def _penalized(x, ids, live, slot, position, wishes_ptr, token_ids_ptr, length):
    """Repetition, presence and frequency penalties, as sampler.py's; the sequence's newest token is counted first, once."""
    line = wishes_ptr + slot * WISH_WORDS
    newest = tl.load(token_ids_ptr + slot * length + tl.maximum(position - 1, 0))
    repetition, presence, frequency = float_at(line + REPETITION), float_at(line + PRESENCE), float_at(line + FREQUENCY)
    if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
        counts_ptr = _long_at(wishes_ptr, slot, COUNTS).to(tl.pointer_type(tl.int16))
        counts = tl.load(counts_ptr + ids, mask=live, other=0).to(tl.int32) & 0xFFFF
        fresh = live & (ids == newest) & (tl.load(line + NUM_COUNTED) < position)
        counts = tl.where(fresh & ((counts & MAX_COUNT) < MAX_COUNT), counts + 1, counts)
        tl.store(counts_ptr + ids, counts.to(tl.int16), mask=fresh)
        if tl.sum(fresh.to(tl.int32), axis=0) > 0:
            tl.store(line + NUM_COUNTED, position)
        repeated = tl.where(x > 0.0, x / repetition, x * repetition)
        repeated = tl.minimum(tl.maximum(repeated, FORBIDDEN), -FORBIDDEN)
        said = (counts & MAX_COUNT).to(tl.float32)
        x = tl.where(counts != 0, repeated, x) - (frequency * said + tl.where(said > 0.0, presence, 0.0))
    return x


@triton.jit
def bent(x, ids, live, row, slot, position, wishes_ptr, bent_ptr, token_ids_ptr, allowed_ptr, vocab, length,
          MASKED: tl.constexpr):  # fmt: skip
    """Logits with all that a request wishes of them before they are cut."""
    line = wishes_ptr + slot * WISH_WORDS
    if tl.load(line + BENDS) != 0:
        x = _penalized(x, ids, live, slot, position, wishes_ptr, token_ids_ptr, length)
        biases, early = tl.load(line + NUM_BIASES), position < tl.load(line + LEAST_END)
        for number in range(tl.load(line + NUM_BENT)):
            entry = bent_ptr + (slot * MAX_BENT + number) * 2
            hit = ids == tl.load(entry)
            x = tl.where(hit & (number < biases), x + float_at(entry + 1), x)
            x = tl.where(hit & (number >= biases) & early, FORBIDDEN, x)
    if MASKED:
        words = allowed_ptr + row.to(tl.int64) * tl.cdiv(vocab, 32)
        bits = tl.load(words + ids // 32, mask=live, other=0) >> (ids % 32)
        x = tl.where((bits & 1) == 1, x, FORBIDDEN)
    return x
