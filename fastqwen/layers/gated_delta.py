"""A gated delta rule in attention's place: each sequence keeps a memory of fixed size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastqwen.kernels import DeltaParts, DeltaState, Norm, Ops, StateRoom, StepTokens
from fastqwen.layers.linear import Linear


@dataclass(frozen=True)
class GatedDelta:
    ops: Ops
    norm: Norm
    project: Linear  # to queries, keys, values, z, b and a
    out: Linear
    parts: DeltaParts

    def make_state(self, room: StateRoom) -> DeltaState:
        shape, slots = self.parts.shape, room.num_slots
        size = (slots, shape.num_value_heads, shape.key_dim, shape.value_dim)
        dtype = self.ops.activation_dtype(self.parts.conv.dtype)
        inputs = torch.zeros((slots, shape.taps, shape.channels), dtype=dtype, device=room.device)
        return DeltaState(torch.zeros(size, dtype=torch.float32, device=room.device), inputs)

    def add_to(self, residual: Tensor, step: StepTokens, state: DeltaState) -> None:
        """residual [tokens, hidden] += delta(norm(residual)), in place"""
        projected = self.project.of_norm(residual, self.norm, step)
        self.out.add_to(residual, self.ops.gated_delta(projected, step, state, self.parts), step)
