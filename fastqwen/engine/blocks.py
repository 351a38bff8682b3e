"""The pool of KV blocks: reference counts, the prefix cache, and an audit.

A block holds the keys and values of ``block_size`` tokens. It is free (nobody refers to it) or used. A free block may
still hold content that the prefix cache knows by its hash; such blocks are handed out last, oldest first, so that the
cache lives in whatever memory is not needed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

BlockHash = bytes


def chain_root(rope_key: str, cache_salt: str) -> BlockHash:
    """The start of a hash chain. Keys rotated by another rotary profile, or salted otherwise, never meet."""
    return hashlib.blake2b(f"{len(rope_key)}:{rope_key}{cache_salt}".encode(), digest_size=16).digest()


def chain_next(parent: BlockHash, token_ids: Sequence[int]) -> BlockHash:
    """The name of a full block: its tokens, and all that came before them."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        # Free blocks without content come first, then cached ones from the least recently released on.
        self._free_blank: list[int] = list(range(num_blocks - 1, -1, -1))
        self._free_cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free_blank) + len(self._free_cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def usage(self) -> float:
        return self.num_used / self.num_blocks

    def match(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The longest run of cached blocks for a chain of hashes. Nothing is taken."""
        found: list[int] = []
        for block_hash in hashes:
            block = self._block_of.get(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def num_free_among(self, blocks: Iterable[int]) -> int:
        return sum(self._references[block] == 0 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Refer once more to blocks that ``match`` found."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free_cached[block]
            self._references[block] += 1

    def take(self, count: int) -> list[int]:
        """``count`` blocks for new content. The caller has looked at ``num_free``."""
        assert 0 <= count <= self.num_free, f"asked for {count} of {self.num_free} free blocks"
        return [self._take_one() for _ in range(count)]

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a sequence's blocks, in its order. The tail is evicted before the head, which others may share."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} was released twice"
            if self._references[block] == 0:
                if block in self._hash_of:
                    self._free_cached[block] = None
                else:
                    self._free_blank.append(block)

    def register(self, block: int, block_hash: BlockHash) -> None:
        """Let the prefix cache find this full block. The first block of equal content wins."""
        assert self._references[block] > 0, f"block {block} has no owner"
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget_cache(self) -> None:
        """Empty the prefix cache; blocks in use keep their owners."""
        self._hash_of.clear()
        self._block_of.clear()
        self._free_blank.extend(self._free_cached)
        self._free_cached.clear()

    def audit(self) -> None:
        """Every block is used or free, exactly one of them, and the cache's two maps mirror each other."""
        free = self._free_blank + list(self._free_cached)
        assert len(free) == len(set(free)), "a block is free twice"
        assert {block for block, count in enumerate(self._references) if count == 0} == set(free)
        assert {h: b for b, h in self._hash_of.items()} == self._block_of
        assert all(block in self._hash_of for block in self._free_cached)
        assert not any(block in self._hash_of for block in self._free_blank)

    def _take_one(self) -> int:
        if self._free_blank:
            block = self._free_blank.pop()
        else:
            block, _ = self._free_cached.popitem(last=False)
            del self._block_of[self._hash_of.pop(block)]
        self._references[block] = 1
        return block
