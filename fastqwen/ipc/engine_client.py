"""The API process's side of the engine: starts it, feeds it, hands deltas to the requests that wait, restarts it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineStats
from fastqwen.errors import EngineGone, FastqwenError
from fastqwen.ipc import wire
from fastqwen.records import EngineRequest, RequestDelta, TokenLogprobs

log = logging.getLogger("fastqwen.server")

State = Literal["loading", "ready", "restarting", "failed", "stopped"]
GONE = "the engine stopped unexpectedly while this request was running; it restarts, please send the request again"
ENGINE_COMMAND = (
    sys.executable,
    "-P",
    "-m",
    "fastqwen.ipc.engine_main",
)  # -P: nothing in the working folder is imported
KILL_AFTER_S = 5.0
MAX_WAITING_DELTAS = 256


def merged(deltas: list[RequestDelta]) -> list[RequestDelta]:
    """The same news in one delta per sequence, so that a reader who is slow costs only its tokens."""
    found: dict[str, RequestDelta] = {}
    for delta in deltas:
        before = found.get(delta.request_id)
        found[delta.request_id] = delta if before is None else _joined(before, delta)
    return list(found.values())


def _joined(first: RequestDelta, second: RequestDelta) -> RequestDelta:
    return msgspec.structs.replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=_both(first.logprobs, second.logprobs),
        prompt_logprobs=_both(first.prompt_logprobs, second.prompt_logprobs),
        num_cached_tokens=max(first.num_cached_tokens, second.num_cached_tokens),
    )


def _both(first: list[TokenLogprobs] | None, second: list[TokenLogprobs] | None) -> list[TokenLogprobs] | None:
    return None if first is None and second is None else (first or []) + (second or [])


class DeltaQueue:
    """The deltas of one request, for one reader. Deltas that wait together are read together."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self._waiting: list[RequestDelta] = []
        self._wake: asyncio.Future[None] | None = None

    def put(self, delta: RequestDelta) -> None:
        self._waiting.append(delta)
        if len(self._waiting) > MAX_WAITING_DELTAS:
            self._waiting = merged(self._waiting)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def get_all(self) -> list[RequestDelta]:
        if not self._waiting:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        found, self._waiting = self._waiting, []
        return found


