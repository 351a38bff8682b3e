"""The engine of the server's tests: ServedEngine in this process, stepped by the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from fastqwen.client.engine import AsyncStream, Reader, Ready, State, Streams
from fastqwen.engine.core import EngineCore, EngineStats
from fastqwen.errors import EngineGone
from fastqwen.records import EngineRequest, Failure


class FakeEngine:
    """It computes while ``run`` runs, and remembers what was asked of it."""

    depth: int | None = None  # at which it sleeps
    failure, loading, num_restarts, silent_for_s, is_draining = "", (1, 1), 0, 0.0, False

    def __init__(self, core: EngineCore, ready: Ready) -> None:
        self.core, self.ready = core, ready
        self.state: State = "ready"
        self.streams = Streams()
        self.step_delay_s = 0.0
        self.requests: list[EngineRequest] = []
        self.aborted: list[str] = []

    def stats(self) -> EngineStats:
        return self.core.stats()

    def stream(self, requests: list[EngineRequest]) -> AsyncStream:
        if self.state != "ready":
            raise EngineGone(f"the engine is {self.state}")
        return AsyncStream(self, requests)

    def submit(self, stream: Reader, requests: list[EngineRequest]) -> None:
        self.streams.open(stream, requests)
        self.requests += requests
        for request in requests:
            self.core.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.aborted.append(request_id)
            self.core.abort(request_id)

    def leave(self, request_ids: list[str]) -> None:
        self.abort(self.streams.leave(request_ids))

    async def run(self) -> None:
        while True:
            self.streams.deliver(self.core.step())
            await asyncio.sleep(self.step_delay_s if self.core.has_work else 0.001)

    async def sleep(self, level: int = 2) -> None:
        self.state = "asleep"

    async def wake_up(self) -> None:
        self.state = "ready"

    def die(self) -> None:
        """What ProcessEngine does when the process is gone."""
        self.state = "restarting"
        self.streams.end(Failure("gone", "the engine stopped"))
