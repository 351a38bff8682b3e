"""The sparse feed-forward part: a router sends each token to a few of many small MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastqwen.kernels import DenseWeight, ExpertsWeight, Norm, Ops, StepTokens
from fastqwen.kernels.reference import chosen_experts
from fastqwen.layers.linear import Linear
from fastqwen.sharding import World


class Experts(Protocol):
    """A layer's routed experts, however they are stored."""

    def add_to(self, out: Tensor, residual: Tensor, norm: Norm, step: StepTokens) -> None:
        """out [tokens, hidden] += experts(norm(residual)), in place; ``out`` may be ``residual``"""


@dataclass(frozen=True)
class DenseExperts:
    ops: Ops
    weight: ExpertsWeight

    def add_to(self, out: Tensor, residual: Tensor, norm: Norm, step: StepTokens) -> None:
        self.ops.add_experts(out, residual, norm, self.weight)


@dataclass(frozen=True)
class PackedExperts:
    """Each expert as two matrices of its own, packed: a step reads those that its tokens chose, one after the other."""

    ops: Ops
    router: DenseWeight  # [experts, hidden]
    experts: Sequence[tuple[Linear, Linear]]  # gate and up as one, and down
    top_k: int
    normalize: bool  # the chosen experts' chances are brought to a sum of 1

    def add_to(self, out: Tensor, residual: Tensor, norm: Norm, step: StepTokens) -> None:
        logits = self.ops.linear(self.ops.rms_norm(residual, norm), self.router)
        chances, ids = chosen_experts(logits, self.top_k, self.normalize)
        found = torch.zeros(residual.shape, dtype=torch.float32)
        for expert in ids.unique().tolist():  # in their order, which is a token's own
            gate_up, down = self.experts[expert]
            token, choice = (ids == expert).nonzero(as_tuple=True)
            hidden = gate_up.gated_of_norm(residual[token], norm, step)
            found.index_add_(0, token, down(hidden, step) * chances[token, choice, None])
        out += found


@dataclass(frozen=True)
class SharedExpert:
    """An MLP that every token passes, weighted by a sigmoid of the token itself."""

    gate_up: Linear
    down: Linear
    gate: DenseWeight  # [1, hidden]

    def __call__(self, ops: Ops, x: Tensor, step: StepTokens) -> Tensor:
        weight = torch.sigmoid(ops.linear(x, self.gate))
        return weight * self.down(ops.silu_mul(self.gate_up(x, step)), step)


@dataclass(frozen=True)
class Moe:
    ops: Ops
    norm: Norm
    experts: Experts
    shared: SharedExpert | None
    world: World

    def add_to(self, residual: Tensor, step: StepTokens) -> None:
        """residual [tokens, hidden] += moe(norm(residual)), in place"""
        shared = None
        if self.shared is not None:
            shared = self.shared(self.ops, self.ops.rms_norm(residual, self.norm), step)
        out = residual if self.world.index == 0 else torch.zeros_like(residual)
        self.experts.add_to(out, residual, self.norm, step)
        if shared is not None:
            out += shared
        if out is not residual:
            residual.copy_(out)
        self.world.all_reduce(residual)
