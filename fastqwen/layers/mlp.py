"""The dense feed-forward part: down(silu(gate) * up)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastqwen.kernels import Ops
from fastqwen.layers.linear import Linear, Norm


@dataclass(frozen=True)
class Mlp:
    ops: Ops
    norm: Norm
    width: int  # of gate and up together
    gate_up: Linear
    down: Linear

    def add_to(self, residual: Tensor) -> None:
        """residual [tokens, hidden] += mlp(norm(residual)), in place"""
        for rows in residual.split(self.ops.feed_forward_rows(residual.shape[0], self.width)):
            self.down.add_to(rows, self.gate_up.gated_of_norm(rows, self.norm))
