"""Mixture of experts: the router's choice, products grouped by expert, and the weighted sum, without asking the host.

A pair is one token with one of its experts. Each expert has a list of its pairs; the order in a list depends on timing,
the results do not, because a row's arithmetic does not depend on its place in a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["tokens"])
def _route(
    logits_ptr,  # [tokens, EXPERTS]
    ids_ptr,  # int32 [tokens, TOP_K]
    weights_ptr,  # float32 [tokens, TOP_K]
    counts_ptr,  # int32 [EXPERTS], zero before
    members_ptr,  # int32 [EXPERTS, tokens]: each expert's pairs
    tokens,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROUND_TO: tl.constexpr,
):
    token = tl.program_id(0)
    at = tl.arange(0, PADDED)
    x = tl.load(logits_ptr + token * EXPERTS + at, mask=at < EXPERTS, other=float("-inf")).to(tl.float32)
    chances = tl.exp(x - tl.max(x, axis=0))
    chances = chances / tl.sum(chances, axis=0)
    left = tl.where(at < EXPERTS, chances, -1.0)
    picked = 0.0
    if NORMALIZE:
        for _ in range(TOP_K):
            best = tl.max(left, axis=0)
            first = tl.min(tl.where(left == best, at, PADDED), axis=0)
            picked += best
            left = tl.where(at == first, -1.0, left)
        left = tl.where(at < EXPERTS, chances, -1.0)
    for choice in range(TOP_K):
        best = tl.max(left, axis=0)
        expert = tl.min(tl.where(left == best, at, PADDED), axis=0)
        left = tl.where(at == expert, -1.0, left)
        weight = best / picked if NORMALIZE else best
        pair = token * TOP_K + choice
        tl.store(ids_ptr + pair, expert)
        tl.store(weights_ptr + pair, weight.to(ROUND_TO).to(tl.float32))
        rank = tl.atomic_add(counts_ptr + expert, 1)
        tl.store(members_ptr + expert * tokens + rank, pair)


@triton.jit(do_not_specialize=["tokens"])
def _grouped(
    x_ptr,  # [rows, k]: a row per token (PER_PAIR false) or per pair
    w_ptr,  # [EXPERTS, n, k], or [EXPERTS, 2 * n, k] if GATED
    out_ptr,  # [pairs, n]
    ids_ptr,
    weights_ptr,
    counts_ptr,
    members_ptr,
    tokens,
    k_size,
    n_size,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    PER_PAIR: tl.constexpr,
    SINGLE: tl.constexpr,  # one token: program i has pair i, no lists are needed
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of one expert's pairs times a tile of its outputs; gated: silu(gate) * up; else: times the pair's weight."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    if SINGLE:
        expert = tl.load(ids_ptr + tl.program_id(1)).to(tl.int64)
        live_m = m < 1
        pair = tl.zeros((BLOCK_M,), dtype=tl.int32) + tl.program_id(1)
    else:
        expert = tl.program_id(1).to(tl.int64)
        count = tl.load(counts_ptr + expert)
        start = tl.program_id(2) * BLOCK_M
        if start >= count:
            return
        live_m = start + m < count
        pair = tl.load(members_ptr + expert * tokens + start + m, mask=live_m, other=0)
    live_n = n < n_size
    source = pair if PER_PAIR else pair // TOP_K
    x_rows = x_ptr + source.to(tl.int64)[:, None] * k_size
    heights = 2 if GATED else 1
    w_rows = w_ptr + (expert * n_size * heights + n)[:, None] * k_size
    up_rows = w_rows + n_size.to(tl.int64) * k_size
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, k_size, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        in_k = k < k_size
        if EVEN_K:
            x = tl.load(x_rows + k[None, :], mask=live_m[:, None], other=0.0)
            w = tl.load(w_rows + k[None, :], mask=live_n[:, None], other=0.0)
        else:
            x = tl.load(x_rows + k[None, :], mask=live_m[:, None] & in_k[None, :], other=0.0)
            w = tl.load(w_rows + k[None, :], mask=live_n[:, None] & in_k[None, :], other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if GATED:
            if EVEN_K:
                up = tl.load(up_rows + k[None, :], mask=live_n[:, None], other=0.0)
            else:
                up = tl.load(up_rows + k[None, :], mask=live_n[:, None] & in_k[None, :], other=0.0)
            acc_up = tl.dot(x, tl.trans(up), acc_up, input_precision=PRECISION)
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    else:
        acc *= tl.load(weights_ptr + pair, mask=live_m, other=0.0)[:, None]
    place = pair.to(tl.int64)[:, None] * n_size + n[None, :]
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=live_m[:, None] & live_n[None, :])


@triton.jit
def _sum_pairs(pairs_ptr, out_ptr, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        total += tl.load(pairs_ptr + (token * TOP_K + choice) * size + at, mask=at < size, other=0.0).to(tl.float32)
    total += tl.load(out_ptr + token * size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * size + at, total.to(out_ptr.dtype.element_ty), mask=at < size)


def add_experts(
    residual: Tensor,
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    top_k: int,
    normalize: bool,
) -> None:
    """residual [tokens, hidden] += the chosen experts of x, in place; shapes as in the Ops table's route_and_add"""
    tokens, hidden = x.shape
    num_experts, size = gate_up.shape[0], gate_up.shape[1] // 2
    pairs = tokens * top_k

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    ids, weights = make(tokens, top_k, dtype=torch.int32), make(tokens, top_k, dtype=torch.float32)
    counts = torch.zeros(num_experts, dtype=torch.int32, device=x.device)
    members = make(num_experts, tokens, dtype=torch.int32)
    _route[(tokens,)](
        logits, ids, weights, counts, members, tokens,
        EXPERTS=num_experts, PADDED=triton.next_power_of_2(num_experts), TOP_K=top_k, NORMALIZE=normalize,
        ROUND_TO=_TYPES[x.dtype], num_warps=1,
    )  # fmt: skip
    block_m = 16 if pairs <= 24 * num_experts else 64 if pairs <= 128 * num_experts else 128
    large = block_m == 128
    block_n, block_k = (128, 64) if large else (32, 128)
    grid = (top_k, 1) if tokens == 1 else (num_experts, triton.cdiv(tokens, block_m))
    common = {
        "TOP_K": top_k, "BLOCK_M": block_m, "BLOCK_K": block_k, "SINGLE": tokens == 1,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "num_warps": 8 if large else 4, "num_stages": 3 if large else 4,
    }  # fmt: skip
    inner = make(pairs, size, dtype=x.dtype)
    gate_n = 64 if large else block_n  # two accumulators
    _grouped[(triton.cdiv(size, gate_n), *grid)](
        x, gate_up, inner, ids, weights, counts, members, tokens, hidden, size,
        BLOCK_N=gate_n, GATED=True, PER_PAIR=False, EVEN_K=hidden % block_k == 0, **common,
    )  # fmt: skip
    parts = make(pairs, hidden, dtype=x.dtype)
    _grouped[(triton.cdiv(hidden, block_n), *grid)](
        inner, down, parts, ids, weights, counts, members, tokens, size, hidden,
        BLOCK_N=block_n, GATED=False, PER_PAIR=True, EVEN_K=size % block_k == 0, **common,
    )  # fmt: skip
    _sum_pairs[(tokens, triton.cdiv(hidden, 1024))](parts, residual, hidden, TOP_K=top_k, BLOCK=1024)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
