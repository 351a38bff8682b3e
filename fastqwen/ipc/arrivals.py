"""Requests on their way into the engine. Those with a grammar wait aside while it compiles, so that no stream stalls."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastqwen.records import EngineRequest

if TYPE_CHECKING:
    from fastqwen.runner.structured import GrammarCompiler

COMPILING_WAIT_MS = 2


class Arrivals:
    def __init__(self, compiler: GrammarCompiler | None) -> None:
        self._compiler = compiler
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._ready: list[EngineRequest] = []
        self._compiling: dict[str, tuple[EngineRequest, Future[Any]]] = {}

    def put(self, request: EngineRequest) -> None:
        if request.grammar is None or self._compiler is None:
            self._ready.append(request)
        else:
            future = self._threads.submit(self._compiler.compile, request.grammar.text)
            self._compiling[request.request_id] = (request, future)

    def drop(self, request_id: str) -> None:
        self._compiling.pop(request_id, None)

    def patience_ms(self, idle_ms: int) -> int:
        return COMPILING_WAIT_MS if self._compiling else idle_ms

    def ready(self) -> Iterator[EngineRequest]:
        """Requests that the engine can take now. A failed compilation shows when the engine compiles it again."""
        done, self._ready = self._ready, []
        yield from done
        for request_id in [name for name, (_, future) in self._compiling.items() if future.done()]:
            yield self._compiling.pop(request_id)[0]
