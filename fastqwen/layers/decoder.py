"""A decoder: embedding, layers, final norm, head. It knows neither where its weights came from nor how they are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fastqwen.kernels import LayerState, Norm, Ops, StateRoom, StepTokens
from fastqwen.layers.linear import Linear
from fastqwen.sharding import Alone, World


class Mixer(Protocol):
    """The part of a layer that lets tokens of a sequence see each other, by a state of its own kind."""

    def make_state(self, room: StateRoom) -> LayerState: ...

    def add_to(self, residual: Tensor, step: StepTokens, state: Any) -> None: ...


class FeedForward(Protocol):
    """The part of a layer that looks at each token alone."""

    def add_to(self, residual: Tensor, step: StepTokens) -> None: ...


@dataclass(frozen=True)
class Layer:
    mixer: Mixer
    feed_forward: FeedForward


@dataclass(frozen=True)
class Embedding:
    """``table`` [lines, hidden] has the vectors of ids from ``first_id`` on; other shards have the others."""

    table: Tensor
    first_id: int
    world: World

    def __call__(self, ids: Tensor, ops: Ops) -> Tensor:
        """ids int32 [tokens] -> [tokens, hidden]"""
        if self.world.count == 1:
            return ops.embed(ids, self.table)
        own = ids - self.first_id
        here = (own >= 0) & (own < self.table.shape[0])
        found = ops.embed(own.where(here, 0), self.table) * here[:, None]
        self.world.all_reduce(found)
        return found


@dataclass(frozen=True)
class FileEmbedding:
    """Vectors that stay packed in their file: ids [n] -> float32 [n, hidden]. Shards hold theirs unpacked."""

    rows: Callable[[Tensor], Tensor]
    world: World = Alone()  # noqa: RUF009 it has no state

    def __call__(self, ids: Tensor, ops: Ops) -> Tensor:
        return self.rows(ids)


@dataclass(frozen=True)
class Decoder:
    ops: Ops
    embed: Embedding | FileEmbedding
    layers: Sequence[Layer]
    norm: Norm
    head: Linear
    has_head: bool = True  # False: the checkpoint has none, and the embedding stands in its place
    classifier: Tensor | None = None  # float32 [labels, hidden], on the host

    def make_states(self, room: StateRoom) -> list[LayerState]:
        """What the layers keep between steps, one of each."""
        return [layer.mixer.make_state(room) for layer in self.layers]

    def hidden(self, ids: Tensor, step: StepTokens, states: Sequence[LayerState]) -> Tensor:
        """Advance the states by a step's tokens: ids int32 [tokens] -> [tokens, hidden], before the final norm"""
        residual = self.embed(ids, self.ops)
        self.advance(residual, step, states)
        return residual

    def advance(self, residual: Tensor, step: StepTokens, states: Sequence[LayerState]) -> None:
        """All layers, in place: residual [tokens, hidden] comes in as embeddings"""
        for layer, state in zip(self.layers, states, strict=True):
            layer.mixer.add_to(residual, step, state)
            layer.feed_forward.add_to(residual, step)

    def final(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> the same, after the final norm: what the head reads, and what embeddings are made of"""
        return self.ops.rms_norm(hidden, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab], in the type that the device's sampler reads"""
        return self.head.of_norm(hidden, self.norm, None)
