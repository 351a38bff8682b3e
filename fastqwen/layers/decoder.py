"""A decoder: embedding, layers, final norm, head. It knows neither where its weights came from nor how they are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fastqwen.kernels import AttentionBatch, LayerCache, Ops
from fastqwen.layers.attention import Attention
from fastqwen.layers.linear import Linear, Norm
from fastqwen.layers.mlp import Mlp
from fastqwen.layers.moe import Moe


@dataclass(frozen=True)
class Layer:
    attention: Attention
    mlp: Mlp | Moe


@dataclass(frozen=True)
class Decoder:
    ops: Ops
    embed: Tensor  # [vocab, hidden]
    layers: Sequence[Layer]
    norm: Norm
    head: Linear
    has_head: bool = True  # False: the checkpoint has none, and the embedding stands in its place

    def hidden(self, ids: Tensor, batch: AttentionBatch, caches: Sequence[LayerCache]) -> Tensor:
        """Advance the cache by a step's tokens: ids int32 [tokens] -> [tokens, hidden], before the final norm"""
        residual = self.ops.embed(ids, self.embed)
        self.advance(residual, batch, caches)
        return residual

    def advance(self, residual: Tensor, batch: AttentionBatch, caches: Sequence[LayerCache]) -> None:
        """All layers, in place: residual [tokens, hidden] comes in as embeddings"""
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.attention.add_to(residual, batch, cache)
            layer.mlp.add_to(residual)

    def final(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> the same, after the final norm: what the head reads, and what embeddings are made of"""
        return self.ops.rms_norm(hidden, self.norm.weight, self.norm.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab], in the type that the device's sampler reads"""
        return self.head.of_norm(hidden, self.norm)
