"""The dense feed-forward part: down(silu(gate) * up)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastqwen.layers.linear import Linear, Norm


@dataclass(frozen=True)
class Mlp:
    norm: Norm
    gate_up: Linear
    down: Linear

    def add_to(self, residual: Tensor) -> None:
        """residual [tokens, hidden] += mlp(norm(residual)), in place"""
        self.down.add_to(residual, self.gate_up.gated_of_norm(residual, self.norm))
