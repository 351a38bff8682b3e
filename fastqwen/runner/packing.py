"""From rows to flat tokens, for the reference and the CPU: everything that the decoder needs to know of a step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastqwen.kernels import StepTokens
from fastqwen.layers.rotary import logn_scale
from fastqwen.records import Row
from fastqwen.runner.slots import Slots
from fastqwen.runner.step_layout import count_decode_rows


def pack(rows: list[Row], slots: Slots, *, logn_len: int | None) -> tuple[Tensor, StepTokens]:
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
    return slots.token_ids[token_slots, positions], StepTokens(
        positions=positions.int(),
        slots=token_slots.int(),
        row_starts=row_starts.int(),
        cos_sin=cos_sin(positions, slots.inverse_frequencies[token_slots], slots.rope_scale[token_slots]),
        q_scale=None if logn_len is None else logn_scale(positions, logn_len),
        block_tables=slots.block_tables,
        num_decode_rows=count_decode_rows(rows),
        held=slots.upload(np.array([row.start + row.repeats for row in rows], dtype=np.int32)),
    )


def cos_sin(positions: Tensor, inverse_frequencies: Tensor, scale: Tensor) -> Tensor:
    """positions [tokens], frequencies [tokens, rotary_dim/2], scale [tokens] -> float32 [tokens, rotary_dim]"""
    angles = positions[:, None].float() * inverse_frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1) * scale[:, None]
