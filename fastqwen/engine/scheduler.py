"""Which sequences run in a step, and how many tokens of each.

There is no prefill phase and no decode phase: every sequence has known tokens and computed tokens, and a step catches up
some of the difference under a token budget. Chunked prefill, decode, prefix hits and recompute after preemption are
the same thing. ``schedule`` may run ahead: it may be called again before the step that it returned has been committed.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from operator import attrgetter
from typing import Any

import msgspec

from fastqwen.engine.blocks import BlockPool
from fastqwen.engine.policy import StepPolicy, in_order
from fastqwen.engine.sequence import NO_SLOT, Sequence
from fastqwen.engine.snapshots import SnapshotPool
from fastqwen.records import Admission, EngineRequest, RequestDelta, Row, SampledRow, ScheduledBatch, StepOutput

ADMISSION_HEADROOM_BLOCKS = 8

_ORDER = attrgetter("order")  # a sort key that costs nothing a row


class Scheduler:
    """Raises nothing on a request that client/prepare.py made.

    rope_key_of(num_prompt_tokens, max_tokens) names the rotary profile that a new sequence gets; max_tokens is None
    where the caller set no limit. ``snapshots``, for a model with states of fixed size: a cached prefix is of use up to
    where a copy of them was kept. Copies are made at the last block boundary of a prompt, where a prompt leaves what
    others have in common, and at the newest block boundary of an answer.
    """

    def __init__(
        self,
        blocks: BlockPool,
        policy: StepPolicy,
        *,
        max_num_seqs: int,
        enable_prefix_caching: bool = True,
        rope_key_of: Callable[[int, int | None], str] = lambda num_prompt, max_tokens: "",
        snapshots: SnapshotPool | None = None,
    ) -> None:
        self.blocks = blocks
        self.policy = policy
        self.enable_prefix_caching = enable_prefix_caching
        self.num_preemptions = 0
        self.num_prefix_queries = 0  # prompt tokens looked up
        self.num_prefix_hits = 0  # prompt tokens found
        self._rope_key_of = rope_key_of
        self._snapshots = snapshots
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[tuple[tuple[int, float, str], int, Sequence]] = []
        self._running: list[Sequence] = []
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._step_id = 0
        self._num_pushes = 0

    # ---- what others ask ----

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def max_sequence_tokens(self) -> int:
        """The longest sequence, prompt and output together, that the whole pool can hold."""
        return self.blocks.num_blocks * self.blocks.block_size

    def audit(self) -> None:
        """Call when idle: nothing may be left behind."""
        assert not self._sequences and not self._running, "sequences are left"
        self._drop_gone_waiting()
        assert not self._waiting
        assert self.blocks.num_free == self.blocks.num_blocks, "blocks are still used"
        self.blocks.audit()
        if self._snapshots is not None:
            self._snapshots.audit()

    # ---- requests come and go ----

    def add(self, request: EngineRequest) -> None:
        assert request.request_id not in self._sequences, f"request id {request.request_id!r} is in use"
        num_prompt = len(request.prompt_token_ids)
        assert num_prompt > 0 and num_prompt + request.max_tokens - 1 <= self.max_sequence_tokens, "not checked before"
        assert len(request.said_token_ids) < request.max_tokens, "nothing is left to say"
        limit = None if request.is_open_ended else request.max_tokens
        sequence = Sequence(request, self._rope_key_of(num_prompt, limit))
        self._sequences[request.request_id] = sequence
        self._push_waiting(sequence)

    def abort(self, request_id: str) -> RequestDelta | None:
        """End a request now. None if it had ended already."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._finish(sequence, finish_reason="abort")

    # ---- a step ----

    def schedule(self, is_late: Callable[[int], bool | None] = lambda slot: None) -> ScheduledBatch | None:
        """The next step, or None if nothing can advance before an earlier step is committed.

        ``is_late`` says of the slot of a row that stepped aside whether it would again (engine/executor.py).
        """
        rows: list[Row] = []
        admissions: list[Admission] = []
        now_s = time.monotonic()
        aside = {one.request_id for one in self._running if one.is_aside and one.stays_aside(now_s, is_late)}
        prompts_first = self.policy.prompts_first
        budget = self.policy.token_budget(self._running)
        budget = self._schedule_running(rows, budget, aside, streams=not prompts_first)
        budget = self._schedule_waiting(rows, admissions, budget)
        if prompts_first:
            self._schedule_running(rows, budget, aside, prompts=False)
        if not rows:
            return None
        index, surplus = self.policy.surplus(rows)
        if surplus:
            rows[index] = self._shortened(rows[index], surplus)
        if self._snapshots is not None and self.enable_prefix_caching:
            rows = [self._with_copy(row, self._snapshots) for row in rows]
        self._step_id += 1
        return ScheduledBatch(step_id=self._step_id, admissions=admissions, rows=in_order(rows))

    def commit(self, batch: ScheduledBatch, output: StepOutput) -> list[RequestDelta]:
        """Take in what a step sampled. Rows of requests that ended meanwhile are surplus and dropped."""
        deltas = []
        for row, sampled in zip(batch.rows, output.rows, strict=True):
            sequence = self._sequences.get(row.request_id)
            if row.keep_state is not None:
                self._file_copy(sequence, row, row.keep_state, is_sound=sampled.error is None)
            if sequence is not None:
                delta = self._commit_row(sequence, row, sampled, batch.step_id)
                if delta is not None:
                    deltas.append(delta)
        return deltas

    def step_aside(self, request_ids: Items[str]) -> None:
        """These rows of the step just scheduled give no token; no later step of theirs is in flight."""
        now_s = time.monotonic()
        for request_id in request_ids:
            self._sequences[request_id].step_aside(now_s)

    def _shortened(self, row: Row, surplus: int) -> Row:
        """The same row, computing fewer tokens; the blocks that it took stay its own."""
        sequence = self._sequences[row.request_id]
        sequence.num_computed -= surplus
        sequence.num_pending -= row.num_logits + row.pools
        return msgspec.structs.replace(row, num_tokens=row.num_tokens - surplus, num_logits=0, pools=False)

    def _schedule_running(
        self, rows: list[Row], budget: int, aside: set[str], *, prompts: bool = True, streams: bool = True
    ) -> int:
        """Advance what runs and has no row yet, in order; preempt from the end of the order when blocks run out."""
        self._running.sort(key=_ORDER)
        scheduled = {row.request_id for row in rows}
        index = 0
        while index < len(self._running) and budget > 0:
            sequence = self._running[index]
            index += 1
            if sequence.request_id in aside:
                continue
            num_left = sequence.num_left
            if not sequence.wants_more or not (streams if num_left == 1 else prompts):
                continue
            if sequence.request_id in scheduled:
                continue
            # A long prompt leaves one token of the budget to each stream behind it, so that none of them stalls.
            behind = len(self._running) - index if streams else 0
            num_tokens = sequence.before_copy(min(num_left, max(1, budget - behind)))
            if not self._make_room(sequence, num_tokens, scheduled):
                break  # it was the last in the order and preempted itself, or whoever is last computes in this step
            rows.append(self._advance(sequence, num_tokens))
            budget -= num_tokens
        return budget

    def _make_room(self, sequence: Sequence, num_tokens: int, scheduled: set[str]) -> bool:
        num_missing = self._missing_blocks(sequence, num_tokens)
        while num_missing and num_missing > self.blocks.num_free:
            victim = self._running[-1]
            if victim.request_id in scheduled:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _schedule_waiting(self, rows: list[Row], admissions: list[Admission], budget: int) -> int:
        self._drop_gone_waiting()
        while self._waiting and self._free_slots and budget > 0:
            sequence = self._waiting[0][2]
            if sequence.num_pending:
                break  # preempted with a step in flight: its last token must be read first
            admission = self._try_admit(sequence)
            if admission is None:
                break
            heapq.heappop(self._waiting)
            admissions.append(admission)
            num_tokens = sequence.before_copy(min(sequence.num_left, budget))
            rows.append(self._advance(sequence, num_tokens, new_blocks=tuple(sequence.blocks)))
            budget -= num_tokens
            self._drop_gone_waiting()
        return budget

    def _try_admit(self, sequence: Sequence) -> Admission | None:
        """Give the sequence a slot and the cached part of its prompt, if all that is known of it fits.

        Not only its first chunk: two long prompts would else push each other out again and again.
        """
        cached, kept_state = self._cached_blocks(sequence)
        num_computed = len(cached) * self.blocks.block_size
        needed = self._blocks_for(sequence.num_known) - len(cached) + self.blocks.num_free_among(cached)
        # Blocks for the next tokens of the running sequences stay free, or the newcomer would soon push one out.
        headroom = min(len(self._running), ADMISSION_HEADROOM_BLOCKS)
        if self._running and needed + headroom > self.blocks.num_free:
            return None
        self.blocks.share(cached)
        sequence.blocks = list(cached)
        sequence.num_computed = num_computed
        sequence.num_registered = len(cached)
        sequence.admitted_in_step = self._step_id + 1
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.waited_s = max(0.0, time.monotonic() - sequence.request.arrival_s)
            sequence.num_cached = min(num_computed, sequence.num_prompt)
            self.num_prefix_queries += sequence.num_prompt
            self.num_prefix_hits += sequence.num_cached
        sequence.slot = self._free_slots.pop()
        self._running.append(sequence)
        request = sequence.request
        return Admission(
            slot=sequence.slot,
            request_id=request.request_id,
            token_ids=list(sequence.token_ids),
            num_prompt_tokens=sequence.num_prompt,
            sampling=request.sampling,
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
            rope_key=sequence.rope_key,
            grammar=request.grammar,
            kept_state=kept_state,
        )

    def _cached_blocks(self, sequence: Sequence) -> tuple[list[int], int | None]:
        """The blocks that hold a sequence's beginning, and the place of the copy of states behind them."""
        sequence.keep_at = []
        request = sequence.request
        if not self.enable_prefix_caching or request.sampling.prompt_logprobs is not None or request.pooling == "all":
            return [], None  # every position's logits, or hidden state, is needed
        # The last known token is always computed: its logits are what the step is for.
        usable = (len(sequence.token_ids) - 1) // self.blocks.block_size
        hashes = sequence.hashes(self.blocks.block_size)[:usable]
        found = self.blocks.match(hashes)
        if self._snapshots is None:
            return found, None
        # Where known blocks end, another prompt went on differently: a third one may, too.
        sequence.keep_at = sorted({len(found) * self.blocks.block_size, usable * self.blocks.block_size})
        count, place = self._snapshots.deepest(hashes[: len(found)]) or (0, None)
        return found[:count], place

    def _with_copy(self, row: Row, snapshots: SnapshotPool) -> Row:
        """The row, with a place for a copy of its states if it ends where one is to be made."""
        size, sequence = self.blocks.block_size, self._sequences[row.request_id]
        if row.end % size:
            return row
        # Every stream that passes a block's end replaces its newest copy. Where there are few places, they are left to
        # prompts, which others may begin with.
        answers = row.end >= sequence.num_prompt and snapshots.num_places >= 2 * len(self._running)
        if not answers and row.end not in sequence.keep_at:
            return row
        hashes = sequence.hashes(size)
        if row.end // size <= len(hashes) and hashes[row.end // size - 1] in snapshots:
            return row
        place = snapshots.take()
        return row if place is None else msgspec.structs.replace(row, keep_state=place)

    def _file_copy(self, sequence: Sequence | None, row: Row, place: int, *, is_sound: bool) -> None:
        """A step that made a copy of a sequence's states is done, and the tokens that they hold are known."""
        snapshots = self._snapshots
        assert snapshots is not None
        if sequence is None or not is_sound or row.end > len(sequence.token_ids):
            snapshots.give_back(place)
            return
        hashes = sequence.hashes(self.blocks.block_size)
        snapshots.file(place, hashes, row.end)
        if row.end >= sequence.num_prompt:
            block_hash = hashes[row.end // self.blocks.block_size - 1]
            if sequence.newest_copy is not None and sequence.newest_copy != block_hash:
                snapshots.drop(sequence.newest_copy)
            sequence.newest_copy = block_hash

    def _advance(self, sequence: Sequence, num_tokens: int, new_blocks: tuple[int, ...] = ()) -> Row:
        """Of the blocks that the row brings to its slot, ``new_blocks`` are the shared ones; most rows bring none."""
        num_missing = self._missing_blocks(sequence, num_tokens)
        if num_missing:
            taken = self.blocks.take(num_missing)
            sequence.blocks += taken
            new_blocks += tuple(taken)
        start, repeats = sequence.num_computed, sequence.repeats
        sequence.num_computed += num_tokens
        sequence.repeats = sequence.is_aside = False
        last = sequence.num_computed == sequence.num_known
        pools = last and sequence.request.pooling is not None
        sequence.num_pending += last  # a vector is waited for like a token
        return Row(
            slot=sequence.slot,
            request_id=sequence.request_id,
            start=start,
            num_tokens=num_tokens,
            new_blocks=new_blocks,
            num_logits=1 if last and not pools else 0,
            pools=pools,
            pools_all=sequence.request.pooling == "all",
            prompt_logprobs=sequence.request.sampling.prompt_logprobs is not None and start < sequence.num_prompt - 1,
            repeats=repeats,
        )

    def _commit_row(self, sequence: Sequence, row: Row, sampled: SampledRow, step_id: int) -> RequestDelta | None:
        if sampled.error is not None:
            return self._finish(sequence, finish_reason="error", error=sampled.error)
        if sampled.stepped_aside:
            if sampled.prompt_logprobs is None:
                return None
            return RequestDelta(request_id=row.request_id, prompt_logprobs=sampled.prompt_logprobs)
        sequence.num_late = max(0, sequence.num_late - 2)  # who waited long for a token will for the next
        sequence.num_pending -= row.num_logits + row.pools
        sequence.token_ids += sampled.token_ids
        if sequence.slot != NO_SLOT and step_id >= sequence.admitted_in_step:  # else preempted since: other blocks now
            num_taken_back = row.num_logits - len(sampled.token_ids)
            if num_taken_back:
                assert self._snapshots is None, "states of fixed size cannot be taken back"
                sequence.roll_back(num_taken_back)
            self._register_full_blocks(sequence, row.end - num_taken_back)
        if row.pools_all:
            assert sampled.embedding is not None
            # After a preemption all begins again.
            sequence.vectors = [*(sequence.vectors if row.start else []), sampled.embedding]
        if row.pools:
            told = b"".join(sequence.vectors) if row.pools_all else sampled.embedding
            assert told is not None
            return self._finish(sequence, finish_reason="stop", num_cached_tokens=sequence.num_cached, embedding=told)
        if not row.num_logits:
            if sampled.prompt_logprobs is None:
                return None
            return RequestDelta(request_id=row.request_id, prompt_logprobs=sampled.prompt_logprobs)
        delta = self._delta_of(sequence, sampled)
        if delta.finish_reason:
            self._forget(sequence)
        return delta

    def _delta_of(self, sequence: Sequence, sampled: SampledRow) -> RequestDelta:
        """Up to the token that ends the answer; what was sampled behind it is dropped."""
        request, token_ids, logprobs = sequence.request, sampled.token_ids, sampled.logprobs
        num_before = sequence.num_generated - len(token_ids)
        stopped = at_length = False
        for index, token_id in enumerate(token_ids):
            num_generated = num_before + index + 1
            stopped = token_id in request.stop_token_ids and num_generated >= request.sampling.min_tokens
            at_length = num_generated >= request.max_tokens
            if stopped or at_length:
                token_ids, logprobs = token_ids[: index + 1], logprobs and logprobs[: index + 1]
                break
        return RequestDelta(
            request_id=sequence.request_id,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=sampled.prompt_logprobs,
            finish_reason="stop" if stopped else "length" if at_length else None,
            stop_reason=token_ids[-1] if stopped else None,
            num_cached_tokens=sequence.num_cached,
            waited_s=0.0 if num_before else sequence.waited_s,
            num_preemptions=sequence.num_preemptions,
        )

    # ---- blocks of a sequence ----

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)

    def _missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        num_blocks = -(-(sequence.num_computed + num_tokens) // self.blocks.block_size)
        return max(0, num_blocks - len(sequence.blocks))

    def _register_full_blocks(self, sequence: Sequence, num_done: int) -> None:
        if not self.enable_prefix_caching:
            return
        size = self.blocks.block_size
        num_full = min(num_done, len(sequence.token_ids)) // size
        if num_full <= sequence.num_registered:
            return
        hashes = sequence.hashes(size)
        for index in range(sequence.num_registered, num_full):
            self.blocks.register(sequence.blocks[index], hashes[index])
        sequence.num_registered = num_full

    # ---- leaving ----

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self._leave_slot(sequence)
        sequence.forget_cache()
        self._push_waiting(sequence)

    def _finish(self, sequence: Sequence, **gained: Any) -> RequestDelta:
        self._forget(sequence)
        return RequestDelta(request_id=sequence.request_id, num_preemptions=sequence.num_preemptions, **gained)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request_id]
        if sequence in self._running:
            self._leave_slot(sequence)

    def _leave_slot(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.blocks.release(sequence.blocks)
        self._free_slots.append(sequence.slot)

    def _drop_gone_waiting(self) -> None:
        """Aborted sequences stay in the heap until they reach its top; then they are passed over."""
        while self._waiting and self._sequences.get(self._waiting[0][2].request_id) is not self._waiting[0][2]:
            heapq.heappop(self._waiting)

    def _push_waiting(self, sequence: Sequence) -> None:
        self._num_pushes += 1
        heapq.heappush(self._waiting, (sequence.order, self._num_pushes, sequence))
