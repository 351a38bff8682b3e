"""One model over several processes: which part of each matrix one of them holds, and how they add up what they computed.

Heads, the feed-forward part's inner size and the vocabulary are split (arXiv 1909.08053). A product over a split size gives
a part of a sum: the first shard adds its part to the residual, the others put theirs in its place, and then all are added
up. A world of one does none of this.

All shards have the same sizes. Where a size does not divide, the last ones are filled with zeros, which change no sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Ranges = tuple[tuple[int, int], ...]  # from, to; (-n, 0) are n lines of zeros, which the whole does not have

VOCAB_UNIT = 64  # a shard's share of the vocabulary is a multiple of this, so that its rows of logits begin aligned


@dataclass(frozen=True)
class Part:
    """Which lines of a tensor's dimension are meant, one range after the other."""

    dim: int
    ranges: Ranges

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return (*whole[: self.dim], self.size, *whole[self.dim + 1 :])


class World(Protocol):
    """All shards, as one of them sees them. Each of them makes the same calls in the same order."""

    index: int
    count: int

    def all_reduce(self, x: Tensor) -> None:
        """x becomes the sum of all shards' x, in place, with the same bits on each of them."""

    def all_gather(self, x: Tensor) -> Tensor:
        """[rows, n] of each shard -> [rows, count * n], shard after shard"""

    def broadcast(self, x: Tensor) -> None:
        """x becomes what it is on the first shard, in place."""

    def prepare(self, width: int, dtype: torch.dtype) -> None:
        """Rows of so many numbers will be added up: find out how that goes fastest."""

    def takes_parts(self, residual: Tensor) -> bool:
        """Whether ``add_parts`` is there for so many rows."""

    def add_parts(self, residual: Tensor, part: Tensor) -> None:
        """residual, equal on all shards, += the sum of all shards' part, in place."""


class Alone:
    """A world of one."""

    index = 0
    count = 1

    def all_reduce(self, x: Tensor) -> None: ...

    def all_gather(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> None: ...

    def prepare(self, width: int, dtype: torch.dtype) -> None: ...

    def takes_parts(self, residual: Tensor) -> bool:
        return False

    def add_parts(self, residual: Tensor, part: Tensor) -> None:
        residual += part


def even_size(size: int, count: int, unit: int = 1) -> int:
    """What each of ``count`` shards has of ``size`` lines, which are cut at multiples of ``unit`` only."""
    return size if count == 1 else ceil(ceil(size / unit) / count) * unit


def even_ranges(size: int, world: World, unit: int = 1) -> Ranges:
    """This shard's share of ``size`` lines."""
    each = even_size(size, world.count, unit)
    return _filled(world.index * each, min((world.index + 1) * each, size), each)


class HeadSplit(NamedTuple):
    """A key-value head is held by ``copies`` shards, each of which has ``piece`` of the query heads that share it; a shard
    has ``each`` such pieces. With more shards than key-value heads there are copies, else there is one of each."""

    group: int  # query heads that share a key-value head
    num_kv_heads: int
    copies: int
    piece: int
    each: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, count: int) -> HeadSplit:
        group = num_heads // num_kv_heads
        copies = min(max(1, count // num_kv_heads), group)
        return cls(group, num_kv_heads, copies, -(-group // copies), -(-num_kv_heads * copies // count))

    def queries(self, index: int, head_dim: int) -> Ranges:
        """The lines of this shard's query heads."""
        found: list[tuple[int, int]] = []
        for unit in range(index * self.each, (index + 1) * self.each):
            head, part = divmod(unit, self.copies)
            start, end = head * self.group + part * self.piece, (head + 1) * self.group
            end = 0 if head >= self.num_kv_heads else end
            found += _filled(start * head_dim, min(start + self.piece, end) * head_dim, self.piece * head_dim)
        return _joined(found)

    def keys(self, index: int, head_dim: int) -> Ranges:
        """The lines of its key heads; the values' are the same."""
        found: list[tuple[int, int]] = []
        for unit in range(index * self.each, (index + 1) * self.each):
            head = unit // self.copies
            found += _filled(head * head_dim, min(head + 1, self.num_kv_heads) * head_dim, head_dim)
        return _joined(found)


def behind(ranges: Ranges, offset: int) -> Ranges:
    """The same lines of a tensor that stands so many lines further in another one."""
    return tuple((start, stop) if start < 0 else (start + offset, stop + offset) for start, stop in ranges)


def _filled(start: int, stop: int, size: int) -> Ranges:
    """Lines ``start`` to ``stop``, and zeros up to ``size``."""
    held = max(0, stop - start)
    own = ((start, stop),) if held else ()
    return own if held == size else (*own, (held - size, 0))


def _joined(ranges: list[tuple[int, int]]) -> Ranges:
    """Neighbours are one range."""
    found: list[tuple[int, int]] = []
    for start, stop in ranges:
        if found and start < 0 and found[-1][0] < 0:
            found[-1] = (found[-1][0] + start, 0)
        elif found and start >= 0 and found[-1][0] >= 0 and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)
