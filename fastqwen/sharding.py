"""One model over several processes: which part of each matrix one of them holds, and how they add up what they computed.

Heads, the feed-forward part's inner size and the vocabulary are split (arXiv 1909.08053). A product over a split size gives
a part of a sum: the first shard adds its part to the residual, the others put theirs in its place, and then all are added
up. A world of one does none of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Ranges = tuple[tuple[int, int], ...]  # from, to; those behind the end of a dimension are read as zeros


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


class Alone:
    """A world of one."""

    index = 0
    count = 1

    def all_reduce(self, x: Tensor) -> None: ...

    def all_gather(self, x: Tensor) -> Tensor:
        return x


def even_range(size: int, world: World) -> tuple[int, int]:
    """This shard's share of ``size`` lines; of the last shards some may lie behind the end."""
    each = -(-size // world.count)
    return world.index * each, (world.index + 1) * each


def kv_head_range(num_kv_heads: int, world: World) -> tuple[int, int]:
    """With more shards than key-value heads, each head is held several times."""
    if world.count > num_kv_heads:
        head = world.index * num_kv_heads // world.count
        return head, head + 1
    return even_range(num_kv_heads, world)
