"""From rows to flat tokens, for the reference and the CPU: everything that the decoder needs to know of a step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastqwen.kernels import AttentionBatch, RowSpans
from fastqwen.layers.rotary import logn_scale
from fastqwen.records import Row
from fastqwen.runner.slots import Slots


def pack(rows: list[Row], slots: Slots, *, block_size: int, logn_len: int | None) -> tuple[Tensor, AttentionBatch]:
    """The ids of a step's tokens, int32 [tokens], and where they belong. Rows follow each other in order."""
    device = slots.token_ids.device
    host = np.array([(row.slot, row.start, row.num_tokens) for row in rows], dtype=np.int64)
    row_slots, starts, counts = slots.upload(host).unbind(1)
    row_starts = torch.zeros(len(rows) + 1, dtype=torch.int64, device=device)
    torch.cumsum(counts, 0, out=row_starts[1:])
    num_tokens = sum(row.num_tokens for row in rows)
    token_rows = torch.repeat_interleave(torch.arange(len(rows), device=device), counts, output_size=num_tokens)
    positions = torch.arange(num_tokens, device=device) - row_starts[token_rows] + starts[token_rows]
    token_slots = row_slots[token_rows]
    blocks = slots.block_tables[token_slots, positions // block_size].long()
    return slots.token_ids[token_slots, positions], AttentionBatch(
        positions=positions.int(),
        cos_sin=cos_sin(positions, slots.inverse_frequencies[token_slots], slots.rope_scale[token_slots]),
        q_scale=None if logn_len is None else logn_scale(positions, logn_len),
        token_tables=token_slots.int(),
        block_tables=slots.block_tables,
        num_decode_rows=next((index for index, row in enumerate(rows) if row.num_tokens > 1), len(rows)),
        rows=RowSpans(
            tables=row_slots.int(),
            starts=row_starts.int(),
            context_lens=(starts + counts).int(),
            cache_slots=blocks * block_size + positions % block_size,
        ),
    )


def cos_sin(positions: Tensor, inverse_frequencies: Tensor, scale: Tensor) -> Tensor:
    """positions [tokens], frequencies [tokens, head_dim/2], scale [tokens] -> float32 [tokens, head_dim]"""
    angles = positions[:, None].float() * inverse_frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * scale[:, None]
