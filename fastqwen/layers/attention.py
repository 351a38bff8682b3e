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
        out = self.ops.attend(
            qkv,
            batch,
            cache,
            self.shape,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            eps=self.norm.eps,
            window=self.window,
        )
        self.o.add_to(residual, out)
