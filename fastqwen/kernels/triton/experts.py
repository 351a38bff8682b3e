"""Mixture of experts: the router's choice, products grouped by expert, and the weighted sum, without asking the host.

A pair is one token with one of its experts. Each expert has a list of its pairs; the order in a list depends on timing,
the results do not, because a row's arithmetic does not depend on its place in a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastqwen.kernels import ExpertsWeight, Norm
from fastqwen.kernels.triton.launch import Card, card_of, overlapping, stages_that_fit, supports_overlap


@triton.jit
def _keys(x, at):
    """Numbers that sort like (x, lower index first), all different and none below zero; NaN is behind all others."""
    bits = tl.where(x == x, x, float("-inf")).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000
    return (ordered << 16) | (65535 - at)


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
    TOP_K_2: tl.constexpr,  # the next power of two
    NORMALIZE: tl.constexpr,
    ROUND_TO: tl.constexpr,
    LISTS: tl.constexpr,  # whether each expert's pairs are listed as well
    BLOCK_T: tl.constexpr,  # tokens of a program, a warp each
    PDL: tl.constexpr,
):
    """Each token's experts by falling chance, among equals the lower id first."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = tl.arange(0, PADDED)[None, :]
    choice = tl.arange(0, TOP_K_2)[None, :]
    here = (token < tokens)[:, None]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = logits_ptr + token[:, None] * EXPERTS
    x = tl.load(row + at, mask=here & (at < EXPERTS), other=float("-inf")).to(tl.float32)
    shifted = tl.exp(x - tl.max(x, axis=1)[:, None])
    total = tl.sum(shifted, axis=1)
    left = tl.where(at < EXPERTS, _keys(x, at), -1)
    expert = tl.zeros((BLOCK_T, TOP_K_2), dtype=tl.int32)
    chance = tl.zeros((BLOCK_T, TOP_K_2), dtype=tl.float32)
    for index in tl.static_range(TOP_K):
        best = tl.max(left, axis=1)[:, None]
        found = 65535 - (best & 0xFFFF).to(tl.int32)
        expert = tl.where(choice == index, found, expert)
        chance = tl.where(choice == index, tl.sum(tl.where(at == found, shifted, 0.0), axis=1)[:, None], chance)
        left = tl.where(left == best, -1, left)
    chance = chance / total[:, None]
    if NORMALIZE:
        chance = chance / tl.sum(chance, axis=1)[:, None]
    given = here & (choice < TOP_K)
    pair = token[:, None] * TOP_K + choice
    tl.store(ids_ptr + pair, expert, mask=given)
    tl.store(weights_ptr + pair, chance.to(ROUND_TO).to(tl.float32), mask=given)
    if LISTS:
        place = tl.atomic_add(counts_ptr + expert, 1, mask=given)
        tl.store(members_ptr + expert * tokens + place, pair, mask=given)


