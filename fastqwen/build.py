"""A Decoder from a ModelConfig and named weights: the model file's names, the quantization method's linears, and of each
matrix the part that this shard holds."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fastqwen import models, quant
from fastqwen.kernels import AttentionParts, DeltaParts, DeltaShape, DenseWeight, HeadShape, Norm, Ops
from fastqwen.layers.attention import Attention
from fastqwen.layers.decoder import Decoder, Embedding, FileEmbedding, Layer
from fastqwen.layers.gated_delta import GatedDelta
from fastqwen.layers.linear import DenseLinear, GatheredLinear, Linear, SummedLinear, join
from fastqwen.layers.mlp import Mlp
from fastqwen.layers.moe import Moe, SharedExpert
from fastqwen.model_config import DeltaConfig, ModelConfig, MoeConfig
from fastqwen.models.names import Names
from fastqwen.quant import ExpertsSpec, LinearSpec, dense
from fastqwen.sharding import VOCAB_UNIT, Alone, HeadSplit, Part, Ranges, World, behind, even_ranges, even_size
from fastqwen.weights.source import Weights

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Piece = tuple[int, int, Ranges]


def build_decoder(
    config: ModelConfig,
    weights: Weights,
    ops: Ops,
    *,
    source: str = "config.json",
    world: World = Alone(),  # noqa: B008 it has no state
    progress: Callable[[int, int], None] = lambda done, total: None,
    at_once: int = 1,
) -> Decoder:
    """``progress`` is told after each layer how many of how many are ready; ``at_once``: as many are made side by side."""
    builder = _Builder(config, weights, ops, source, world)
    layers = []
    for layer in _in_order(builder.layer, config.num_layers, at_once):
        layers.append(layer)
        progress(len(layers), config.num_layers)
    return builder.decoder(layers)


def _in_order(make: Callable[[int], Layer], count: int, at_once: int) -> Iterator[Layer]:
    yield make(0)  # alone: what is said once of a checkpoint is said here
    pool = ThreadPoolExecutor(at_once, "fastqwen-load")
    try:
        yield from pool.map(make, range(1, count))
    finally:  # after an error nothing else is read
        pool.shutdown(cancel_futures=True)


class _Builder:
    def __init__(self, config: ModelConfig, weights: Weights, ops: Ops, source: str, world: World) -> None:
        self.config = config
        self.local = config.local(world.count)
        self.weights = weights
        self.ops = ops
        self.world = world
        names: Names = models.find(config.model_type).NAMES
        self.names = next((one for one in names.variants() if weights.has(f"{one.embed}.weight")), names)
        bare = self.names == names.without_prefix()
        self.has_head = not bare or config.tie_word_embeddings or weights.has(f"{names.head}.weight")
        self.has_head = self.has_head and config.classifier is None
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
            classifier=self.classifier(),
        )

    def classifier(self) -> Tensor | None:
        """Small, so that each shard has all of it, and the host computes with it."""
        found = self.config.classifier
        if found is None:
            return None
        return self.precise(f"{self.names.classifier}.weight", (len(found.labels), self.config.hidden_size)).cpu()

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
        return first, DenseLinear(self.ops, DenseWeight(table)).settled()

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
        mixer = self.delta(prefix) if self.config.is_delta(index) else self.attention(prefix, index)
        return Layer(mixer, self.moe(prefix) if sparse else self.mlp(prefix))

    def norm(self, name: str) -> Norm:
        return Norm(self.norm_weight(name, self.config.hidden_size), self.config.rms_norm_eps)

    def norm_weight(self, name: str, size: int) -> Tensor:
        """Weights around 0 say how far from 1 they are: half precision would lose that in the sum."""
        if self.config.norms_around_one:
            return 1.0 + self.precise(f"{name}.weight", (size,))
        return self.weights.tensor(f"{name}.weight", (size,))

    def precise(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """As exact as the file has it, in float32."""
        return self.weights.tensor(name, shape, keep_type=True, part=part).float()

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
            self.norm_weight(prefix + name, config.head_dim) if config.qk_norm else None
            for name in (names.q_norm, names.k_norm)
        )
        shape = HeadShape(local.num_heads, local.num_kv_heads, config.head_dim, config.rotary_dim)
        make = self.gated_qkv if config.attention_gate else self.split
        return Attention(
            ops=self.ops,
            norm=self.norm(prefix + names.attention_norm),
            qkv=make(prefix, names.qkv, config.hidden_size, sizes, config.qkv_bias, outputs),
            o=self.summed(prefix + names.o, config.q_size, config.o_bias, queries),
            parts=AttentionParts(shape, q_norm, k_norm, config.rms_norm_eps, config.window(index)),
            gated=config.attention_gate,
        )

    def gated_qkv(
        self,
        prefix: str,
        names: tuple[str, ...],
        in_size: int,
        out_sizes: tuple[int, ...],
        bias: bool,
        outputs: tuple[Ranges, ...],
    ) -> Linear:
        """Queries, keys, values, gates. The checkpoint has each head's query and gate behind each other."""
        queries, gates = _halves_of_pairs(outputs[0], self.config.head_dim)
        q, k, v = (prefix + name for name in names)
        spec = LinearSpec(
            (q, k, v, q),
            in_size,
            (2 * out_sizes[0], *out_sizes[1:], 2 * out_sizes[0]),
            bias,
            outputs=(queries, *outputs[1:], gates),
        )
        return self.method.linear(self.weights, spec, self.ops)

    def delta(self, prefix: str) -> GatedDelta:
        config, names, delta, local = self.config, self.names, self.config.delta, self.local.delta
        assert delta is not None and local is not None
        split = HeadSplit.of(delta.num_value_heads, delta.num_key_heads, self.world.count)
        lines = DeltaLines(delta, split, self.world.index)
        heads = Part(0, lines.value_heads)
        decay, bias = (self.precise(prefix + name, (delta.num_value_heads,), heads) for name in names.delta_decay)
        conv = self.weights.tensor(
            f"{prefix}{names.delta_conv[0]}.weight", (delta.channels, 1, delta.taps), part=Part(0, lines.channels)
        )
        shape = DeltaShape(local.num_key_heads, local.num_value_heads, delta.key_dim, delta.value_dim, delta.taps)
        norm = self.precise(f"{prefix}{names.delta_norm[0]}.weight", (delta.value_dim,))
        return GatedDelta(
            ops=self.ops,
            norm=self.norm(prefix + names.attention_norm),
            project=self.delta_projection(prefix, lines),
            out=self.summed(prefix + names.delta_out[0], delta.value_size, False, lines.values(0)),
            parts=DeltaParts(shape, conv[:, 0].contiguous(), -decay.exp(), bias, Norm(norm, config.rms_norm_eps)),
        )

    def delta_projection(self, prefix: str, lines: DeltaLines) -> Linear:
        """To queries, keys, values, z, b and a. b and a are small, and plain where the others are packed."""
        names = tuple(prefix + name for name in self.names.delta_in)
        wide, narrow = lines.of_two() if len(names) == 2 else lines.of_four()
        parts = []
        for which in (wide, narrow):
            spec = LinearSpec(
                tuple(names[index] for index, _, _ in which),
                self.config.hidden_size,
                tuple(size for _, size, _ in which),
                bias=False,
                outputs=tuple(ranges for *_, ranges in which),
            )
            parts.append(self.method.linear(self.weights, spec, self.ops))
        return join(self.ops, parts)

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


