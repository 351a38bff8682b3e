"""A layer that keeps a number of fixed size for each slot, instead of blocks: in a batch, preempted, and not resumed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from fastqwen.build import build_decoder
from fastqwen.config import EngineConfig
from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.core import EngineCore
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.engine.snapshots import SnapshotPool
from fastqwen.kernels import StateRoom, StepTokens
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.plan import make_plan
from fastqwen.runner.device import device_facts
from fastqwen.runner.model_runner import ModelRunner
from fastqwen.runner.states import WrongState
from fastqwen.weights.checkpoint import open_checkpoint
from fastqwen.weights.source import Weights
from tests.models.tiny import greedy, make, prompt

DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    vectors: Tensor  # [slots, hidden]

    def of_slot(self, slot: int) -> Sequence[Tensor]:
        return (self.vectors[slot],)


@dataclass(frozen=True)
class Fading:
    """Each token adds itself to a memory that fades; the memory is added to the token."""

    hidden_size: int

    def make_state(self, room: StateRoom) -> Memory:
        return Memory(torch.full((room.num_slots, self.hidden_size), float("nan")))  # of a sequence that is gone

    def add_to(self, residual: Tensor, step: StepTokens, state: Memory) -> None:
        for start, stop in itertools.pairwise(step.row_starts.tolist()):
            for token in range(start, stop):
                slot = int(step.slots[token])
                before = state.vectors[slot] if int(step.positions[token]) else torch.zeros(self.hidden_size)
                state.vectors[slot] = 0.7 * before + residual[token]
                residual[token] += 0.1 * state.vectors[slot]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tiny")
    make(found, "Qwen3Config", head_dim=16, num_hidden_layers=2)
    return found


def engine(
    folder: Path, *, num_blocks: int = 64, max_num_seqs: int = 4, budget: int = 64, snapshots: int = 0
) -> EngineCore:
    config = EngineConfig(model=str(folder), dtype="float32", max_num_seqs=max_num_seqs, max_model_len=64, block_size=8)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors is not None
    decoder = build_decoder(checkpoint.model, Weights(checkpoint.tensors, torch.float32, DEVICE), ReferenceOps())
    fading: Any = Fading(checkpoint.model.hidden_size)
    decoder = replace(decoder, layers=[replace(decoder.layers[0], mixer=fading), *decoder.layers[1:]])
    plan = msgspec.structs.replace(
        make_plan(checkpoint.model, config, device_facts(DEVICE)), max_state_snapshots=snapshots
    )
    runner = ModelRunner(checkpoint.model, decoder, plan, DEVICE)
    scheduler = Scheduler(
        BlockPool(min(num_blocks, plan.num_blocks), 8),
        StepPolicy(max_num_batched_tokens=budget),
        max_num_seqs=max_num_seqs,
        snapshots=SnapshotPool(snapshots, 8),
    )
    return EngineCore(scheduler, runner)


PROMPTS = [prompt(length) for length in (20, 3, 17, 30)]


def alone(folder: Path) -> list[list[int]]:
    return [greedy(engine(folder), [ids], 20)[0] for ids in PROMPTS]


def test_in_a_batch_in_chunks_and_in_a_slot_that_others_had(folder: Path):
    expected = alone(folder)
    assert greedy(engine(folder), PROMPTS, 20) == expected
    assert greedy(engine(folder, budget=7), PROMPTS, 20) == expected
    assert greedy(engine(folder, max_num_seqs=1), PROMPTS, 20) == expected


def test_a_preempted_sequence_begins_anew(folder: Path):
    core = engine(folder, num_blocks=12)
    assert greedy(core, PROMPTS, 20) == alone(folder)
    assert core.scheduler.num_preemptions > 0


def test_a_prefix_whose_memory_was_not_kept_is_no_hit(folder: Path):
    core = engine(folder)
    first = greedy(core, PROMPTS, 20)
    assert greedy(core, PROMPTS, 20) == first
    assert core.scheduler.num_prefix_hits == 0 and core.scheduler.num_prefix_queries > 0


def test_a_copy_of_a_memory_continues_it(folder: Path):
    core = engine(folder, snapshots=12)
    assert greedy(core, PROMPTS, 20) == greedy(core, PROMPTS, 20) == alone(folder)
    assert core.scheduler.num_prefix_hits == 16 + 16 + 24


def test_a_copy_of_other_tokens_is_refused(folder: Path):
    """A copy filed under a wrong length would continue with another memory than the prompt's."""
    core = engine(folder, snapshots=4)
    greedy(core, [prompt(30)], 2)
    pool: Any = core.scheduler._snapshots
    [(block_hash, (place, num_tokens))] = pool._filed.items()
    assert num_tokens == 24
    pool._filed = {block_hash: (place, 16)}
    with pytest.raises(AssertionError, match="a copy of 16 tokens stands for 3 blocks"):
        greedy(core, [prompt(30)], 2)
    core = engine(folder, snapshots=4)
    greedy(core, [prompt(30)], 2)
    runner: Any = core._executor
    kept = runner.slots.spare + 1
    runner.states._held = {slot: held - (slot >= kept) for slot, held in runner.states._held.items()}
    with pytest.raises(WrongState, match="begins at token 24, the slot's states hold 23"):
        greedy(core, [prompt(30)], 2)
