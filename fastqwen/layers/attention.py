"""Self-attention over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastqwen.kernels import AttentionParts, LayerCache, Norm, Ops, StateRoom, StepTokens
from fastqwen.layers.linear import Linear


@dataclass(frozen=True)
class Attention:
    ops: Ops
    norm: Norm
    qkv: Linear
    o: Linear
    parts: AttentionParts
    gated: bool = False  # behind the values, qkv has a gate for each number of what attention gives

    def make_state(self, room: StateRoom) -> LayerCache:
        shape = self.parts.shape
        size = (room.num_blocks, shape.num_kv_heads, room.block_size, shape.head_dim)
        k, v = (torch.empty(size, dtype=room.cache_dtype, device=room.device) for _ in range(2))
        if room.cache_dtype.itemsize > 1:
            return LayerCache(k, v)
        k_scale, v_scale = (torch.empty(size[:-1], dtype=torch.float16, device=room.device) for _ in range(2))
        return LayerCache(k, v, k_scale, v_scale)

    def add_to(self, residual: Tensor, step: StepTokens, state: LayerCache) -> None:
        """residual [tokens, hidden] += attention(norm(residual)), in place"""
        qkv = self.qkv.of_norm(residual, self.norm, step)
        found = self.ops.attend(qkv, step, state, self.parts)
        if self.gated:
            self.ops.multiply_by_sigmoid(found, qkv[:, self.parts.shape.width :])
        self.o.add_to(residual, found, step)