@dataclass(frozen=True)
class DeltaLines:
    """Which lines of a gated delta rule's matrices this shard holds. Its value heads are split as query heads are that share
    a key head.

    A piece of a matrix is (its place among the checkpoint's matrices, all of that matrix's lines, those that are meant).
    """

    delta: DeltaConfig
    split: HeadSplit
    index: int  # of the shard

    @property
    def value_heads(self) -> Ranges:
        return self.split.queries(self.index, 1)

    def keys(self, offset: int) -> Ranges:
        return behind(self.split.keys(self.index, self.delta.key_dim), offset)

    def values(self, offset: int) -> Ranges:
        return behind(self.split.queries(self.index, self.delta.value_dim), offset)

    @property
    def channels(self) -> Ranges:
        size = self.delta.key_size
        return *self.keys(0), *self.keys(size), *self.values(2 * size)

    def of_four(self) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Qwen3.5: q, k and v together, z, b, a."""
        delta, heads = self.delta, self.value_heads
        wide = (0, delta.channels, self.channels), (1, delta.value_size, self.values(0))
        return wide, ((2, delta.num_value_heads, heads), (3, delta.num_value_heads, heads))

    def of_two(self) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Qwen3-Next: each key head's q, k, v and z; each key head's b and a."""
        delta, group, keys, values, heads = self.delta, self.split.group, self.keys(0), self.values(0), self.value_heads
        many = group * delta.value_dim
        wide = self._by_heads(0, ((keys, delta.key_dim), (keys, delta.key_dim), (values, many), (values, many)))
        return wide, self._by_heads(1, ((heads, group), (heads, group)))

    def _by_heads(self, index: int, parts: tuple[tuple[Ranges, int], ...]) -> tuple[Piece, ...]:
        """Of a matrix that has lines of each part for each key head: those of the first part, of the second, ..."""
        sizes = [size for _, size in parts]
        each, begins = sum(sizes), itertools.accumulate(sizes, initial=0)
        return tuple(
            (index, each * self.delta.num_key_heads, _spread(lines, size, each=each, begin=begin))
            for (lines, size), begin in zip(parts, begins, strict=False)
        )


def _halves_of_pairs(heads: Ranges, size: int) -> tuple[Ranges, Ranges]:
    """The lines of heads' first and second halves in a matrix that has both of a head behind each other; ``heads`` are lines of
    one with the first halves alone, ``size`` for each."""
    return _spread(heads, size, each=2 * size, begin=0), _spread(heads, size, each=2 * size, begin=size)


def _spread(lines: Ranges, size: int, *, each: int, begin: int) -> Ranges:
    """Lines of a matrix of blocks of ``size``, in one that has ``each`` lines a block, these from ``begin`` on."""
    found: list[tuple[int, int]] = []
    for start, stop in lines:
        if start < 0:  # zeros
            found.append((start, stop))
            continue
        while start < stop:
            block, at = divmod(start, size)
            count = min(stop - start, size - at)
            found.append((block * each + begin + at, block * each + begin + at + count))
            start += count
    return tuple(found)