@triton.jit
def _tile(x_ptr, w_ptr, out_ptr, weights_ptr, members_ptr, tokens, k_size, n_size, expert, start, count,
          TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
          GATED: tl.constexpr, PER_PAIR: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The pairs from ``start`` on of an expert that has ``count``, for the program's outputs."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = start + tl.arange(0, BLOCK_M)
    live_m, live_n = m < count, n < n_size
    pair = tl.load(members_ptr + expert * tokens + m, mask=live_m, other=0)
    source = pair if PER_PAIR else pair // TOP_K
    x_rows = x_ptr + source.to(tl.int64)[:, None] * k_size
    heights = 2 if GATED else 1
    w_rows = w_ptr + (expert * n_size * heights + n)[:, None] * k_size
    up_rows = w_rows + tl.cast(n_size, tl.int64) * k_size
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


@triton.jit(do_not_specialize=["tokens"])
def _grouped(
    x_ptr,  # [rows, k]: a row per token (PER_PAIR false) or per pair
    w_ptr,  # [EXPERTS, n, k], or [EXPERTS, 2 * n, k] if GATED
    out_ptr,  # [pairs, n]
    weights_ptr,
    counts_ptr,
    members_ptr,
    tokens,
    k_size,
    n_size,
    EXPERTS: tl.constexpr,
    PADDED: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    PER_PAIR: tl.constexpr,
    EVEN_K: tl.constexpr,
    HALVES: tl.constexpr,  # an expert's last tile may have half the height
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of one expert's pairs times a tile of its outputs; gated: silu(gate) * up; else: times the pair's weight.

    The experts' tiles follow each other; a program finds its own from the experts' counts.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    every = tl.arange(0, PADDED)
    counts = tl.load(counts_ptr + every, mask=every < EXPERTS, other=0)
    tiles = tl.cdiv(counts, BLOCK_M)
    ends = tl.cumsum(tiles, axis=0)
    index = tl.program_id(1)
    expert = tl.sum((ends <= index).to(tl.int32), axis=0)
    if expert >= EXPERTS:
        return
    count = tl.sum(tl.where(every == expert, counts, 0), axis=0)
    start = (index - tl.sum(tl.where(every < expert, tiles, 0), axis=0)) * BLOCK_M
    if HALVES and count - start <= BLOCK_M // 2:
        _tile(
            x_ptr, w_ptr, out_ptr, weights_ptr, members_ptr, tokens, k_size, n_size, expert.to(tl.int64), start, count,
            TOP_K, BLOCK_M // 2, BLOCK_N, BLOCK_K, GATED, PER_PAIR, EVEN_K, PRECISION,
        )  # fmt: skip
    else:
        _tile(
            x_ptr, w_ptr, out_ptr, weights_ptr, members_ptr, tokens, k_size, n_size, expert.to(tl.int64), start, count,
            TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, GATED, PER_PAIR, EVEN_K, PRECISION,
        )  # fmt: skip


@triton.jit
def _sum_pairs(pairs_ptr, out_ptr, counts_ptr, size, TOP_K: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
               PADDED: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Each token's weighted results on top of its residual; and the counts are zero again for the next layer."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        total += tl.load(pairs_ptr + (token * TOP_K + choice) * size + at, mask=at < size, other=0.0).to(tl.float32)
    total += tl.load(out_ptr + token * size + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * size + at, total.to(out_ptr.dtype.element_ty), mask=at < size)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        every = tl.arange(0, PADDED)
        tl.store(counts_ptr + every, tl.zeros((PADDED,), dtype=tl.int32), mask=every < EXPERTS)


@triton.jit
def _one_token_up(
    residual_ptr,  # [K]
    norm_ptr,  # [K]
    ids_ptr,  # int32 [TOP_K]
    w_ptr,  # [EXPERTS, 2 * n, K]
    out_ptr,  # float32 [TOP_K, n]
    n_size,
    eps,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: silu(gate) * up of one of its experts, as many outputs as registers hold weights for."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = (n < n_size)[:, None] & (k < K)[None, :]
    gain = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()  # not before: the next kernel reads the ids without waiting for this one
    expert = tl.load(ids_ptr + tl.program_id(1), cache_modifier=".cg").to(tl.int64)
    rows = w_ptr + (expert * 2 * n_size + n)[:, None] * K + k[None, :]
    gate = tl.load(rows, mask=inside, other=0.0)
    up = tl.load(rows + tl.cast(n_size, tl.int64) * K, mask=inside, other=0.0)
    x = tl.load(residual_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
    x = (x * scale * gain).to(residual_ptr.dtype.element_ty).to(tl.float32)
    y = tl.sum(gate.to(tl.float32) * x[None, :], axis=1)
    y = y / (1.0 + tl.exp(-y)) * tl.sum(up.to(tl.float32) * x[None, :], axis=1)
    tl.store(out_ptr + tl.program_id(1) * n_size + n, y, mask=n < n_size)


@triton.jit
def _one_token_down(
    inner_ptr,  # float32 [TOP_K, K]
    ids_ptr,  # int32 [TOP_K]
    weights_ptr,  # float32 [TOP_K]
    w_ptr,  # [EXPERTS, n, K]
    out_ptr,  # [n], added to in place
    n_size,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_K_2: tl.constexpr,  # the next power of two
    PDL: tl.constexpr,
):
    """One token: the weighted sum of its experts' second products, their weights loaded while the first ones run."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    choice = tl.arange(0, TOP_K_2)
    given = choice < TOP_K
    if PDL:
        gdc_launch_dependents()
    # Past the first-level cache: the kernel in front of the one in front wrote them.
    expert = tl.load(ids_ptr + choice, mask=given, other=0, cache_modifier=".cg").to(tl.int64)
    weight = tl.load(weights_ptr + choice, mask=given, other=0.0, cache_modifier=".cg")
    inside = given[:, None, None] & (n < n_size)[None, :, None] & (k < K)[None, None, :]
    place = (expert[:, None, None] * n_size + n[None, :, None]) * K + k[None, None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0)
    if PDL:
        gdc_wait()
    known = given[:, None] & (k < K)[None, :]
    inner = tl.load(inner_ptr + choice[:, None] * K + k[None, :], mask=known, other=0.0) * weight[:, None]
    y = tl.sum(tl.sum(w.to(tl.float32) * inner[:, None, :], axis=2), axis=0)
    y += tl.load(out_ptr + n, mask=n < n_size, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < n_size)


@dataclass(frozen=True)
class GroupTiling:
    block_m: int
    block_n: int  # of the second product
    gate_n: int  # of the first one, which has two accumulators
    block_k: int
    num_warps: int
    num_stages: int


def group_tiling(pairs: int, num_experts: int, element_bytes: int, card: Card) -> GroupTiling:
    """By how many pairs an expert has on average; a tile should hold most experts' pairs, or be full. As many stages as fit."""
    t = _group_tiling(pairs / num_experts, element_bytes) if card.has_dots else WITHOUT_DOTS
    stage_bytes = (t.block_m + max(t.block_n, 2 * t.gate_n)) * t.block_k * element_bytes
    return replace(t, num_stages=stages_that_fit(t.num_stages, stage_bytes, card))


WITHOUT_DOTS = GroupTiling(16, 32, 16, 32, 4, 1)


def _group_tiling(average: float, element_bytes: int) -> GroupTiling:
    if element_bytes > 2:  # shared memory holds half as much
        return GroupTiling(16, 64, 32, 64, 4, 3) if average <= 8 else GroupTiling(64, 64, 64, 64, 4, 2)
    if average <= 8:
        return GroupTiling(16, 64, 64, 128, 4, 4)
    if average <= 24:
        return GroupTiling(32, 64, 64, 128, 4, 3)
    if average <= 64:
        return GroupTiling(64, 64, 64, 128, 4, 3)
    return GroupTiling(128, 256, 128, 64, 8, 4)


def route(
    logits: Tensor, counts: Tensor | None, *, top_k: int, normalize: bool, lists: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [tokens, experts] -> ids int32 and weights float32 [tokens, top_k]; with ``lists`` each expert's pairs
    int32 [experts, tokens], as many as ``counts`` int32 [experts] says then, which must be zero before."""
    (tokens, num_experts), device = logits.shape, logits.device
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    members = torch.empty((num_experts, tokens if lists else 0), dtype=torch.int32, device=device)
    pdl = supports_overlap(device)
    block_t = 4 if tokens > 256 else 1  # more warps run at once on a multiprocessor than programs of one
    _route[(triton.cdiv(tokens, block_t),)](
        logits, ids, weights, counts, members, tokens,
        EXPERTS=num_experts, PADDED=triton.next_power_of_2(num_experts), TOP_K=top_k,
        TOP_K_2=triton.next_power_of_2(top_k), NORMALIZE=normalize, ROUND_TO=_TYPES[logits.dtype], LISTS=lists, PDL=pdl,
        BLOCK_T=block_t, num_warps=block_t, **overlapping(pdl),
    )  # fmt: skip
    return ids, weights, members


def add_experts(
    out: Tensor,
    x: Tensor,
    logits: Tensor,
    experts: ExpertsWeight,
    counts: Tensor,
    *,
    tiling: GroupTiling | None = None,
) -> None:
    """out [tokens, hidden] += the chosen experts of x [tokens, hidden], in place; logits [tokens, experts]

    counts int32 [experts] is scratch that must be zero, and is again afterwards.
    """
    gate_up, down, top_k = experts.gate_up, experts.down, experts.top_k
    tokens, hidden = x.shape
    num_experts, size = gate_up.shape[0], gate_up.shape[1] // 2
    pairs = tokens * top_k
    _, weights, members = route(logits, counts, top_k=top_k, normalize=experts.normalize, lists=True)
    pdl = supports_overlap(x.device)
    launch = overlapping(pdl)
    padded = triton.next_power_of_2(num_experts)
    many: dict[str, Any] = {"EXPERTS": num_experts, "PADDED": padded, "TOP_K": top_k, "PDL": pdl}
    t = tiling or group_tiling(pairs, num_experts, x.element_size(), card_of(x.device))
    num_tiles = min(num_experts, pairs) + pairs // t.block_m
    many |= {"BLOCK_M": t.block_m, "BLOCK_K": t.block_k, "HALVES": t.block_m >= 128}
    many |= {"PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}
    launch |= {"num_warps": t.num_warps, "num_stages": t.num_stages}
    inner = torch.empty((pairs, size), dtype=x.dtype, device=x.device)
    _grouped[(triton.cdiv(size, t.gate_n), num_tiles)](
        x, gate_up, inner, weights, counts, members, tokens, hidden, size,
        BLOCK_N=t.gate_n, GATED=True, PER_PAIR=False, EVEN_K=hidden % t.block_k == 0, **many, **launch,
    )  # fmt: skip
    parts = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    _grouped[(triton.cdiv(hidden, t.block_n), num_tiles)](
        inner, down, parts, weights, counts, members, tokens, size, hidden,
        BLOCK_N=t.block_n, GATED=False, PER_PAIR=True, EVEN_K=size % t.block_k == 0, **many, **launch,
    )  # fmt: skip
    _sum_pairs[(tokens, triton.cdiv(hidden, 1024))](
        parts, out, counts, hidden,
        TOP_K=top_k, BLOCK=1024, EXPERTS=num_experts, PADDED=padded, PDL=pdl, **overlapping(pdl),
    )  # fmt: skip


@dataclass(frozen=True)
class OneTiling:
    up_n: int
    up_warps: int
    down_n: int
    down_warps: int


ONE_TILING = OneTiling(4, 8, 2, 8)


def add_experts_of_one(
    out: Tensor,
    residual: Tensor,
    norm: Norm,
    logits: Tensor,
    experts: ExpertsWeight,
    *,
    tiling: OneTiling = ONE_TILING,
) -> None:
    """The same for a single token, residual [1, hidden], with the norm inside."""
    hidden, size, top_k = residual.shape[1], experts.gate_up.shape[1] // 2, experts.top_k
    ids, weights, _ = route(logits, None, top_k=top_k, normalize=experts.normalize, lists=False)
    inner = torch.empty((top_k, size), dtype=torch.float32, device=residual.device)
    pdl = supports_overlap(residual.device)
    _one_token_up[(triton.cdiv(size, tiling.up_n), top_k)](
        residual, norm.weight, ids, experts.gate_up, inner, size, norm.eps,
        K=hidden, BLOCK_K=triton.next_power_of_2(hidden), BLOCK_N=tiling.up_n, PDL=pdl,
        num_warps=tiling.up_warps, num_stages=1, **overlapping(pdl),
    )  # fmt: skip
    _one_token_down[(triton.cdiv(hidden, tiling.down_n),)](
        inner, ids, weights, experts.down, out, hidden,
        K=size, BLOCK_K=triton.next_power_of_2(size), BLOCK_N=tiling.down_n, TOP_K=top_k,
        TOP_K_2=triton.next_power_of_2(top_k), PDL=pdl,
        num_warps=tiling.down_warps, num_stages=1, **overlapping(pdl),
    )  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
