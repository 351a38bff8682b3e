"""Self-attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastqwen.kernels import AttentionBatch, HeadShape, LayerCache, Ops
from fastqwen.layers.linear import Linear, Norm


@dataclass(frozen=True)
class Attention:
    ops: Ops
    shape: HeadShape
    norm: Norm
    qkv: Linear
    o: Linear
    q_norm: Tensor | None  # [head_dim]
    k_norm: Tensor | None  # [head_dim]
    window: int | None

    def add_to(self, residual: Tensor, batch: AttentionBatch, cache: LayerCache) -> None:
        """residual [tokens, hidden] += attention(norm(residual)), in place"""
        qkv = self.qkv.of_norm(residual, self.norm)
        q = self.ops.rope_and_cache(qkv, batch, cache, self.shape, self.q_norm, self.k_norm, self.norm.eps)
        self.o.add_to(residual, self.ops.attention(q, batch, cache, self.shape, self.window))
