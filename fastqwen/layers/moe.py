"""The sparse feed-forward part: a router sends each token to a few of many small MLPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastqwen.kernels import Ops
from fastqwen.layers.linear import Linear, Norm


@dataclass(frozen=True)
class SharedExpert:
    """An MLP that every token passes, weighted by a sigmoid of the token itself."""

    gate_up: Linear
    down: Linear
    gate: Tensor  # [1, hidden]

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        weight = torch.sigmoid(ops.linear(x, self.gate))
        return weight * self.down(ops.silu_mul(self.gate_up(x)))


@dataclass(frozen=True)
class Moe:
    ops: Ops
    norm: Norm
    router: Tensor  # [experts, hidden]
    gate_up: Tensor  # [experts, 2 * expert_size, hidden]
    down: Tensor  # [experts, hidden, expert_size]
    experts_per_token: int
    normalize_top_k: bool
    shared: SharedExpert | None

    def add_to(self, residual: Tensor) -> None:
        """residual [tokens, hidden] += moe(norm(residual)), in place"""
        shared = None
        if self.shared is not None:
            shared = self.shared(self.ops, self.ops.rms_norm(residual, self.norm.weight, self.norm.eps))
        self.ops.add_experts(
            residual,
            self.norm.weight,
            self.norm.eps,
            self.router,
            self.gate_up,
            self.down,
            top_k=self.experts_per_token,
            normalize=self.normalize_top_k,
        )
        if shared is not None:
            residual += shared
