"""The engine's executor where several processes compute: each step goes to all ranks, and the first one answers."""

from __future__ import annotations

import weakref

import msgspec

from fastqwen.engine.executor import StepHandle
from fastqwen.errors import FastqwenError
from fastqwen.ranks import wire
from fastqwen.ranks.group import Group
from fastqwen.records import Grammar, ScheduledBatch, StepOutput


class RanksExecutor:
    """Raises RankLost once a rank has ended or hangs. The ranks end with this object."""

    def __init__(self, group: Group, *, run_ahead: int, patience_s: float | None) -> None:
        self.run_ahead = run_ahead
        self._group = group
        self._patience_s = patience_s
        self._constrained: set[int] = set()  # slots whose sequence has a grammar
        weakref.finalize(self, group.close)

    def submit(self, batch: ScheduledBatch) -> StepHandle:
        for one in batch.admissions:
            (self._constrained.discard if one.grammar is None else self._constrained.add)(one.slot)
        tells_late = any(row.slot in self._constrained for row in batch.rows)
        self._group.check()
        self._group.send_step(wire.Step(batch, tells_late), wire.Step(_without_grammars(batch)))
        late: list[str] = []
        if tells_late:
            message = self._receive()
            assert isinstance(message, wire.Submitted)
            late = message.late
        return _Step(self, late)

    def is_late(self, slot: int) -> bool | None:
        return None  # the first rank knows, and asking it costs as much as a step's beginning

    def read(self) -> StepOutput:
        self._group.send(0, wire.Read())
        message = self._receive()
        assert isinstance(message, wire.Result)
        return message.output

    def _receive(self) -> wire.FromRank:
        message = self._group.receive(self._patience_s)
        if isinstance(message, wire.Failed):
            self._group.close()
            raise FastqwenError(message.message)
        return message


class _Step:
    def __init__(self, executor: RanksExecutor, late: list[str]) -> None:
        self._executor = executor
        self.late = late

    def result(self) -> StepOutput:
        return self._executor.read()


def _without_grammars(batch: ScheduledBatch) -> ScheduledBatch:
    """What the ranks behind the first must know of grammars is which slots have one."""
    admissions = [
        one if one.grammar is None else msgspec.structs.replace(one, grammar=Grammar("")) for one in batch.admissions
    ]
    return msgspec.structs.replace(batch, admissions=admissions)
