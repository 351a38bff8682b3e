"""An engine in another process: what it says goes to the streams, and when it ends it is started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fastqwen.client.engine import AsyncStream, Reader, Ready, State, Streams
from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineStats
from fastqwen.errors import EngineGone, FastqwenError
from fastqwen.ipc import wire
from fastqwen.ipc.engine_process import ENGINE_COMMAND, EngineProcess
from fastqwen.records import EngineRequest, Failure

log = logging.getLogger("fastqwen.server")

GONE = Failure(
    "gone", "the engine stopped unexpectedly while this request was running; it restarts, please send the request again"
)
FAILED = Failure("gone", "the engine failed while this request was running; the server's log says why")
CLOSED = Failure("closed", "the server is shutting down")
MAX_FAILED_RESTARTS, RESTARTS_WITHIN_S, RESTART_PAUSE_S = 3, 60.0, 1.0


class ProcessEngine:
    """``on_loading(done, total)`` and ``on_ready()`` are told about every start, a restart's too."""

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        *,
        on_loading: Callable[[int, int], None] = lambda done, total: None,
        on_ready: Callable[[Ready], None] = lambda ready: None,
        command: Sequence[str] = ENGINE_COMMAND,
        log_format: str = "text",
    ) -> None:
        self.state: State = "loading"
        self.failure = ""
        self.loading = (0, 0)
        self.ready: Ready | None = None
        self.num_restarts = 0
        self._start = wire.Start(config, str(path))
        self._command, self._log_format = command, log_format
        self._on_loading, self._on_ready = on_loading, on_ready
        self._streams = Streams()
        self._stats = EngineStats()
        self._process: EngineProcess | None = None
        self._dismissed: EngineProcess | None = None  # to sleep: that it ends is no failure
        self._heard_s = time.monotonic()
        self._changed = asyncio.Event()
        self._awake = asyncio.Event()  # not set: it shall sleep
        self._awake.set()
        self._depth = 0
        self._gave_back = asyncio.Event()  # the process, or it is gone
        self._keeper: asyncio.Task[None] | None = None

    def stats(self) -> EngineStats:
        return self._stats

    @property
    def depth(self) -> int | None:
        return self._depth if self.state == "asleep" else None

    @property
    def silent_for_s(self) -> float:
        """Since when the engine has said nothing. Even an idle one speaks every half second."""
        return time.monotonic() - self._heard_s

    def stream(self, requests: list[EngineRequest]) -> AsyncStream:
        if self.state != "ready":
            raise EngineGone(f"the engine is {self.state}")
        return AsyncStream(self, requests)

    def submit(self, stream: Reader, requests: list[EngineRequest]) -> None:
        self._streams.open(stream, requests)
        self._tell(wire.Add(requests))
        if self.state != "ready":  # it has ended since the stream began
            self._streams.end(GONE)

    def abort(self, request_ids: Iterable[str]) -> None:
        self._tell(wire.Abort(list(request_ids)))

    def leave(self, request_ids: list[str]) -> None:
        left = self._streams.leave(request_ids)
        if left:
            self.abort(left)

    def _tell(self, message: wire.ToEngine) -> None:
        if self._process is not None and self.state == "ready":
            self._process.send(message)

    # ---- the engine's life ----

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name="engine-keeper")

    async def wait_ready(self) -> Ready:
        """Raises FastqwenError if the engine cannot start."""
        while self.state not in ("ready", "failed", "stopped"):
            self._changed.clear()
            await self._changed.wait()
        if self.state != "ready" or self.ready is None:
            raise FastqwenError(self.failure or "the engine was stopped")
        return self.ready

    async def stop(self) -> None:
        self._set_state("stopped")
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._streams.end(CLOSED)
        if self._process is not None:
            await self._process.end()

    async def sleep(self, level: int = 2) -> None:
        """At level 2 the process ends, and no other starts before ``wake_up``; so it does at level 1 where several processes
        compute."""
        if self.state not in ("ready", "asleep") or self._process is None:
            raise EngineGone(f"the engine is {self.state}")
        if level == 1 and self._start.config.tensor_parallel_size > 1:
            level = 2
        if self.state == "asleep" and level <= self._depth:
            return
        self._depth = level
        self.abort(self._streams.request_ids)
        self._awake.clear()
        self._set_state("asleep")
        self._streams.end(CLOSED)
        if level == 0:
            return
        self._stats = EngineStats()
        if level == 1:
            self._gave_back.clear()
            self._process.send(wire.Sleep())
            await self._gave_back.wait()
        else:
            self._dismissed = self._process
            await self._process.end()

    async def wake_up(self) -> None:
        if self.state == "asleep":
            assert self._process is not None
            self._set_state("ready" if self._depth == 0 else "restarting")
            self._awake.set()
            if self._depth == 1:  # else, and where it has ended meanwhile, another process starts
                self._process.send(wire.Wake())
        await self.wait_ready()

    async def _keep(self) -> None:
        """Whatever goes wrong here ends the engine with one line, and with it whoever waits for it."""
        try:
            await self._keep_running()
        except Exception as error:
            log.exception("watching over the engine failed")
            self._streams.end(GONE)
            self._fail(f"the engine cannot be run: {' '.join(str(error).split()) or type(error).__name__}")

    async def _keep_running(self) -> None:
        """Start the engine again whenever it ends, unless the user must change something. One that dies while it starts
        again, as where memory is short for a moment, is tried again after a pause, but not for ever."""
        deaths_s: list[float] = []  # of restarts
        while True:
            self._process = EngineProcess(self._command, self._log_format)
            await self._process.run(self._start, self._take)
            self._gave_back.set()
            before = self.state
            if before == "failed":
                return
            if self._process is self._dismissed or not self._awake.is_set():
                await self._awake.wait()
                continue
            if before == "ready":  # before the streams hear of it: whoever sends a request again must not send it here
                self._set_state("restarting")
            self._streams.end(GONE)
            how = self._process.how_it_ended()
            if before == "loading":
                self._fail(f"{how} before it was ready")
                return
            if before == "restarting":
                deaths_s = [*(one for one in deaths_s if time.monotonic() - one < RESTARTS_WITHIN_S), time.monotonic()]
                if len(deaths_s) >= MAX_FAILED_RESTARTS:
                    self._fail(f"{how} {len(deaths_s)} times while it was started again")
                    return
                await asyncio.sleep(RESTART_PAUSE_S * len(deaths_s))
            log.error("%s; starting it again", how)
            self.num_restarts += 1
            self._set_state("restarting")

    def _take(self, message: wire.FromEngine) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, wire.Deltas):
            self._stats = message.stats
            self._streams.deliver(message.deltas)
        elif isinstance(message, wire.Loading):
            self.loading = (message.done, message.total)
            self._on_loading(message.done, message.total)
        elif isinstance(message, wire.Asleep):
            self._gave_back.set()
        elif isinstance(message, Ready):
            self.ready = message
            self._on_ready(message)
            self._set_state("ready")
        else:
            self._fail(message.message)

    def _fail(self, why: str) -> None:
        self.failure = why
        self._set_state("failed")
        self._streams.end(FAILED)

    def _set_state(self, state: State) -> None:
        if self.state != "stopped":
            self.state = state
        self._changed.set()
