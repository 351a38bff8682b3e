"""Requests on their way into the engine. Those with a grammar wait aside while it compiles, so that no stream stalls."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastqwen.records import EngineRequest, Failure, RequestDelta

if TYPE_CHECKING:
    from fastqwen.runner.start import Compiler

COMPILING_WAIT_MS = 2
NO_GRAMMARS = Failure("grammar", "this engine cannot constrain answers: it has no tokenizer")


class Arrivals:
    def __init__(self, compiler: Compiler | None) -> None:
        self._compiler = compiler
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._ready: list[EngineRequest] = []
        self._refused: list[RequestDelta] = []
        self._compiling: dict[str, tuple[EngineRequest, Future[Any]]] = {}

    def put(self, request: EngineRequest) -> None:
        if request.grammar is None:
            self._ready.append(request)
        elif self._compiler is None:  # an answer without its constraint would be worse than none
            self._refused.append(RequestDelta(request_id=request.request_id, finish_reason="error", error=NO_GRAMMARS))
        else:
            future = self._threads.submit(self._compiler.compile, request.grammar.text)
            self._compiling[request.request_id] = (request, future)

    def drop(self, request_id: str) -> None:
        """Its client left before the engine knew of it: it may have come in the same handful of messages."""
        self._compiling.pop(request_id, None)
        self._ready = [one for one in self._ready if one.request_id != request_id]

    def patience_ms(self, idle_ms: int) -> int:
        return COMPILING_WAIT_MS if self._compiling else idle_ms

    def refused(self) -> list[RequestDelta]:
        found, self._refused = self._refused, []
        return found

    def ready(self) -> Iterator[EngineRequest]:
        """Requests that the engine can take now. A failed compilation shows when the engine compiles it again."""
        done, self._ready = self._ready, []
        yield from done
        for request_id in [name for name, (_, future) in self._compiling.items() if future.done()]:
            yield self._compiling.pop(request_id)[0]
