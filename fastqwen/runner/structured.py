"""Structured output in the sampler: which tokens a row's grammar allows next.

The matchers live on the host and see each token after it was sampled, so a step with such a row cannot run ahead of it.
Masks are computed beside the model (``mask_lanes.py``). A row whose mask is not there in time steps aside: the others do not
wait for it, and it is computed again in a later step. A grammar that costs more than its budget ends.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from threading import Lock
from typing import Protocol

import llguidance
import numpy as np
import torch
from torch import Tensor

from fastqwen.records import Admission, Failure
from fastqwen.runner.choices import Choice
from fastqwen.runner.mask_lanes import Bits, Lane, Mask, Native, Row
from fastqwen.runner.results import only_this_row
from fastqwen.runner.sampler import FORBIDDEN

MAX_CACHED_GRAMMARS = 64
PATIENCE_S = 0.02  # what one step's other rows wait for masks in all
LONE_PATIENCE_S = 0.2  # where no other row waits
SLOW_S = 0.01  # masks that take longer have a lane of their own, so that the quick ones do not stand behind them
SWIFT_S = 0.001  # masks that take less are computed together: asking for one costs more than the mask
MOST_MASK_THREADS = 4  # for those, where there are processors enough
SLOW_NICENESS = 10  # where processors are short, the model's threads go first
BUDGET_S = 2.0  # of processor time for one grammar's masks, whoever uses it, and
BUDGET_PER_TOKEN_S = 0.02  # as much more for each of its tokens


class Meter:
    """What following one grammar has cost so far, all of its requests together."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self.last_s: float | None = None  # not known before the first mask
        self.num_tokens = 0

    def note(self, took_s: float, num_tokens: int) -> None:
        self.spent_s += took_s
        self.last_s = took_s
        self.num_tokens += num_tokens

    @property
    def is_quick(self) -> bool:
        """As far as is known."""
        return self.last_s is not None and self.last_s <= SLOW_S

    @property
    def is_swift(self) -> bool:
        """So quick that it is followed together with others, and none of them is kept waiting."""
        return self.last_s is not None and self.last_s <= SWIFT_S

    @property
    def problem(self) -> str | None:
        if self.spent_s <= BUDGET_S + BUDGET_PER_TOKEN_S * self.num_tokens:
            return None
        return (
            f"following it took {self.spent_s:.1f} s for {self.num_tokens} tokens: make it simpler, or less ambiguous"
        )


class GrammarCompiler:
    """Compiled grammars, the least recently used ones forgotten. ``compile`` may be called from any thread."""

    def __init__(self, load_tokenizer: Callable[[], llguidance.LLTokenizer]) -> None:
        self._load_tokenizer = load_tokenizer
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._cache: OrderedDict[str, tuple[llguidance.LLMatcher, Meter]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._cache)

    def tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer()
            return self._tokenizer

    def compile(self, grammar: str) -> tuple[llguidance.LLMatcher, Meter]:
        """A matcher at its beginning, the caller's own, and the grammar's meter. ``is_error`` says whether it is usable."""
        tokenizer = self.tokenizer()
        with self._lock:
            known = self._cache.get(grammar)
            if known is not None:
                self._cache.move_to_end(grammar)
                return known[0].deep_copy(), known[1]
        made = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        with self._lock:
            _, meter = self._cache.setdefault(grammar, (made, Meter()))
            while len(self._cache) > MAX_CACHED_GRAMMARS:
                self._cache.popitem(last=False)
            return made.deep_copy(), meter


class _Constraint:
    """One row's matcher. It sleeps until the text ``after`` has been generated; until then nothing may end the answer, which
    would be none of the required form."""

    def __init__(
        self, admission: Admission, matcher: llguidance.LLMatcher, meter: Meter, tokenizer: llguidance.LLTokenizer
    ) -> None:
        grammar = admission.grammar
        assert grammar is not None
        self.end_ids = admission.stop_token_ids
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._awaited = grammar.after.encode()
        self._tail = b""
        self._untaken: list[int] = []  # tokens that the matcher has not seen yet
        self.meter = meter
        self.job: Future[Mask] | None = None

    def take(self, token_ids: Sequence[int]) -> None:
        if self.job is not None:
            wait([self.job])  # whoever takes a token without its mask: the job has the matcher to itself
        self.job = None
        for index, token_id in enumerate(token_ids):
            if not self._awaited:
                self._untaken += token_ids[index:]
                return
            self._tail += self._tokenizer.decode_bytes([token_id])
            if self._awaited in self._tail:
                self._awaited = b""
            self._tail = self._tail[-len(self._awaited) :]

    @property
    def active(self) -> bool:
        return not self._awaited

    @property
    def is_waiting(self) -> bool:
        return self.job is not None and not self.job.done()

    def row(self) -> Row:
        """Its matcher, and what that must take. In a lane: nothing else touches it until the mask is there."""
        untaken, self._untaken = self._untaken, []
        return self._matcher, untaken


def _compute(constraints: Sequence[_Constraint], tokenizer: llguidance.LLTokenizer, native: Native) -> list[Mask]:
    """Together, so that Python asks once for all; each has cost as much as another."""
    problems = [one.meter.problem for one in constraints]
    going_on = [one for one, problem in zip(constraints, problems, strict=True) if problem is None]
    rows = [one.row() for one in going_on]
    begin_s = native.time_s()
    masks = iter(native.follow(rows, tokenizer) if rows else ())
    took_s = native.time_s() - begin_s
    for one, (_, taken) in zip(going_on, rows, strict=True):
        one.meter.note(took_s / len(rows), len(taken))
    return [next(masks) if problem is None else (np.zeros(0, dtype=np.int32), problem) for problem in problems]


