"""What the engine needs of whatever computes: submit a step, get a handle, ask it for the result."""

from __future__ import annotations

from typing import Protocol

from fastqwen.records import ScheduledBatch, StepOutput


class StepHandle(Protocol):
    def result(self) -> StepOutput:
        """Wait for the step and read what it sampled. Called once."""


class Executor(Protocol):
    """``run_ahead`` is the number of steps that may be submitted before the first one's result is read, at least 1."""

    run_ahead: int

    def submit(self, batch: ScheduledBatch) -> StepHandle: ...
