"""An engine that steps in a thread of its own, for many callers at once."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch

from fastqwen.client.engine import BlockingStream, Deltas, Reader, Ready, State
from fastqwen.client.local_engine import LocalEngine
from fastqwen.engine.core import EngineCore, EngineStats
from fastqwen.errors import EngineGone
from fastqwen.records import EngineRequest, Failure

log = logging.getLogger(__name__)

STOP_WITHIN_S = 10.0
CLOSED = Failure("closed", "the model was closed")
FAILED = Failure("gone", "the engine failed, its log says why; load the model again")

_Commands = queue.SimpleQueue[Callable[[], None] | None]  # None: stop


class EngineThread:
    """Nobody else may step ``core``. The thread ends with ``close``, with this object, or with the program."""

    def __init__(self, core: EngineCore, ready: Ready, *, num_threads: int | None = None) -> None:
        self.ready = ready
        self._engine = LocalEngine(core, ready)
        self._commands: _Commands = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        thread = threading.Thread(
            target=_run, args=(self._engine, self._commands, num_threads), name="fastqwen-engine", daemon=True
        )
        thread.start()
        self._finalizer = weakref.finalize(self, _stop, self._commands, thread)

    @property
    def state(self) -> State:
        return self._engine.state

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def stream(self, requests: list[EngineRequest]) -> BlockingStream:
        return _ThreadStream(self, requests)

    def submit(self, stream: Reader, requests: list[EngineRequest]) -> None:
        with self._lock:
            if self._closed:
                raise EngineGone(CLOSED.message)
            self._commands.put(partial(self._engine.submit, stream, requests))

    def abort(self, request_ids: Iterable[str]) -> None:
        self._commands.put(partial(self._engine.abort, request_ids))

    def leave(self, request_ids: list[str]) -> None:
        self._commands.put(partial(self._engine.leave, request_ids))

    def close(self) -> None:
        """What is running is aborted. Closing twice does nothing."""
        with self._lock:
            self._closed = True
        self._finalizer()


class _ThreadStream(BlockingStream):
    def __init__(self, engine: EngineThread, requests: list[EngineRequest]) -> None:
        self._news = threading.Event()
        super().__init__(engine, requests, self._wait_for_news)

    def put(self, deltas: Deltas, num_ended: int) -> None:
        super().put(deltas, num_ended)
        self._news.set()

    def _wait_for_news(self) -> None:
        self._news.wait()
        self._news.clear()


def _stop(commands: _Commands, thread: threading.Thread) -> None:
    commands.put(None)
    thread.join(STOP_WITHIN_S)


def _run(engine: LocalEngine, commands: _Commands, num_threads: int | None) -> None:
    if num_threads is not None:
        torch.set_num_threads(num_threads)  # a setting of the thread, for OpenMP
    while True:
        try:
            if not _obey(engine, commands):
                break
            engine.step()
        except BaseException:
            log.exception("the engine failed")
            engine.end(FAILED)
    engine.end(CLOSED)


def _obey(engine: LocalEngine, commands: _Commands) -> bool:
    """Carry out what waits, and wait while there is nothing to compute. False: stop."""
    while not engine.has_work or not commands.empty():
        command = commands.get()
        if command is None:
            return False
        command()
    return True
