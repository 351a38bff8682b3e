"""A Decoder from a ModelConfig and named weights: the model file's names, the quantization method's linears, and of each
matrix the part that this shard holds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from fastqwen import models, quant
from fastqwen.kernels import AttentionParts, DenseWeight, HeadShape, Norm, Ops
from fastqwen.layers.attention import Attention
from fastqwen.layers.decoder import Decoder, Embedding, FileEmbedding, Layer
from fastqwen.layers.linear import DenseLinear, GatheredLinear, Linear, SummedLinear
from fastqwen.layers.mlp import Mlp
from fastqwen.layers.moe import Moe, SharedExpert
from fastqwen.model_config import ModelConfig, MoeConfig
from fastqwen.models.names import Names
from fastqwen.quant import ExpertsSpec, LinearSpec, dense
from fastqwen.sharding import VOCAB_UNIT, Alone, HeadSplit, Part, Ranges, World, behind, even_ranges, even_size
from fastqwen.weights.source import Weights

log = logging.getLogger(__name__)


def build_decoder(
    config: ModelConfig,
    weights: Weights,
    ops: Ops,
    *,
    source: str = "config.json",
    world: World = Alone(),  # noqa: B008 it has no state
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decoder:
    """``progress`` is told after each layer how many of how many are ready."""
    builder = _Builder(config, weights, ops, source, world)
    layers = []
    for index in range(config.num_layers):
        layers.append(builder.layer(index))
        progress(index + 1, config.num_layers)
    return builder.decoder(layers)


class _Builder:
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, source: str, world: World) -> None:
        self.config = config
        self.local = config.local(world.count)
        self.weights = weights
        self.ops = ops
        self.world = world
        names: Names = models.find(config.model_type).NAMES
        bare = not weights.has(f"{names.embed}.weight") and weights.has(f"{names.without_prefix().embed}.weight")
        self.names = names.without_prefix() if bare else names
        self.has_head = not bare or config.tie_word_embeddings or weights.has(f"{names.head}.weight")
        self.method = quant.find(config.quantization, source)

    def decoder(self, layers: list[Layer]) -> Decoder:
        config, names, world = self.config, self.names, self.world
        shape = (config.vocab_size, config.hidden_size)
        part = None if world.count == 1 else Part(0, even_ranges(config.vocab_size, world, VOCAB_UNIT))
        embed, own_head = f"{names.embed}.weight", f"{names.head}.weight"
        if config.tie_word_embeddings and not self.weights.has(embed) and self.weights.has(own_head):
            embed = own_head  # either of two tensors that are one
        tied = (config.tie_word_embeddings and not self.is_untied(embed, own_head, shape)) or not self.has_head
        first, linear = self.tables(embed, embed if tied else own_head, shape, part)
        return Decoder(
            ops=self.ops,
            embed=first,
            layers=layers,
            norm=self.norm(names.final_norm),
            head=linear if world.count == 1 else GatheredLinear(linear, world, config.vocab_size),
            has_head=self.has_head,
        )

    def tables(
        self, embed: str, head: str, shape: tuple[int, int], part: Part | None
    ) -> tuple[Embedding | FileEmbedding, Linear]:
        """The embedding, of which a step reads some rows, and the head, which may be the same tensor."""
        weights = self.weights
        takes_codes = part is None and self.ops.takes_codes(weights.dtype)
        rows, table = weights.rows(embed, shape) if takes_codes else None, None
        first: Embedding | FileEmbedding
        if rows is not None:
            first = FileEmbedding(rows)
        else:
            table = weights.tensor(embed, shape, part=part)
            first_id = self.world.index * even_size(shape[0], self.world.count, VOCAB_UNIT)
            first = Embedding(table, first_id, self.world)
        if takes_codes and weights.rows(head, shape) is not None:
            spec = LinearSpec((head.removesuffix(".weight"),), shape[1], (shape[0],), bias=False)
            return first, dense.Dense().linear(weights, spec, self.ops)
        if table is None or head != embed:
            table = weights.tensor(head, shape, part=part)
        return first, DenseLinear(self.ops, DenseWeight(table))

    def is_untied(self, embed: str, head: str, shape: tuple[int, int]) -> bool:
        """Whether a checkpoint that says that both are one holds two: then both count, as in transformers."""
        if embed == head or not self.weights.has(head) or self.weights.is_same(embed, head, shape):
            return False
        log.warning(
            "tie_word_embeddings is true, but %s differs from %s: the checkpoint's own head is used", head, embed
        )
        return True

    def layer(self, index: int) -> Layer:
        prefix = self.names.layer.format(layer=index)
        sparse = self.config.is_sparse(index)
        return Layer(self.attention(prefix, index), self.moe(prefix) if sparse else self.mlp(prefix))

    def norm(self, name: str) -> Norm:
        return Norm(self.weights.tensor(f"{name}.weight", (self.config.hidden_size,)), self.config.rms_norm_eps)

    def attention(self, prefix: str, index: int) -> Attention:
        config, local, names = self.config, self.local, self.names
        split = HeadSplit.of(config.num_heads, config.num_kv_heads, self.world.count)
        queries, keys = (lines(self.world.index, config.head_dim) for lines in (split.queries, split.keys))
        sizes: tuple[int, ...] = (config.q_size, config.kv_size, config.kv_size)
        outputs: tuple[Ranges, ...] = (queries, keys, keys)
        if len(names.qkv) == 1:
            q, k = config.q_size, config.kv_size
            sizes, outputs = (sum(sizes),), ((*queries, *behind(keys, q), *behind(keys, q + k)),)
        q_norm, k_norm = (
            self.weights.tensor(f"{prefix}{name}.weight", (config.head_dim,)) if config.qk_norm else None
            for name in (names.q_norm, names.k_norm)
        )
        shape = HeadShape(local.num_heads, local.num_kv_heads, config.head_dim, config.rotary_dim)
        return Attention(
            ops=self.ops,
            norm=self.norm(prefix + names.attention_norm),
            qkv=self.split(prefix, names.qkv, config.hidden_size, sizes, config.qkv_bias, outputs),
            o=self.summed(prefix + names.o, config.q_size, config.o_bias, queries),
            parts=AttentionParts(shape, q_norm, k_norm, config.rms_norm_eps, config.window(index)),
        )

    def mlp(self, prefix: str) -> Mlp:
        config, names = self.config, self.names
        gate_up, down = self.gated(prefix, names.gate_up, names.down, config.intermediate_size, config.mlp_bias)
        return Mlp(
            ops=self.ops,
            width=2 * self.local.intermediate_size,
            norm=self.norm(prefix + names.mlp_norm),
            gate_up=gate_up,
            down=self.with_sum(down),
        )

    def moe(self, prefix: str) -> Moe:
        config, names, moe = self.config, self.names, self.config.moe
        assert moe is not None
        spec = ExpertsSpec(
            router=prefix + names.router,
            gate_up=(prefix + names.expert_gate_up[0], prefix + names.expert_gate_up[1]),
            down=prefix + names.expert_down,
            num_experts=moe.num_experts,
            hidden_size=config.hidden_size,
            expert_size=moe.expert_size,
            inner=None if self.world.count == 1 else even_ranges(moe.expert_size, self.world, config.expert_unit),
            top_k=moe.experts_per_token,
            normalize=moe.normalize_top_k,
        )
        return Moe(
            ops=self.ops,
            norm=self.norm(prefix + names.mlp_norm),
            experts=self.method.experts(self.weights, spec, self.ops),
            shared=self.shared_expert(prefix, moe) if moe.shared_size else None,
            world=self.world,
        )

    def shared_expert(self, prefix: str, moe: MoeConfig) -> SharedExpert:
        names = self.names
        gate_up, down = self.gated(prefix, names.shared_gate_up, names.shared_down, moe.shared_size, bias=False)
        gate = self.weights.tensor(f"{prefix}{names.shared_gate}.weight", (1, self.config.hidden_size))
        return SharedExpert(gate_up, down, DenseWeight(gate))

    def gated(self, prefix: str, gate_up: tuple[str, str], down: str, size: int, bias: bool) -> tuple[Linear, Linear]:
        """A gated MLP's matrices; the second one's result is this shard's part of a sum."""
        hidden, inner = self.config.hidden_size, even_ranges(size, self.world, self.config.inner_unit)
        first = self.split(prefix, gate_up, hidden, (size, size), bias, (inner, inner))
        return first, self.linear(LinearSpec((prefix + down,), size, (hidden,), bias), inputs=inner)

    def split(
        self,
        prefix: str,
        names: tuple[str, ...],
        in_size: int,
        out_sizes: tuple[int, ...],
        bias: bool,
        outputs: tuple[Ranges, ...],
    ) -> Linear:
        """A matrix of which this shard holds some outputs."""
        whole = tuple(prefix + name for name in names)
        spec = LinearSpec(whole, in_size, out_sizes, bias, outputs=None if self.world.count == 1 else outputs)
        return self.method.linear(self.weights, spec, self.ops)

    def summed(self, name: str, in_size: int, bias: bool, inputs: Ranges) -> Linear:
        """A matrix of which this shard holds some inputs, and whose results are added up."""
        return self.with_sum(self.linear(LinearSpec((name,), in_size, (self.config.hidden_size,), bias), inputs=inputs))

    def linear(self, spec: LinearSpec, *, inputs: Ranges) -> Linear:
        if self.world.count > 1:
            spec = replace(spec, inputs=inputs, adds_bias=self.world.index == 0)
        return self.method.linear(self.weights, spec, self.ops)

    def with_sum(self, part: Linear) -> Linear:
        return part if self.world.count == 1 else SummedLinear(part, self.world)
