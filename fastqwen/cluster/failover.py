"""Several engines as one: each request goes to one of them, and goes on at another when that one is lost.

A request goes on as one does that was pushed out of its engine for lack of memory, only elsewhere: its prompt, seed, sampling,
grammar and limits are what they were, and what was said so far comes with it (``EngineRequest.said_token_ids``). The rotary
profile follows from the prompt's length and limits, which are the same. So no token comes twice and none is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Protocol

import msgspec

from fastqwen.client.engine import AsyncStream, Deltas, Inlet, Reader, Ready, ServedEngine, State, Streams
from fastqwen.cluster.routing import Router, Ticket, pages_of
from fastqwen.engine.core import EngineStats
from fastqwen.errors import EngineGone, Overloaded
from fastqwen.records import EngineRequest, Failure, FinishReason, RequestDelta

log = logging.getLogger("fastqwen.cluster")

LOST_KINDS = ("gone", "closed")  # failures of the replica, not of the request
MAX_LOSSES = 3  # a request that was there when so many engines died is not given to another: it may be what kills them
NONE_LEFT = Failure("gone", "the replica that computed this answer was lost, and no other one of this model is there")
DEADLY = Failure(
    "gone", f"{MAX_LOSSES} replicas were lost while they computed this request: it is not tried on another"
)


class ReplicaEngine(ServedEngine, Inlet, Protocol):
    """What a replica must be able to do."""

    @property
    def is_draining(self) -> bool:
        """It finishes what it has and takes nothing new."""


@dataclass
class _Running:
    """A request, and where it is."""

    request: EngineRequest
    ticket: Ticket
    said: list[int] = field(default_factory=list)
    num_prompt_logprobs: int = 0  # handed on so far, and of them
    num_rescored: int = 0  # those that the present replica has told again
    num_cached_tokens: int | None = None  # as the first replica said
    num_losses: int = 0
    num_moves: int = 0
    aborted: bool = False

    @property
    def id_there(self) -> str:
        """Its name at its replica. After a move another one: the first replica may still compute it when it comes back."""
        name = self.request.request_id
        return f"{name}~{self.num_moves}" if self.num_moves else name


class _Tap:
    """What one replica says."""

    def __init__(self, engine: FailoverEngine, key: str) -> None:
        self._engine, self._key = engine, key

    def put(self, deltas: Deltas, num_ended: int) -> None:
        self._engine.take(self._key, deltas)


class FailoverEngine:
    """ServedEngine over the replicas that joined. All of it runs in one event loop.

    ``max_requests``: so many may run or wait at each replica; where all have as many, ``stream`` raises Overloaded.
    """

    failure = ""

    def __init__(self, router: Router, *, max_requests: int = 1024) -> None:
        self.router = router
        self.num_restarts = 0  # replicas that were lost
        self.num_moved = 0  # requests that went on elsewhere
        self._max_requests = max_requests
        self._replicas: dict[str, ReplicaEngine] = {}
        self._taps: dict[str, Reader] = {}
        self._running: dict[str, _Running] = {}
        self._moved_ids: dict[str, str] = {}  # a moved request's name at its replica -> its own
        self._streams = Streams()
        self._ready: Ready | None = None

    # ---- replicas come and go ----

    def add_replica(self, key: str, engine: ReplicaEngine) -> None:
        assert engine.ready is not None, "a replica joins once it is ready"
        self._ready = self._ready or engine.ready
        plan = engine.ready.plan
        self._replicas[key] = engine
        self._taps[key] = _Tap(self, key)
        self.router.join(key, cache_tokens=plan.num_blocks * plan.block_size)

    def remove_replica(self, key: str) -> None:
        """The replica is lost or not wanted any more: what runs there goes on elsewhere."""
        engine = self._replicas.pop(key)
        del self._taps[key]
        left = [name for name, one in self._running.items() if one.ticket.replica == key]
        self.router.leave(key)
        if left:
            engine.leave([self._running[name].id_there for name in left])
        self._deliver(self._moved(left, is_loss=engine.state != "ready" and not engine.is_draining))

    def __contains__(self, key: str) -> bool:
        return key in self._replicas

    @property
    def replicas(self) -> dict[str, ReplicaEngine]:
        return self._replicas

    def is_open(self, key: str) -> bool:
        engine = self._replicas[key]
        return engine.state == "ready" and not engine.is_draining

    # ---- ServedEngine ----

    @property
    def state(self) -> State:
        if any(self.is_open(key) for key in self._replicas):
            return "ready"
        return "loading" if self._ready is None else "restarting"

    @property
    def ready(self) -> Ready | None:
        return self._ready

    @property
    def loading(self) -> tuple[int, int]:
        return max((engine.loading for engine in self._replicas.values()), default=(0, 0))

    @property
    def silent_for_s(self) -> float:
        return min((engine.silent_for_s for engine in self._replicas.values()), default=0.0)

    def stats(self) -> EngineStats:
        """The sum of all replicas; ``kv_usage`` is their mean, by their sizes."""
        every = [engine.stats() for engine in self._replicas.values()]
        apart = ("kv_usage", "steps_by_tokens")
        sums = {
            name: sum(getattr(one, name) for one in every)
            for name in EngineStats.__struct_fields__
            if name not in apart
        }
        steps = [sum(counts) for counts in zip_longest(*(one.steps_by_tokens for one in every), fillvalue=0)]
        used = sum(one.kv_usage * one.num_blocks for one in every)
        usage = used / sums["num_blocks"] if sums["num_blocks"] else 0.0
        return EngineStats(**sums, steps_by_tokens=steps, kv_usage=usage)

    def admit(self) -> None:
        """Raises EngineGone where no replica takes requests, Overloaded where all have too many."""
        takers = [key for key in self._replicas if self.is_open(key)]
        if not takers:
            raise EngineGone("no replica of this model is ready")
        if all(self.router.num_requests(key) >= self._max_requests for key in takers):
            raise Overloaded(f"each of {len(takers)} replicas has {self._max_requests} requests: try again in a moment")

    def stream(self, requests: list[EngineRequest]) -> AsyncStream:
        """Raises as ``admit`` does."""
        self.admit()
        return AsyncStream(self, requests)

    # ---- Inlet ----

    def submit(self, stream: Reader, requests: list[EngineRequest]) -> None:
        self._streams.open(stream, requests)
        ended: Deltas = []
        for request in requests:
            ticket = self._ticket(request, [])
            if ticket is None:
                ended.append(RequestDelta(request_id=request.request_id, finish_reason="error", error=NONE_LEFT))
                continue
            self._running[request.request_id] = _Running(request, ticket)
            self._send(ticket, request)
        self._deliver(ended)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            one = self._running.get(request_id)
            if one is not None:
                one.aborted = True
                self._replicas[one.ticket.replica].abort([one.id_there])

    def leave(self, request_ids: list[str]) -> None:
        for request_id in self._streams.leave(request_ids):
            one = self._running.get(request_id)
            if one is not None:
                self._forget(one, whole=False)
                self._replicas[one.ticket.replica].leave([one.id_there])

    # ---- what replicas say ----

    def take(self, key: str, deltas: Deltas) -> None:
        """For a replica's tap."""
        known: Deltas = []
        lost: list[str] = []
        closed: list[str] = []
        for delta in deltas:
            one = self._running.get(self._moved_ids.get(delta.request_id, delta.request_id))
            if one is None or one.ticket.replica != key or one.id_there != delta.request_id:
                continue  # it has left, or goes on elsewhere
            if delta.error is not None and delta.error.kind in LOST_KINDS:
                (lost if delta.error.kind == "gone" else closed).append(one.request.request_id)
                continue
            known.append(self._noted(one, delta))
        self._deliver(known)
        self._deliver(self._moved(lost, is_loss=True) + self._moved(closed, is_loss=False))

    def _noted(self, one: _Running, delta: RequestDelta) -> RequestDelta:
        """The delta as the reader must get it: what an earlier replica told already is left out."""
        if delta.token_ids:
            one.said += delta.token_ids
            self.router.progress(one.ticket, len(delta.token_ids))
            one.num_cached_tokens = delta.num_cached_tokens if one.num_cached_tokens is None else one.num_cached_tokens
        if one.num_moves:
            delta = self._without_repetition(one, delta)
        elif delta.prompt_logprobs:
            one.num_prompt_logprobs += len(delta.prompt_logprobs)
        if delta.finish_reason is not None:
            self._forget(one, whole=delta.finish_reason in ("stop", "length"))
        return delta

    def _forget(self, one: _Running, *, whole: bool) -> None:
        del self._running[one.request.request_id]
        self._moved_ids.pop(one.id_there, None)
        self.router.end(one.ticket, whole=whole)

    @staticmethod
    def _without_repetition(one: _Running, delta: RequestDelta) -> RequestDelta:
        scored = delta.prompt_logprobs
        if scored:
            num_told = min(len(scored), one.num_prompt_logprobs - one.num_rescored)
            one.num_rescored += len(scored)
            one.num_prompt_logprobs += len(scored) - num_told
            scored = scored[num_told:] or None
        return msgspec.structs.replace(
            delta,
            request_id=one.request.request_id,
            prompt_logprobs=scored,
            num_cached_tokens=one.num_cached_tokens or 0,
        )

    def _moved(self, request_ids: list[str], *, is_loss: bool) -> Deltas:
        """Send these to other replicas. Gives the last deltas of those that can go nowhere."""
        ended: Deltas = []
        for request_id in request_ids:
            one = self._running[request_id]
            one.num_losses += is_loss
            self._forget(one, whole=False)
            failure = None if one.aborted else DEADLY if one.num_losses >= MAX_LOSSES else NONE_LEFT
            ticket = self._ticket(one.request, one.said) if failure is NONE_LEFT else None
            if ticket is None:
                reason: FinishReason = "abort" if failure is None else "error"
                ended.append(RequestDelta(request_id=request_id, finish_reason=reason, error=failure))
            else:
                self._go_on(one, ticket)
        if request_ids:
            log.warning("%d answers go on at another replica, %d could not", len(request_ids) - len(ended), len(ended))
        return ended

    def _go_on(self, one: _Running, ticket: Ticket) -> None:
        one.ticket = ticket
        one.num_moves += 1
        one.num_rescored = 0
        self.num_moved += 1
        self._running[one.request.request_id] = one
        self._moved_ids[one.id_there] = one.request.request_id
        self._send(ticket, msgspec.structs.replace(one.request, request_id=one.id_there, said_token_ids=list(one.said)))

    def _ticket(self, request: EngineRequest, said: list[int]) -> Ticket | None:
        token_ids = request.prompt_token_ids + said
        return self.router.choose(
            pages_of(token_ids, request.cache_salt),
            len(token_ids),
            0 if request.pooling is not None else request.max_tokens - len(said),
            is_open=self.is_open,
        )

    def _send(self, ticket: Ticket, request: EngineRequest) -> None:
        self._replicas[ticket.replica].submit(self._taps[ticket.replica], [request])

    def _deliver(self, deltas: Deltas) -> None:
        if deltas:
            self._streams.deliver(deltas)
