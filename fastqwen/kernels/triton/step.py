"""What stands before the layers in a decode step: tokens in, all on the device. What comes behind them is in sampling.py."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


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
