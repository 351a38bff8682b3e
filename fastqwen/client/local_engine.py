"""An engine in the thread that reads: whoever waits for a stream computes, nothing is handed over."""

from __future__ import annotations

from collections.abc import Iterable

from fastqwen.client.engine import BlockingStream, Reader, Ready, State, Streams
from fastqwen.engine.core import EngineCore, EngineStats
from fastqwen.records import EngineRequest, Failure


class LocalEngine:
    """Nobody else may step ``core``. What one reader computes for others waits for them.

    An exception from ``core`` is raised to the reader. When the last stream is closed the engine is empty and audited.
    """

    def __init__(self, core: EngineCore, ready: Ready) -> None:
        self.core = core
        self.ready = ready
        self.state: State = "ready"
        self._streams = Streams()
        self._over: Failure | None = None

    def stats(self) -> EngineStats:
        return self.core.stats()

    def stream(self, requests: list[EngineRequest]) -> BlockingStream:
        return BlockingStream(self, requests, self.step)

    def step(self) -> None:
        assert self.core.has_work, "a stream waits for a request that the engine has lost"
        self._streams.deliver(self.core.step())

    @property
    def has_work(self) -> bool:
        return self._over is None and self.core.has_work

    def submit(self, stream: Reader, requests: list[EngineRequest]) -> None:
        self._streams.open(stream, requests)
        if self._over is not None:
            self._streams.end(self._over)
            return
        for request in requests:
            self.core.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.core.abort(request_id)

    def leave(self, request_ids: list[str]) -> None:
        self.abort(self._streams.leave(request_ids))
        if not self._streams and self._over is None:
            while self.core.has_work:
                self.core.step()
            self.core.step()  # idle: audits that no block was left behind

    def end(self, failure: Failure) -> None:
        """All requests end with this, those that are still to come as well; ``core`` is left as it is."""
        self.state = "stopped" if failure.kind == "closed" else "failed"
        self._over = failure
        self._streams.end(failure)
