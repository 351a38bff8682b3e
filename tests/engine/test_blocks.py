from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fastqwen.engine.blocks import BlockPool, chain_next, chain_root

BLOCK_SIZE = 2


def test_a_cached_block_is_found_until_its_memory_is_needed():
    pool = BlockPool(2, BLOCK_SIZE)
    name = chain_next(chain_root("", ""), [1, 2])
    [block] = pool.take(1)
    pool.register(block, name)
    pool.release([block])
    assert pool.match([name]) == [block]
    assert pool.num_free == 2
    pool.take(2)
    assert pool.match([name]) == []
    pool.audit()


def test_blank_blocks_go_before_cached_ones_and_old_before_new():
    pool = BlockPool(3, BLOCK_SIZE)
    first, second, blank = pool.take(3)
    names = [chain_next(chain_root("", ""), [value, value]) for value in (1, 2)]
    pool.register(first, names[0])
    pool.register(second, names[1])
    pool.release([first])
    pool.release([second])
    pool.release([blank])
    assert pool.take(1) == [blank]
    assert pool.take(1) == [first]
    assert pool.match([names[1]]) == [second]


def test_profiles_and_salts_never_share():
    roots = {chain_root(key, salt) for key in ("", "ntk:1", "ntk:3") for salt in ("", "a", "1")}
    assert len(roots) == 9


class Pool(RuleBasedStateMachine):
    """Sequences that allocate, share, register and release against a model of who owns what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(7, BLOCK_SIZE)
        self.sequences: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=8), salt=st.sampled_from(["", "s"]))
    def start(self, tokens: list[int], salt: str) -> None:
        names = self._names(tokens, salt)
        cached = self.pool.match(names)
        missing = -(-len(tokens) // BLOCK_SIZE) - len(cached)
        if missing > self.pool.num_free - self.pool.num_free_among(cached):
            return
        self.pool.share(cached)
        blocks = cached + self.pool.take(missing)
        for block, name in zip(blocks, names, strict=False):
            self.pool.register(block, name)
        self.sequences.append((tokens, blocks))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(index)[1])

    @rule()
    def forget(self) -> None:
        self.pool.forget_cache()

    @invariant()
    def books_balance(self) -> None:
        self.pool.audit()
        owned = {block for _, blocks in self.sequences for block in blocks}
        assert self.pool.num_used == len(owned)
        assert self.pool.num_free + self.pool.num_used == self.pool.num_blocks

    @invariant()
    def a_shared_block_has_one_content(self) -> None:
        content: dict[int, tuple[int, ...]] = {}
        for tokens, blocks in self.sequences:
            for index, block in enumerate(blocks):
                past = tuple(tokens[: (index + 1) * BLOCK_SIZE])
                assert content.setdefault(block, past) == past

    @staticmethod
    def _names(tokens: list[int], salt: str) -> list[bytes]:
        names, parent = [], chain_root("", salt)
        for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
            parent = chain_next(parent, tokens[start : start + BLOCK_SIZE])
            names.append(parent)
        return names


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=500, stateful_step_count=50, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_runs():
    long = settings(max_examples=20_000, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Pool, settings=long)
