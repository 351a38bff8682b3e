"""A worker's engine for front ends on other machines: what ``ipc`` is between two processes, over TCP and for many."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Protocol

from fastqwen.client.engine import Deltas, Inlet, ServedEngine
from fastqwen.cluster.routing import Router, Ticket
from fastqwen.cluster.sockets import Listening
from fastqwen.cluster.wire import (
    NEWS_EVERY_S,
    PEER_LOST_AFTER_S,
    Abort,
    Add,
    AskFiles,
    Card,
    Files,
    Hello,
    Leave,
    News,
    ToWorker,
    to_worker,
)
from fastqwen.records import EngineRequest

log = logging.getLogger("fastqwen.cluster")


class WorkersEngine(ServedEngine, Inlet, Protocol):
    """What a worker has: ProcessEngine."""


@dataclass(eq=False)
class _Peer:
    """A front end, by its connection."""

    who: bytes
    port: EnginePort
    heard_s: float
    number: int = 0  # of the last News
    has_card: bool = False
    requests: dict[str, Ticket] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.who.hex()

    def put(self, deltas: Deltas, num_ended: int) -> None:
        """For the engine: what it says to this front end's requests."""
        for delta in deltas:
            ticket = self.requests.get(delta.request_id)
            if ticket is None:
                continue
            if delta.token_ids:
                self.port.work.progress(ticket, len(delta.token_ids))
            if delta.finish_reason is not None:
                del self.requests[delta.request_id]
                self.port.work.end(ticket, whole=delta.finish_reason in ("stop", "length"))
        self.port.tell(self, deltas)


class EnginePort:
    """``card`` and ``files`` are there once the engine is ready. ``is_draining`` is told to all with the next news."""

    def __init__(self, engine: WorkersEngine, token: str) -> None:
        self.work = Router()  # each front end is a "replica" in it: how much of the work here is whose
        self.is_draining = False
        self.card: Card | None = None
        self.files: Files | None = None
        self._engine = engine
        self._peers: dict[bytes, _Peer] = {}
        self._listening: Listening[ToWorker] = Listening(token, to_worker.decode, self._take, self._strange)
        self._task: asyncio.Task[None] | None = None

    def bind(self, host: str, port: int) -> int:
        return self._listening.bind(host, port, "--port to choose another")

    def start(self) -> None:
        self._listening.start()
        self._task = asyncio.create_task(self._keep_telling(), name="cluster-news")

    async def close(self) -> None:
        for peer in list(self._peers.values()):
            self.tell(peer, [])
        if self._task is not None:
            self._task.cancel()
        await self._listening.close()

    @property
    def num_requests(self) -> int:
        return sum(len(peer.requests) for peer in self._peers.values())

    def tell_all(self) -> None:
        for peer in self._peers.values():
            self.tell(peer, [])

    def tell(self, peer: _Peer, deltas: Deltas) -> None:
        if self.card is not None and not peer.has_card:
            peer.has_card = True
            self._listening.send(peer.who, self.card)
        peer.number += 1
        engine = self._engine
        others = sum(self.work.outstanding(one.key) for one in self._peers.values() if one is not peer)
        self._listening.send(
            peer.who,
            News(
                number=peer.number,
                deltas=deltas,
                state=engine.state,
                is_draining=self.is_draining,
                stats=engine.stats(),
                others_tokens=others,
                num_restarts=engine.num_restarts,
                engine_silent_s=engine.silent_for_s,
            ),
        )

    def _take(self, who: bytes, message: ToWorker) -> None:
        peer = self._peers.get(who)
        if isinstance(message, Hello):
            self._greet(who)
            return
        if peer is None:
            return  # it was given up for lost: its connection begins again with another Hello
        peer.heard_s = time.monotonic()
        if isinstance(message, Add):
            self._add(peer, message.requests)
        elif isinstance(message, Abort):
            self._engine.abort(message.request_ids)
        elif isinstance(message, Leave):
            self._leave(peer, message.request_ids)
        elif isinstance(message, AskFiles) and self.files is not None:
            self._listening.send(who, self.files)

    def _strange(self, who: bytes) -> None:
        """A front end of another version: what it asked will have no answer here, and from our silence it sees that."""
        if who in self._peers:
            self._give_up(self._peers[who])

    def _greet(self, who: bytes) -> None:
        """A card tells which protocol is spoken here, so that the front end can say what does not fit."""
        if who not in self._peers:
            self._peers[who] = peer = _Peer(who, self, time.monotonic())
            self.work.join(peer.key, cache_tokens=1)
            self.tell(peer, [])

    def _add(self, peer: _Peer, requests: list[EngineRequest]) -> None:
        for request in requests:
            num_tokens = len(request.prompt_token_ids) + len(request.said_token_ids)
            left = 0 if request.pooling is not None else request.max_tokens - len(request.said_token_ids)
            ticket = self.work.choose([], num_tokens, left, is_open=lambda key: key == peer.key)
            assert ticket is not None
            peer.requests[request.request_id] = ticket
        self._engine.submit(peer, requests)

    def _leave(self, peer: _Peer, request_ids: list[str]) -> None:
        for request_id in request_ids:
            ticket = peer.requests.pop(request_id, None)
            if ticket is not None:
                self.work.end(ticket, whole=False)
        self._engine.leave(request_ids)

    async def _keep_telling(self) -> None:
        """Signs of life to each front end; one that gives none itself is gone, and so is its work here."""
        while True:
            await asyncio.sleep(NEWS_EVERY_S)
            for peer in list(self._peers.values()):
                if time.monotonic() - peer.heard_s > PEER_LOST_AFTER_S:
                    self._give_up(peer)
                else:
                    self.tell(peer, [])

    def _give_up(self, peer: _Peer) -> None:
        if peer.requests:
            log.warning("a front end is lost: %d of its requests are aborted", len(peer.requests))
        self._leave(peer, list(peer.requests))
        del self._peers[peer.who]
        self.work.leave(peer.key)