class Constraints(Protocol):
    """What a runner asks about rows with grammars."""

    def admit(self, admissions: Sequence[Admission]) -> None: ...

    def constrains(self, slot: int) -> bool: ...

    def is_late(self, slot: int) -> bool: ...

    def bits(self, choices: Sequence[Choice], vocab_size: int, errors: dict[int, Failure]) -> tuple[set[int], Bits]: ...

    def take(self, slots: Sequence[int], token_ids: Sequence[int]) -> None: ...


def mask(structured: Constraints, logits: Tensor, choices: Sequence[Choice], errors: dict[int, Failure]) -> set[int]:
    """Forbid tokens in place: logits [choices, vocab]. The rest is as ``bits`` has it."""
    late, allowed = structured.bits(choices, logits.shape[1], errors)
    for index in np.flatnonzero((allowed != -1).any(axis=1)).tolist():
        found = np.unpackbits(allowed[index].view(np.uint8), bitorder="little", count=logits.shape[1])
        logits[index].masked_fill_(torch.from_numpy(found == 0).to(logits.device), FORBIDDEN)
    return late


class StructuredOutput:
    """A constraint per slot, for the slots that have one."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._constraints: dict[int, _Constraint] = {}
        self._quick = Lane("masks", num_threads=max(1, min(MOST_MASK_THREADS, (os.cpu_count() or 1) // 4)))
        self._new = Lane("first-masks", SLOW_NICENESS)
        self._slow = Lane("slow-masks", SLOW_NICENESS)

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Also after a preemption: what was generated before is taken in again."""
        for admission in admissions:
            gone = self._constraints.pop(admission.slot, None)
            if gone is not None and gone.job is not None:
                gone.job.cancel()
            if admission.grammar is not None:
                matcher, meter = self._compiler.compile(admission.grammar.text)
                constraint = _Constraint(admission, matcher, meter, self._compiler.tokenizer())
                constraint.take(admission.token_ids[admission.num_prompt_tokens :])
                self._constraints[admission.slot] = constraint
                self._begin([constraint])

    def constrains(self, slot: int) -> bool:
        return slot in self._constraints

    def is_late(self, slot: int) -> bool:
        constraint = self._constraints.get(slot)
        return constraint is not None and constraint.is_waiting and constraint.meter.problem is None

    def bits(self, choices: Sequence[Choice], vocab_size: int, errors: dict[int, Failure]) -> tuple[set[int], Bits]:
        """Which tokens may come, [choices, vocab_size / 32]. Rows that cannot go on are added to ``errors``, with the reason.

        Before them the rows that must step aside, because their masks are not there yet; their tokens are worth nothing. A
        row with a grammar has one choice in a step: the next one depends on it.
        """
        found = {index: self._constraints.get(choice.slot) for index, choice in enumerate(choices)}
        active = {index: one for index, one in found.items() if one is not None and one.active}
        self._wait(list(active.values()), alone=len(active) == len(choices))
        allowed = np.full((len(choices), -(-vocab_size // 32)), -1, dtype=np.int32)
        for index, asleep in found.items():
            if asleep is not None and not asleep.active:
                for token in asleep.end_ids:
                    allowed[index, token // 32] &= ~np.int32(np.uint32(1 << token % 32).view(np.int32))
        late = set()
        for index, constraint in active.items():
            row = choices[index].row
            problem = constraint.meter.problem
            if problem is None and constraint.is_waiting:
                late.add(row)
                continue
            with only_this_row(row, errors):
                self._allow(allowed[index], constraint, problem, row, errors)
        return late - errors.keys(), allowed

    def _allow(
        self, allowed: Bits, constraint: _Constraint, problem: str | None, row: int, errors: dict[int, Failure]
    ) -> None:
        """allowed [vocab_size / 32], of one choice"""
        if problem is None:
            assert constraint.job is not None
            known, problem = constraint.job.result()
        if problem is not None:
            why = problem.partition("\n")[0][:300]
            errors.setdefault(row, Failure("grammar", f"the grammar for structured output cannot be used: {why}"))
            return
        count = min(len(allowed), len(known))
        allowed[:count] = known[:count]
        allowed[count:] = 0

    def take(self, slots: Sequence[int], token_ids: Sequence[int]) -> None:
        """What was sampled in these slots."""
        taken = []
        for slot, token_id in zip(slots, token_ids, strict=True):
            constraint = self._constraints.get(slot)
            if constraint is not None:
                constraint.take([token_id])
                taken.append(constraint)
        self._begin(taken)

    def _begin(self, constraints: Sequence[_Constraint]) -> None:
        """Their next masks are computed while the model computes the next step."""
        together = []
        for one in constraints:
            meter = one.meter
            if not one.active or one.job is not None:
                continue
            if meter.is_swift:
                together.append(one)
                continue
            lane = self._quick if meter.is_quick else self._new if meter.last_s is None else self._slow
            self._submit(lane, [one])
        self._submit(self._quick, together)

    def _submit(self, lane: Lane, constraints: list[_Constraint]) -> None:
        if not constraints:
            return
        work = partial(_compute, constraints, self._compiler.tokenizer())
        for one, job in zip(constraints, lane.submit(len(constraints), work), strict=True):
            one.job = job

    def _wait(self, constraints: Sequence[_Constraint], *, alone: bool) -> None:
        """``alone``: no other row waits. Else only those that are known to be quick are waited for."""
        jobs = [one.job for one in constraints if one.job is not None and (alone or one.meter.is_quick)]
        if jobs and not all(job.done() for job in jobs):
            wait(jobs, timeout=LONE_PATIENCE_S if alone else PATIENCE_S)
