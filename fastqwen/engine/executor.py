"""What the engine needs of whatever computes: submit a step, get a handle, ask it for the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastqwen.records import ScheduledBatch, StepOutput


class StepHandle(Protocol):
    @property
    def late(self) -> Sequence[str]:
        """Requests whose rows step aside, known when the step was submitted: what their tokens depend on is not there
        yet. Each is computed again in a later step."""

    def result(self) -> StepOutput:
        """Wait for the step and read what it sampled. Called once."""


class Executor(Protocol):
    """``run_ahead`` is the number of steps that may be submitted before the first one's result is read, at least 1."""

    run_ahead: int

    def submit(self, batch: ScheduledBatch) -> StepHandle: ...

    def is_late(self, slot: int) -> bool | None:
        """Whether the row that stepped aside in this slot would do so again; None where that is not known."""
