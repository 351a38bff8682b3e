"""Qwen3.5 against transformers: logits, states, and greedy tokens however the engine cuts the work and whatever is cached."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastqwen.models import read_config
from tests.models.golden import check_logits, make_golden
from tests.models.tiny import greedy, logits, start

LENGTHS = (1, 3, 64, 65, 130, 300)


@pytest.fixture(scope="module")
def checkpoint(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    make_golden(golden / "qwen3_5_tiny", folder)
    return folder


@pytest.fixture(scope="module")
def reference(golden: Path) -> Any:
    return np.load(golden / "qwen3_5_tiny" / "golden.npz")


def prompts(reference: Any) -> list[list[int]]:
    return [reference[f"prompt_{length}"].tolist() for length in LENGTHS]


def answers(reference: Any) -> list[list[int]]:
    return [reference[f"gen_{length}"].tolist() for length in LENGTHS]


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_logits(checkpoint: Path, reference: Any, length: int):
    found = logits(checkpoint, reference[f"prompt_{length}"].tolist())
    check_logits(found.numpy(), reference[f"logits_{length}"])


def test_teacher_forced_step_logits(checkpoint: Path, reference: Any):
    ids = reference["prompt_65"].tolist() + reference["gen_65"].tolist()
    check_logits(logits(checkpoint, ids)[64:-1].numpy(), reference["step_logits_65"])


def test_the_config_as_transformers_5_writes_it_says_the_same(checkpoint: Path, golden: Path, tmp_path: Path):
    shutil.copy(golden / "qwen3_5_tiny" / "config.transformers5.json", tmp_path / "config.json")
    assert read_config(tmp_path) == read_config(checkpoint)


def test_states_behind_a_prompt(checkpoint: Path, reference: Any):
    core = start(checkpoint, max_num_batched_tokens=130)
    runner: Any = core._executor
    greedy(core, [reference["prompt_300"].tolist()], 1)
    state = runner.states.layers[0]
    slot = next(slot for slot, held in runner.states._held.items() if held == 300 and slot <= runner.slots.spare)
    np.testing.assert_allclose(state.memory[slot, 0].numpy(), reference["state0_head0_300"], atol=1e-4)
    ring = [state.inputs[slot, position % 4].numpy() for position in range(296, 300)]
    np.testing.assert_allclose(np.stack(ring, axis=-1), reference["conv0_300"], atol=1e-4)


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=pytest.mark.slow), 7, 64])
def test_in_one_mixed_batch_under_any_chunking(checkpoint: Path, reference: Any, chunk: int):
    """A token at a time, the long prompts would take half a minute."""
    count = 4 if chunk == 1 else len(LENGTHS)
    core = start(checkpoint, max_num_batched_tokens=chunk)
    assert greedy(core, prompts(reference)[:count]) == answers(reference)[:count]


def test_from_a_warm_prefix_cache(checkpoint: Path, reference: Any):
    core = start(checkpoint)
    greedy(core, prompts(reference), 2)
    assert core.scheduler.num_prefix_hits == 0
    assert greedy(core, prompts(reference)) == answers(reference)
    assert core.scheduler.num_prefix_hits == 48 + 64 + 128 + 288


@pytest.mark.parametrize("snapshots", [0, 3])
def test_after_preemption(checkpoint: Path, reference: Any, snapshots: int):
    """A slot that others had; a state that begins anew, or with one of few copies."""
    block_bytes = 2 * 2 * 2 * 64 * 16 * 4
    core = start(checkpoint, kv_cache_memory_bytes=24 * block_bytes, max_num_seqs=4, max_state_snapshots=snapshots)
    assert greedy(core, prompts(reference)[:5]) == answers(reference)[:5]
    assert core.scheduler.num_preemptions > 0


def test_the_next_turn_begins_behind_the_last_answer(checkpoint: Path, reference: Any):
    core, alone = start(checkpoint), start(checkpoint, enable_prefix_caching=False)
    first = reference["prompt_130"].tolist() + reference["gen_130"].tolist()
    assert greedy(core, [reference["prompt_130"].tolist()]) == [reference["gen_130"].tolist()]
    second = first + reference["prompt_65"].tolist()
    assert greedy(core, [second]) == greedy(alone, [second])
    assert core.scheduler.num_prefix_hits == 192  # of 194 tokens, the last of which was never computed


def test_prompts_that_branch_meet_at_the_third(checkpoint: Path, reference: Any):
    """What two prompts have in common is known once the second leaves it, and the third goes on from there."""
    common = reference["prompt_300"].tolist()[:100]
    tree = [common + [token] * 40 for token in (1, 2, 3, 4)] + [common[:50] + [5] * 30, common[:50] + [6] * 30]
    alone = start(checkpoint, enable_prefix_caching=False)
    core = start(checkpoint)
    hits = []
    for ids in tree * 2:
        before = core.scheduler.num_prefix_hits
        assert greedy(core, [ids], 20) == greedy(alone, [ids], 20)
        hits.append(core.scheduler.num_prefix_hits - before)
    assert hits == [0, 0, 96, 96, 0, 48, 128, 128, 128, 128, 64, 64]
