"""The engine's loop body: keep the executor fed, commit what it returns."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque

import msgspec

from fastqwen.engine.executor import Executor, StepHandle
from fastqwen.engine.scheduler import Scheduler
from fastqwen.records import EngineRequest, RequestDelta, ScheduledBatch

ASIDE_S = 0.001
STEP_BOUNDS_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # as vLLM counts them


class EngineStats(msgspec.Struct, kw_only=True, frozen=True):
    """A snapshot for metrics. Counters grow from the start of the process."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_blocks: int = 0
    num_preemptions: int = 0
    prefix_queries_tokens: int = 0
    prefix_hits_tokens: int = 0
    num_steps: int = 0
    num_corrupted: int = 0
    num_step_tokens: int = 0  # of all steps
    steps_by_tokens: list[int] = []  # how many steps had at most so many tokens, by STEP_BOUNDS_TOKENS; last: more


class EngineCore:
    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self.scheduler = scheduler
        self._executor = executor
        self._in_flight: deque[tuple[ScheduledBatch, StepHandle]] = deque()
        self._aborted: list[RequestDelta] = []
        self.num_steps = 0
        self.num_corrupted = 0
        self._num_step_tokens = 0
        self._steps_by_tokens = [0] * (len(STEP_BOUNDS_TOKENS) + 1)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight) or bool(self._aborted)

    def add(self, request: EngineRequest) -> None:
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """The request's last delta comes with the next ``step``. Unknown ids are ignored: it may have just ended."""
        delta = self.scheduler.abort(request_id)
        if delta is not None:
            self._aborted.append(delta)

    def step(self) -> list[RequestDelta]:
        """Submit as far ahead as the executor allows, then commit the oldest step in flight."""
        deltas, self._aborted = self._aborted, []
        while len(self._in_flight) < self._executor.run_ahead:
            batch = self.scheduler.schedule(self._is_late)
            if batch is None:
                break
            handle = self._executor.submit(batch)
            self.scheduler.step_aside(handle.late)
            self._in_flight.append((batch, handle))
        if self._in_flight:
            batch, handle = self._in_flight.popleft()
            output = handle.result()
            self.num_steps += 1
            self._num_step_tokens += batch.num_tokens
            self._steps_by_tokens[bisect_left(STEP_BOUNDS_TOKENS, batch.num_tokens)] += 1
            self.num_corrupted += sum(row.error is not None for row in output.rows)
            deltas += self.scheduler.commit(batch, output)
        elif not self.scheduler.has_work:
            self.scheduler.audit()
        else:
            time.sleep(ASIDE_S)  # all that runs has stepped aside
        return deltas

    def _is_late(self, slot: int) -> bool | None:
        return self._executor.is_late(slot)

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_usage=scheduler.blocks.usage,
            num_blocks=scheduler.blocks.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            prefix_queries_tokens=scheduler.num_prefix_queries,
            prefix_hits_tokens=scheduler.num_prefix_hits,
            num_steps=self.num_steps,
            num_corrupted=self.num_corrupted,
            num_step_tokens=self._num_step_tokens,
            steps_by_tokens=list(self._steps_by_tokens),
        )
