"""The dense feed-forward part: down(silu(gate) * up)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastqwen.kernels import Norm, Ops, StepTokens
from fastqwen.layers.linear import Linear


@dataclass(frozen=True)
class Mlp:
    ops: Ops
    norm: Norm
    width: int  # of gate and up together
    gate_up: Linear
    down: Linear

    def add_to(self, residual: Tensor, step: StepTokens) -> None:
        """residual [tokens, hidden] += mlp(norm(residual)), in place"""
        tokens = residual.shape[0]
        at_once = self.ops.feed_forward_rows(tokens, self.width)
        for start in range(0, tokens, at_once):
            rows, part = residual[start : start + at_once], step.part(start, start + at_once)
            self.down.add_to(rows, self.gate_up.gated_of_norm(rows, self.norm, part), part)
