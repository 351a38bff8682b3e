"""Copies of what layers of fixed state hold of a sequence, for the prefix cache: which are kept, and under what name.

A copy is filed under the hash of the block that ends with exactly the tokens that the state holds, when the step that
computed them is done, and never under another one later. Places are the executor's; here they are numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from fastqwen.engine.blocks import BlockHash


class SnapshotPool:
    """A place is free, taken (a step in flight copies a state there) or filed. The least recently used filed copy makes way."""

    def __init__(self, num_places: int, block_size: int) -> None:
        assert num_places >= 0 and block_size > 0
        self.num_places = num_places
        self.block_size = block_size
        self._free = list(range(num_places - 1, -1, -1))
        self._taken: set[int] = set()
        self._filed: OrderedDict[BlockHash, tuple[int, int]] = OrderedDict()  # place and number of tokens, oldest first

    def __len__(self) -> int:
        return len(self._filed)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._filed

    def take(self) -> int | None:
        """A place for a new copy. None if steps in flight need all of them."""
        if self._free:
            place = self._free.pop()
        elif self._filed:
            _, (place, _) = self._filed.popitem(last=False)
        else:
            return None
        self._taken.add(place)
        return place

    def give_back(self, place: int) -> None:
        """A taken place whose copy nobody wants any more."""
        self._taken.remove(place)
        self._free.append(place)

    def file(self, place: int, hashes: Sequence[BlockHash], num_tokens: int) -> None:
        """Let sequences that begin with these tokens find the copy. ``hashes`` are those of a sequence's blocks."""
        assert num_tokens > 0 and num_tokens % self.block_size == 0, f"{num_tokens} tokens end inside a block"
        block_hash = hashes[num_tokens // self.block_size - 1]
        if block_hash in self._filed:
            self._filed.move_to_end(block_hash)
            self.give_back(place)
            return
        self._taken.remove(place)
        self._filed[block_hash] = place, num_tokens

    def drop(self, block_hash: BlockHash) -> None:
        """Its place is wanted for something newer. Nothing happens if it made way already."""
        if block_hash in self._filed:
            self._free.append(self._filed.pop(block_hash)[0])

    def deepest(self, hashes: Sequence[BlockHash]) -> tuple[int, int] | None:
        """Of a sequence's leading blocks: how many, and the place of the copy that was made behind them."""
        for count in range(len(hashes), 0, -1):
            found = self._filed.get(hashes[count - 1])
            if found is not None:
                place, num_tokens = found
                assert num_tokens == count * self.block_size, f"a copy of {num_tokens} tokens stands for {count} blocks"
                self._filed.move_to_end(hashes[count - 1])
                return count, place
        return None

    def audit(self) -> None:
        """Call when no step is in flight: every place is free or filed, exactly one of them."""
        assert not self._taken, f"places {sorted(self._taken)} were never filed"
        places = self._free + [place for place, _ in self._filed.values()]
        assert sorted(places) == list(range(self.num_places)), "a place is lost or used twice"
