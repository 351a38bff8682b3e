"""A Decoder from a ModelConfig and named weights: the model file's names, the quantization method's linears."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastqwen import models, quant
from fastqwen.kernels import HeadShape, Ops
from fastqwen.layers.attention import Attention
from fastqwen.layers.decoder import Decoder, Layer
from fastqwen.layers.linear import DenseLinear, Norm
from fastqwen.layers.mlp import Mlp
from fastqwen.layers.moe import Moe, SharedExpert
from fastqwen.model_config import ModelConfig, MoeConfig
from fastqwen.models.names import Names
from fastqwen.weights.source import Weights


def build_decoder(
    config: ModelConfig,
    weights: Weights,
    ops: Ops,
    *,
    source: str = "config.json",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decoder:
    """``progress`` is told after each layer how many of how many are ready."""
    builder = _Builder(config, weights, ops, source)
    layers = []
    for index in range(config.num_layers):
        layers.append(builder.layer(index))
        progress(index + 1, config.num_layers)
    return builder.decoder(layers)


class _Builder:
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, source: str) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        names: Names = models.find(config.model_type).NAMES
        bare = not weights.has(f"{names.embed}.weight") and weights.has(f"{names.without_prefix().embed}.weight")
        self.names = names.without_prefix() if bare else names
        self.has_head = not bare or config.tie_word_embeddings or weights.has(f"{names.head}.weight")
        self.method = quant.find(config.quantization, source)

    def decoder(self, layers: list[Layer]) -> Decoder:
        config, names = self.config, self.names
        shape = (config.vocab_size, config.hidden_size)
        embed = self.weights.tensor(f"{names.embed}.weight", shape)
        tied = config.tie_word_embeddings or not self.has_head
        head = embed if tied else self.weights.tensor(f"{names.head}.weight", shape)
        return Decoder(
            ops=self.ops,
            embed=embed,
            layers=layers,
            norm=self.norm(names.final_norm),
            head=DenseLinear(self.ops, head, None),
            has_head=self.has_head,
        )

    def layer(self, index: int) -> Layer:
        prefix = self.names.layer.format(layer=index)
        sparse = self.config.is_sparse(index)
        return Layer(self.attention(prefix, index), self.moe(prefix) if sparse else self.mlp(prefix))

    def norm(self, name: str) -> Norm:
        return Norm(self.weights.tensor(f"{name}.weight", (self.config.hidden_size,)), self.config.rms_norm_eps)

    def attention(self, prefix: str, index: int) -> Attention:
        config, names = self.config, self.names
        sizes: tuple[int, ...] = (config.q_size, config.kv_size, config.kv_size)
        qkv = tuple(prefix + name for name in names.qkv)
        if len(qkv) == 1:
            sizes = (sum(sizes),)
        head_norms = [
            self.weights.tensor(f"{prefix}{name}.weight", (config.head_dim,)) if config.qk_norm else None
            for name in (names.q_norm, names.k_norm)
        ]
        return Attention(
            ops=self.ops,
            shape=HeadShape(config.num_heads, config.num_kv_heads, config.head_dim),
            norm=self.norm(prefix + names.attention_norm),
            qkv=self.method.linear(self.weights, qkv, config.hidden_size, sizes, config.qkv_bias, self.ops),
            o=self.method.linear(
                self.weights, (prefix + names.o,), config.q_size, (config.hidden_size,), config.o_bias, self.ops
            ),
            q_norm=head_norms[0],
            k_norm=head_norms[1],
            window=config.window(index),
        )

    def mlp(self, prefix: str) -> Mlp:
        config, names = self.config, self.names
        hidden, size = config.hidden_size, config.intermediate_size
        gate_up = tuple(prefix + name for name in names.gate_up)
        return Mlp(
            ops=self.ops,
            width=2 * size,
            norm=self.norm(prefix + names.mlp_norm),
            gate_up=self.method.linear(self.weights, gate_up, hidden, (size, size), config.mlp_bias, self.ops),
            down=self.method.linear(self.weights, (prefix + names.down,), size, (hidden,), config.mlp_bias, self.ops),
        )

    def moe(self, prefix: str) -> Moe:
        config, names, moe = self.config, self.names, self.config.moe
        assert moe is not None
        return Moe(
            ops=self.ops,
            norm=self.norm(prefix + names.mlp_norm),
            router=self.method.matrix(self.weights, prefix + names.router, moe.num_experts, config.hidden_size),
            gate_up=self.stacked(prefix, names.expert_gate_up, moe.num_experts, (moe.expert_size, config.hidden_size)),
            down=self.stacked(prefix, (names.expert_down,), moe.num_experts, (config.hidden_size, moe.expert_size)),
            experts_per_token=moe.experts_per_token,
            normalize_top_k=moe.normalize_top_k,
            shared=self.shared_expert(prefix, moe) if moe.shared_size else None,
        )

    def shared_expert(self, prefix: str, moe: MoeConfig) -> SharedExpert:
        hidden, size, names = self.config.hidden_size, moe.shared_size, self.names
        gate_up = tuple(prefix + name for name in names.shared_gate_up)
        return SharedExpert(
            gate_up=self.method.linear(self.weights, gate_up, hidden, (size, size), False, self.ops),
            down=self.method.linear(self.weights, (prefix + names.shared_down,), size, (hidden,), False, self.ops),
            gate=self.weights.tensor(f"{prefix}{names.shared_gate}.weight", (1, hidden)),
        )

    def stacked(self, prefix: str, parts: tuple[str, ...], num_experts: int, shape: tuple[int, int]) -> torch.Tensor:
        """All experts' matrices in one tensor [experts, len(parts) * shape[0], shape[1]], filled in place."""
        rows = shape[0]
        out = torch.empty(
            (num_experts, len(parts) * rows, shape[1]), dtype=self.weights.dtype, device=self.weights.device
        )
        for expert in range(num_experts):
            for index, part in enumerate(parts):
                name = prefix + part.format(expert=expert)
                out[expert, index * rows : (index + 1) * rows] = self.method.matrix(self.weights, name, *shape)
        return out
