"""An executor that computes nothing: the next token is a hash of the sequence's seed and position."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from fastqwen.client.engine import Ready
from fastqwen.client.local_engine import LocalEngine
from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.core import EngineCore
from fastqwen.engine.policy import StepPolicy
from fastqwen.engine.scheduler import Scheduler
from fastqwen.model_config import ModelConfig, RopeConfig
from fastqwen.plan import EnginePlan
from fastqwen.records import EngineRequest, Failure, SampledRow, Sampling, ScheduledBatch, StepOutput

VOCAB = 997
READY = Ready(
    EnginePlan(
        dtype="float32", kv_cache_dtype="float32", block_size=4, num_blocks=64, max_model_len=256,
        max_num_seqs=8, max_num_batched_tokens=32,
        weights_bytes=0, kv_bytes_per_token=1,
    ),
    ModelConfig(
        model_type="qwen2", dtype="float32", vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_layers=1,
        num_heads=1, num_kv_heads=1, head_dim=8, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=256, rope=RopeConfig(theta=1e4),
    ),
)  # fmt: skip
NOT_FINITE = Failure("not_finite", "not finite")


def token_at(seed: int, position: int) -> int:
    return (seed * 7919 + position * 104729) % VOCAB


def vector_at(tokens: list[int]) -> bytes:
    """Another one for each text."""
    return hashlib.blake2b(repr(tokens).encode(), digest_size=16).digest()


class FakeHandle:
    def __init__(self, output: StepOutput) -> None:
        self._output = output
        self.late = [row.request_id for row in output.rows if row.stepped_aside]

    def result(self) -> StepOutput:
        return self._output


class FakeExecutor:
    """Checks what a real device would silently get wrong: every position is computed once, in its sequence's blocks."""

    def __init__(self, run_ahead: int = 1, block_size: int = 4) -> None:
        self.run_ahead = run_ahead
        self.block_size = block_size
        self.batches: list[ScheduledBatch] = []
        self.fail: set[str] = set()
        self.late: set[tuple[str, int]] = set()  # request and position: the first time that it is due, it steps aside
        self.waits: Callable[[int], bool | None] = lambda slot: None
        self.broken = False
        self.step_s = 0.0
        self._seed: dict[int, int] = {}
        self._tokens: dict[int, list[int]] = {}
        self._tables: dict[int, list[int]] = {}
        self._contents: dict[tuple[int, int], tuple[int, ...]] = {}

    def submit(self, batch: ScheduledBatch) -> FakeHandle:
        self.batches.append(batch)
        if self.step_s:
            time.sleep(self.step_s)
        for admission in batch.admissions:
            self._seed[admission.slot] = admission.seed
            self._tokens[admission.slot] = list(admission.token_ids)
            self._tables[admission.slot] = []
        return FakeHandle(StepOutput(step_id=batch.step_id, rows=[self._run(row) for row in batch.rows]))

    def is_late(self, slot: int) -> bool | None:
        return self.waits(slot)

    def _run(self, row) -> SampledRow:
        table, tokens = self._tables[row.slot], self._tokens[row.slot]
        table.extend(row.new_blocks)
        assert row.num_tokens > 0
        end = row.start + row.num_tokens
        assert end <= len(tokens), "a token was scheduled before it was known"
        assert len(table) * self.block_size >= end, "no block for a token"
        for position in range(row.start, end):
            place = (table[position // self.block_size], position % self.block_size)
            self._contents[place] = tuple(tokens[: position + 1])
        for position in range(end):  # attention reads all of this: it must be this sequence's own past
            place = (table[position // self.block_size], position % self.block_size)
            assert self._contents[place] == tuple(tokens[: position + 1]), "a block holds another sequence's tokens"
        if self.broken:
            raise ZeroDivisionError("the device is broken")
        if row.request_id in self.fail:
            tokens.append(0)
            return SampledRow(request_id=row.request_id, token_ids=[0] * row.num_logits, error=NOT_FINITE)
        if row.pools_all:
            assert not row.num_logits and row.pools == (end == len(tokens))
            told = b"".join(vector_at(tokens[: place + 1]) for place in range(row.start, end))
            return SampledRow(request_id=row.request_id, embedding=told)
        if row.pools:
            assert end == len(tokens) and not row.num_logits
            return SampledRow(request_id=row.request_id, embedding=vector_at(tokens))
        if not row.num_logits:
            return SampledRow(request_id=row.request_id)
        assert end == len(tokens)
        if (row.request_id, end) in self.late:
            self.late.remove((row.request_id, end))
            return SampledRow(request_id=row.request_id, stepped_aside=True)
        tokens.append(token_at(self._seed[row.slot], end))
        return SampledRow(request_id=row.request_id, token_ids=[tokens[-1]])


def make_engine(
    *,
    blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 32,
    mixed_budget: int | None = None,
    tile: int = 1,
    prompts_first: bool = False,
    run_ahead: int = 1,
    caching: bool = True,
) -> tuple[EngineCore, FakeExecutor]:
    executor = FakeExecutor(run_ahead, block_size)
    scheduler = Scheduler(
        BlockPool(blocks, block_size),
        StepPolicy(
            max_num_batched_tokens=budget,
            max_num_mixed_tokens=mixed_budget,
            tile_tokens=tile,
            prompts_first=prompts_first,
        ),
        max_num_seqs=max_num_seqs,
        enable_prefix_caching=caching,
    )
    return EngineCore(scheduler, executor), executor


class ScriptedExecutor:
    """Says the same ids in every sequence."""

    run_ahead = 1

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids
        self._num_prompt_tokens: dict[int, int] = {}

    def submit(self, batch: ScheduledBatch) -> FakeHandle:
        for admission in batch.admissions:
            self._num_prompt_tokens[admission.slot] = admission.num_prompt_tokens
        return FakeHandle(StepOutput(step_id=batch.step_id, rows=[self._run(row) for row in batch.rows]))

    def _run(self, row) -> SampledRow:
        said = row.start + row.num_tokens - self._num_prompt_tokens[row.slot]
        return SampledRow(request_id=row.request_id, token_ids=[self._ids[said]] if row.num_logits else [])


def scripted(ids: list[int]) -> LocalEngine:
    """An engine whose answers are these ids; the last of them should end an answer."""
    scheduler = Scheduler(BlockPool(1024, 16), StepPolicy(max_num_batched_tokens=64), max_num_seqs=4)
    return LocalEngine(EngineCore(scheduler, ScriptedExecutor(ids)), READY)


def request(
    name: str,
    prompt: list[int] | int = 10,
    max_tokens: int = 5,
    *,
    seed: int = 1,
    stop: list[int] | None = None,
    **more,
) -> EngineRequest:
    ids = list(range(prompt)) if isinstance(prompt, int) else prompt
    return EngineRequest(
        request_id=name,
        prompt_token_ids=ids,
        sampling=more.pop("sampling", Sampling()),
        stop_token_ids=stop or [],
        max_tokens=max_tokens,
        seed=seed,
        **more,
    )


def run(engine: EngineCore) -> dict[str, list]:
    """All deltas by request, until the engine is idle and audited."""
    found: dict[str, list] = {}
    for _ in range(10_000):
        if not engine.has_work:
            break
        for delta in engine.step():
            found.setdefault(delta.request_id, []).append(delta)
    assert not engine.has_work, "the engine does not come to an end"
    engine.step()
    return found


def tokens_of(deltas: list) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def expected(request: EngineRequest) -> list[int]:
    """What the fake generates for a request, run alone on an endless machine."""
    found: list[int] = []
    for position in range(len(request.prompt_token_ids), len(request.prompt_token_ids) + request.max_tokens):
        found.append(token_at(request.seed, position))
        if found[-1] in request.stop_token_ids and len(found) >= request.sampling.min_tokens:
            break
    return found
