"""An engine that steps in a thread of its own, for many callers at once."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import torch

from fastqwen.engine.core import EngineCore
from fastqwen.errors import EngineGone
from fastqwen.records import EngineRequest, RequestDelta

log = logging.getLogger(__name__)

STOP_WITHIN_S = 10.0


@dataclass(frozen=True)
class _Add:
    requests: list[EngineRequest]
    reader: queue.SimpleQueue[RequestDelta]


@dataclass(frozen=True)
class _Abort:
    request_ids: set[str]


class _Stop:
    """Ends the thread."""


_Commands = queue.SimpleQueue[_Add | _Abort | _Stop]


class EngineThread:
    """Nobody else may step ``core``. The thread ends with ``close``, with this object, or with the program."""

    def __init__(self, core: EngineCore, *, num_threads: int | None = None) -> None:
        self._commands: _Commands = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        thread = threading.Thread(
            target=_run, args=(core, self._commands, num_threads), name="fastqwen-engine", daemon=True
        )
        thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._commands, thread)

    def stream(self, requests: list[EngineRequest]) -> Generator[RequestDelta, None, None]:
        """Deltas of these requests until each has had its last. Closing the iterator early aborts the rest.

        Raises EngineGone after ``close``.
        """
        reader: queue.SimpleQueue[RequestDelta] = queue.SimpleQueue()
        running = {request.request_id for request in requests}
        with self._lock:
            if self._closed:
                raise EngineGone("the model was closed")
            self._commands.put(_Add(requests, reader))
        try:
            while running:
                delta = reader.get()
                if delta.finish_reason is not None:
                    running.discard(delta.request_id)
                yield delta
        finally:
            if running:
                self._commands.put(_Abort(running))

    def close(self) -> None:
        """What is running is aborted. Closing twice does nothing."""
        with self._lock:
            self._closed = True
        self._finalizer()


def _stop(commands: _Commands, thread: threading.Thread) -> None:
    commands.put(_Stop())
    thread.join(STOP_WITHIN_S)


def _run(core: EngineCore, commands: _Commands, num_threads: int | None) -> None:
    if num_threads is not None:
        torch.set_num_threads(num_threads)  # a setting of the thread, for OpenMP
    readers: dict[str, queue.SimpleQueue[RequestDelta]] = {}
    try:
        while _take(core, commands, readers):
            for delta in core.step():
                _deliver(readers, delta)
            if not core.has_work:
                core.step()  # idle: audits that no block was left behind
        _end(readers, "abort", "the model was closed")
    except BaseException:
        log.exception("the engine failed")
        _end(readers, "error", FAILED)
        _refuse(commands)


FAILED = "the engine failed, its log says why; load the model again"


def _take(core: EngineCore, commands: _Commands, readers: dict[str, queue.SimpleQueue[RequestDelta]]) -> bool:
    """Carry out what waits, and wait while there is nothing to compute. False: stop."""
    while not core.has_work or not commands.empty():
        command = commands.get()
        if isinstance(command, _Stop):
            return False
        if isinstance(command, _Abort):
            for request_id in command.request_ids:
                readers.pop(request_id, None)
                core.abort(request_id)
            continue
        for request in command.requests:
            readers[request.request_id] = command.reader
            core.add(request)
    return True


def _deliver(readers: dict[str, queue.SimpleQueue[RequestDelta]], delta: RequestDelta) -> None:
    reader = readers.get(delta.request_id)
    if reader is None:
        return  # its reader has left
    reader.put(delta)
    if delta.finish_reason is not None:
        del readers[delta.request_id]


def _end(readers: dict[str, queue.SimpleQueue[RequestDelta]], reason: Literal["abort", "error"], error: str) -> None:
    for request_id, reader in readers.items():
        reader.put(RequestDelta(request_id=request_id, finish_reason=reason, error=error))
    readers.clear()


def _refuse(commands: _Commands) -> None:
    """Answer what still comes after a failure, until somebody closes."""
    while not isinstance(command := commands.get(), _Stop):
        if isinstance(command, _Add):
            _end({request.request_id: command.reader for request in command.requests}, "error", FAILED)