class EngineClient:
    """``on_loading(done, total)`` and ``on_ready()`` are told about every start, a restart's too."""

    def __init__(
        self,
        config: EngineConfig,
        path: Path,
        *,
        on_loading: Callable[[int, int], None] = lambda done, total: None,
        on_ready: Callable[[wire.Ready], None] = lambda ready: None,
        command: Sequence[str] = ENGINE_COMMAND,
        log_format: str = "text",
    ) -> None:
        self.state: State = "loading"
        self.failure = ""
        self.stats = EngineStats()
        self.loading = (0, 0)
        self.ready: wire.Ready | None = None
        self.num_restarts = 0
        self._config, self._path, self._command, self._log_format = config, path, command, log_format
        self._on_loading, self._on_ready = on_loading, on_ready
        self._queues: dict[str, DeltaQueue] = {}
        self._directory = tempfile.TemporaryDirectory(prefix="fastqwen-")  # made with mode 0700
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._heard_s = time.monotonic()
        self._changed = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    # ---- for the server ----

    @property
    def silent_for_s(self) -> float:
        """Since when the engine has said nothing. Even an idle one speaks every half second."""
        return time.monotonic() - self._heard_s

    @property
    def num_open(self) -> int:
        return len(self._queues)

    def start(self) -> None:
        self._keeper = asyncio.create_task(self._keep(), name="engine-keeper")

    async def wait_ready(self) -> wire.Ready:
        """Raises FastqwenError if the engine cannot start."""
        while self.state not in ("ready", "failed", "stopped"):
            self._changed.clear()
            await self._changed.wait()
        if self.state != "ready" or self.ready is None:
            raise FastqwenError(self.failure or "the engine was stopped")
        return self.ready

    async def stream(self, requests: list[EngineRequest]) -> AsyncIterator[list[RequestDelta]]:
        """Deltas of all these requests as they come, until each has had its last. Leaving early aborts the rest.

        Raises EngineGone if the engine is not ready.
        """
        if self.state != "ready" or self._socket is None:
            raise EngineGone(f"the engine is {self.state}")
        queue = DeltaQueue()
        for request in requests:
            queue.running.add(request.request_id)
            self._queues[request.request_id] = queue
        try:
            await self._socket.send(wire.encode(wire.Add(requests)))
            while queue.running:
                deltas = await queue.get_all()
                for delta in deltas:
                    if delta.finish_reason is not None:
                        queue.running.discard(delta.request_id)
                        self._queues.pop(delta.request_id, None)
                yield deltas
        finally:
            for request_id in queue.running:
                self._queues.pop(request_id, None)
            if queue.running:
                self.abort(list(queue.running))

    def continue_as(self, request_id: str, request: EngineRequest) -> None:
        """Put another sequence into the place of a running one, in the same stream. The first one must be aborted."""
        queue = self._queues[request_id]
        queue.running.add(request.request_id)
        self._queues[request.request_id] = queue
        if self._socket is not None and self.state == "ready":
            self._socket.send(wire.encode(wire.Add([request])))
        else:
            queue.put(RequestDelta(request_id=request.request_id, finish_reason="error", error=GONE))

    def abort(self, request_ids: list[str]) -> None:
        """Does not wait, so that it can be called while a task is being cancelled."""
        if self._socket is not None and self.state == "ready":
            with contextlib.suppress(zmq.ZMQError):
                self._socket.send(wire.encode(wire.Abort(request_ids)))

    async def stop(self) -> None:
        self._set_state("stopped")
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._end_streams("the server is shutting down", "abort")
        await self._end_process()
        self._context.destroy(linger=0)
        self._directory.cleanup()

    # ---- the engine's life ----

    async def _keep(self) -> None:
        """Start the engine, listen until it ends, and start it again unless the user must change something."""
        while True:
            address = f"ipc://{self._directory.name}/engine-{self.num_restarts}"
            self._socket = self._context.socket(zmq.PAIR)
            self._socket.set_hwm(0)
            self._socket.bind(address)
            # -P: a user's own random.py in the working directory must not become the engine's.
            self._process = await asyncio.create_subprocess_exec(
                *self._command, address, self._log_format, stdin=asyncio.subprocess.DEVNULL
            )
            listening = asyncio.create_task(self._listen(self._socket))
            was_ready = await self._wait_for_end(listening)
            self._socket.close(linger=0)
            self._socket = None
            if self.state == "failed":
                return
            self._end_streams(GONE, "error")
            if not was_ready:
                status = self._process.returncode
                hint = " (killed, often for want of memory)" if status == -signal.SIGKILL else ""
                self.failure = f"the engine process ended with status {status}{hint} before it was ready"
                self._set_state("failed")
                return
            log.error("the engine process ended with status %s; starting it again", self._process.returncode)
            self.num_restarts += 1
            self._set_state("restarting")

    async def _wait_for_end(self, listening: asyncio.Task[None]) -> bool:
        """Whether the engine had been ready when its process ended."""
        assert self._process is not None
        try:
            await self._process.wait()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._drained(listening)), 0.2)  # its last words
        finally:
            listening.cancel()
        return self.state == "ready"

    async def _drained(self, listening: asyncio.Task[None]) -> None:
        while self.state not in ("failed",) and not listening.done():
            await asyncio.sleep(0.02)

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        await socket.send(wire.encode(wire.Start(self._config, str(self._path))))  # waits until the engine connects
        while True:
            message = wire.from_engine.decode(await socket.recv())
            self._heard_s = time.monotonic()
            if isinstance(message, wire.Deltas):
                self.stats = message.stats
                for delta in message.deltas:
                    queue = self._queues.get(delta.request_id)
                    if queue is not None:
                        queue.put(delta)
            elif isinstance(message, wire.Loading):
                self.loading = (message.done, message.total)
                self._on_loading(message.done, message.total)
            elif isinstance(message, wire.Ready):
                self.ready = message
                self._on_ready(message)
                self._set_state("ready")
            else:
                self.failure = message.message
                self._set_state("failed")

    def _end_streams(self, error: str, reason: Literal["error", "abort"]) -> None:
        for request_id, queue in self._queues.items():
            queue.put(RequestDelta(request_id=request_id, finish_reason=reason, error=error))

    async def _end_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), KILL_AFTER_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def _set_state(self, state: State) -> None:
        if self.state != "stopped":
            self.state = state
        self._changed.set()
