"""Copies of states: the pool by random operations, and the scheduler's use of it with an executor that checks every row."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fastqwen.engine.blocks import BlockPool, chain_next, chain_root
from fastqwen.engine.core import EngineCore
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.engine.snapshots import SnapshotPool
from fastqwen.records import EngineRequest, SampledRow, Sampling, ScheduledBatch, StepOutput

SIZE = 4


def hashes_of(token_ids: list[int]) -> list[bytes]:
    found = [chain_root("", "")]
    for start in range(0, len(token_ids) - SIZE + 1, SIZE):
        found.append(chain_next(found[-1], token_ids[start : start + SIZE]))
    return found[1:]


class PoolMachine(RuleBasedStateMachine):
    """Against a dictionary of what was copied into each place."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SnapshotPool(3, SIZE)
        self.taken: dict[int, list[int]] = {}
        self.content: dict[int, list[int]] = {}  # tokens whose state a place holds

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=SIZE, max_size=3 * SIZE))
    def take(self, token_ids: list[int]) -> None:
        place = self.pool.take()
        assert (place is None) == (len(self.taken) == self.pool.num_places)
        if place is not None:
            assert place not in self.taken
            self.taken[place] = self.content[place] = token_ids[: len(token_ids) // SIZE * SIZE]

    @rule(data=st.data(), wanted=st.booleans())
    def finish(self, data: st.DataObject, wanted: bool) -> None:
        if not self.taken:
            return
        place = data.draw(st.sampled_from(sorted(self.taken)))
        token_ids = self.taken.pop(place)
        if wanted:
            self.pool.file(place, hashes_of(token_ids), len(token_ids))
        else:
            self.pool.give_back(place)

    @rule(token_ids=st.lists(st.integers(0, 1), max_size=4 * SIZE))
    def look(self, token_ids: list[int]) -> None:
        """What is found is the state of exactly the first tokens."""
        found = self.pool.deepest(hashes_of(token_ids))
        if found is not None:
            count, place = found
            assert self.content[place] == token_ids[: count * SIZE]

    @rule(token_ids=st.lists(st.integers(0, 1), min_size=SIZE, max_size=2 * SIZE))
    def drop(self, token_ids: list[int]) -> None:
        block_hash = hashes_of(token_ids)[-1]
        self.pool.drop(block_hash)
        assert block_hash not in self.pool

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.pool._taken == set(self.taken)
        if not self.taken:
            self.pool.audit()


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


@pytest.mark.parametrize("num_tokens", [0, 3, 9])
def test_a_length_that_is_no_blocks_end_is_refused(num_tokens: int):
    pool = SnapshotPool(1, SIZE)
    place = pool.take()
    assert place is not None
    with pytest.raises(AssertionError):
        pool.file(place, hashes_of(list(range(12))), num_tokens)


class CheckingExecutor:
    """Keeps of each slot and each copy the tokens that a state would hold, and says each next token by a rule of all of them.
    Steps end in the order in which they were submitted, two at a time."""

    run_ahead = 2

    def __init__(self, late: float = 0.0, seed: int = 0) -> None:
        """``late``: how often a row that samples steps aside, and computes its token once more."""
        self._late, self._chance = late, random.Random(seed)
        self.tokens: dict[int, list[int]] = {}  # known, by slot
        self.held: dict[int, list[int]] = {}
        self.copies: dict[int, list[int]] = {}

    def is_late(self, slot: int) -> bool | None:
        return self._chance.choice([None, False, True])

    def submit(self, batch: ScheduledBatch) -> Handle:
        for one in batch.admissions:
            self.tokens[one.slot] = list(one.token_ids)
            self.held[one.slot] = [] if one.kept_state is None else list(self.copies[one.kept_state])
        rows = []
        late = [row.request_id for row in batch.rows if row.num_logits and self._chance.random() < self._late]
        for row in batch.rows:
            known, held = self.tokens[row.slot], self.held[row.slot]
            assert held == known[: row.start + row.repeats], "a state of other tokens"
            held += known[row.start + row.repeats : row.end]
            if row.request_id in late:
                rows.append(SampledRow(request_id=row.request_id, stepped_aside=True))
                continue
            if row.num_logits:
                known.append(next_token(known))
            rows.append(SampledRow(request_id=row.request_id, token_ids=known[row.end :] if row.num_logits else []))
        for row in batch.rows:
            if row.keep_state is not None:
                self.copies[row.keep_state] = list(self.held[row.slot])
        return Handle(StepOutput(step_id=batch.step_id, rows=rows), late)


class Handle:
    def __init__(self, output: StepOutput, late: list[str]) -> None:
        self._output, self.late = output, late

    def result(self) -> StepOutput:
        return self._output


def next_token(token_ids: list[int]) -> int:
    return (sum(token_ids) + len(token_ids)) % 3


@pytest.mark.parametrize("seed", range(8))
def test_every_state_is_that_of_its_tokens(seed: int):
    """Prompts of two tokens that begin alike, so that they branch everywhere; few blocks and places; some are aborted."""
    chance = random.Random(seed)
    pool = SnapshotPool(chance.choice([1, 3, 8]), SIZE)
    policy = StepPolicy(max_num_batched_tokens=chance.choice([3, 8, 64]), max_num_mixed_tokens=chance.choice([None, 5]))
    scheduler = Scheduler(BlockPool(14, SIZE), policy, max_num_seqs=4, snapshots=pool)
    core = EngineCore(scheduler, CheckingExecutor(late=0.1 * (seed % 2), seed=seed))
    trunk = [chance.randint(0, 1) for _ in range(16)]
    prompts = {
        str(number): trunk[: chance.randint(0, 16)] + [chance.randint(0, 1) for _ in range(chance.randint(1, 6))]
        for number in range(60)
    }
    found: dict[str, list[int]] = {name: [] for name in prompts}
    waiting, aborted = list(prompts), set()
    while waiting or core.has_work:
        if waiting and chance.random() < 0.5:
            name = waiting.pop()
            core.add(
                EngineRequest(
                    request_id=name, prompt_token_ids=prompts[name], sampling=Sampling(), stop_token_ids=[],
                    max_tokens=chance.randint(1, 14), seed=0,
                )
            )  # fmt: skip
            if chance.random() < 0.1:
                aborted.add(name)
        for name in [name for name in aborted if name in found and chance.random() < 0.3]:
            core.abort(name)
        for delta in core.step():
            found[delta.request_id] += delta.token_ids
    core.step()  # audits
    assert scheduler.num_prefix_hits > 0 or pool.num_places < 8
    for name, ids in prompts.items():
        known = list(ids)
        for token_id in found[name]:
            assert token_id == next_token(known)
            known.append(token_id)


def test_the_next_turn_the_branch_and_the_same_again():
    scheduler = Scheduler(
        BlockPool(64, SIZE), StepPolicy(max_num_batched_tokens=64), max_num_seqs=1, snapshots=SnapshotPool(9, SIZE)
    )
    core = EngineCore(scheduler, CheckingExecutor())

    def hits(ids: list[int]) -> int:
        before = scheduler.num_prefix_hits
        core.add(
            EngineRequest(
                request_id="x", prompt_token_ids=ids, sampling=Sampling(), stop_token_ids=[], max_tokens=6, seed=0
            )
        )
        while core.has_work:
            core.step()
        return scheduler.num_prefix_hits - before

    first = list(range(10, 30))
    assert [hits(first), hits(first)] == [0, 16]
    answer: list[int] = []
    for _ in range(6):
        answer.append(next_token(first + answer))
    assert hits(first + answer + [7] * 9) == 24  # of 25 that were computed
    assert [hits(first[:11] + [1] * 9), hits(first[:11] + [2] * 9), hits(first[:11] + [3] * 9)] == [0, 8, 8]
