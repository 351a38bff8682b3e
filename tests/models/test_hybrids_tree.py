"""A tree of prompts from a warm cache: whatever branches where, each answer is that of the request alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fastqwen.engine.blocks import chain_next, chain_root
from fastqwen.engine.snapshots import SnapshotPool
from fastqwen.records import Row
from fastqwen.runner.states import States, WrongState
from tests.engine.test_snapshots import hashes_of
from tests.models.test_hybrids import CASES, DELTA
from tests.models.tiny import greedy, make, prompt, start

ANSWER = 40
BLOCK = 16
BLOCK_BYTES = 2 * 2 * 32 * BLOCK * 4  # of the one layer with attention: keys and values of 2 heads of 32, float32


def tree(chance: random.Random, *, branches: int) -> list[list[int]]:
    """Prompts that leave others at any token: inside a block, at its end, at a prompt's first and last token."""
    found = [prompt(chance.randint(1, 90), seed=chance.randint(0, 99))]
    while len(found) < branches:
        trunk = chance.choice(found)
        cut = chance.choice([0, 1, len(trunk) - 1, len(trunk), BLOCK, 2 * BLOCK, chance.randint(0, len(trunk))])
        found.append(trunk[:cut] + prompt(chance.randint(1, 40), seed=chance.randint(0, 99)))
    return found


@pytest.fixture(scope="module", params=["qwen3-5", "qwen3-next"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    config_class, changes = CASES[request.param]
    make(folder, config_class, **{**DELTA, **changes})
    return folder


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Any:
    """Answers of an engine that keeps nothing, one request at a time."""
    core, known = start(checkpoint, enable_prefix_caching=False), {}

    def answer(ids: list[int]) -> list[int]:
        if tuple(ids) not in known:
            [known[tuple(ids)]] = greedy(core, [ids], ANSWER)
        return known[tuple(ids)]

    return answer


@pytest.mark.parametrize("seed", range(4))
def test_every_answer_is_that_of_the_request_alone(checkpoint: Path, alone: Any, seed: int):
    """In batches, in chunks, pushed out for want of blocks, going on from answers, with few and with many copies."""
    chance = random.Random(seed)
    core = start(
        checkpoint, max_num_seqs=4, kv_cache_memory_bytes=16 * BLOCK_BYTES, max_model_len=256,
        max_state_snapshots=(1, 3, 8, 64)[seed], max_num_batched_tokens=(7, 64, 33, 256)[seed],
    )  # fmt: skip
    prompts = tree(chance, branches=16)
    for _ in range(3):
        some = chance.sample(prompts, 8)
        assert greedy(core, some, ANSWER) == [alone(ids) for ids in some]
        prompts += [ids + alone(ids) + prompt(chance.randint(1, 20)) for ids in some[:3] if len(ids) < 90]
    assert core.scheduler.num_prefix_hits > 0
    assert core.scheduler.num_preemptions > 0


def test_every_place_at_which_a_prompt_can_branch(checkpoint: Path, alone: Any):
    """One trunk, left behind each of its tokens, each branch seen twice: cold, and from what was kept."""
    core, trunk = start(checkpoint), prompt(50)
    greedy(core, [trunk], ANSWER)
    for cut in range(1, len(trunk) + 1, 4):
        branch = [*trunk[:cut], 255 - trunk[cut % len(trunk)], *prompt(20, seed=cut)]
        assert [greedy(core, [branch], ANSWER)[0] for _ in range(2)] == [alone(branch)] * 2
    assert core.scheduler.num_prefix_hits > 0


@pytest.mark.parametrize("wrong", [1, 3])
def test_a_copy_under_another_length_is_refused(checkpoint: Path, wrong: int):
    """Filed one block too early or too late by force: the device's side knows what it holds, and no token comes of it."""
    core, ids = start(checkpoint), prompt(60)
    greedy(core, [ids[: 2 * BLOCK + 5]], 1)
    greedy(core, [ids], 1)
    pool: Any = core.scheduler._snapshots
    hashes = [chain_root("", "")]
    for begin in range(0, 3 * BLOCK, BLOCK):
        hashes.append(chain_next(hashes[-1], ids[begin : begin + BLOCK]))
    place, num_tokens = pool._filed[hashes[2]]
    assert num_tokens == 2 * BLOCK
    pool._filed.clear()
    pool._filed[hashes[wrong]] = place, wrong * BLOCK
    with pytest.raises(WrongState, match=rf"begins at token {wrong * BLOCK}, the slot's states hold 32"):
        greedy(core, [ids], 1)


def test_a_copy_that_says_another_length_than_its_name_is_refused():
    pool = SnapshotPool(1, 4)
    place, hashes = pool.take(), hashes_of(list(range(12)))
    assert place is not None
    pool._taken.clear()
    pool._filed[hashes[2]] = place, 8
    with pytest.raises(AssertionError, match="8 tokens stands for 3 blocks"):
        pool.deepest(hashes)


def test_a_row_behind_other_tokens_than_its_slot_holds_is_refused():
    class Fixed:
        def of_slot(self, slot: int) -> list[int]:
            return [slot]

    states: Any = States([Fixed()], first_kept=2)  # type: ignore[list-item]
    row = Row(slot=0, request_id="x", start=5, num_tokens=1, new_blocks=(), num_logits=1)
    with pytest.raises(WrongState, match="begins at token 5, the slot's states hold 0"):
        states.before([], [row])
