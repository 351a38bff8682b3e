"""What an engine is to all who use one, wherever it computes: ``EngineClient``, and the streams that it gives.

    LocalEngine     client/local_engine.py    in the thread that reads: LLM, benchmarks
    EngineThread    client/engine_thread.py   in a thread of its own, for several callers: ChatModel, ``fastqwen chat``
    ProcessEngine   ipc/process_engine.py     in another process, which is started again if it ends: the server

Nothing here assumes one process or one host: only the records of records.py and ``Ready`` go between the two sides.

There is one protocol and two ways to read a stream, since what differs is how one waits. A script has a thread to wait in,
and with LocalEngine it must compute meanwhile: ``for``. A server's event loop must never wait: ``async for``. Were all of
it asynchronous, LLM would need an event loop; were all of it not, each of a server's requests would need a thread. The rest
is the same for both and stands here once.

Deltas come in lists, all that a step gave: with 256 sequences a hand-over for each token would cost more than the rest.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal, Protocol, Self, TypeVar, runtime_checkable

import msgspec

from fastqwen.client.prepare import ModelFacts
from fastqwen.engine.core import EngineStats
from fastqwen.errors import BadRequest, FastqwenError, GenerationFailed
from fastqwen.model_config import ModelConfig
from fastqwen.plan import EnginePlan, Line
from fastqwen.records import EngineRequest, Failure, RequestDelta, TokenLogprobs

State = Literal["loading", "ready", "restarting", "failed", "stopped", "asleep"]
Deltas = list[RequestDelta]

MAX_WAITING_STEPS = 256


class Ready(msgspec.Struct, frozen=True, tag=True):
    """What an engine says of itself once it can compute."""

    plan: EnginePlan
    model: ModelConfig
    comparison: list[Line] = []  # planned on paper against measured

    def facts(self, stop_token_ids: list[int], *, takes_priorities: bool = True) -> ModelFacts:
        """``stop_token_ids`` are the text side's knowledge."""
        return ModelFacts(self.model, self.plan.max_model_len, stop_token_ids, takes_priorities)


S_co = TypeVar("S_co", bound="Stream", covariant=True)


class EngineClient(Protocol[S_co]):
    """An engine, read by ``for`` (EngineClient[BlockingStream]) or ``async for`` (EngineClient[AsyncStream])."""

    @property
    def state(self) -> State: ...

    @property
    def ready(self) -> Ready | None:
        """None before the engine was ready for the first time."""

    def stats(self) -> EngineStats: ...

    def stream(self, requests: list[EngineRequest]) -> S_co:
        """Begin these requests; those with ``pooling`` end with an embedding. Raises EngineGone if the engine is not ready."""


class ServedEngine(EngineClient["AsyncStream"], Protocol):
    """What a server also tells of its engine: it may still load, fail, fall silent or come back."""

    @property
    def failure(self) -> str: ...

    @property
    def loading(self) -> tuple[int, int]:
        """Layers loaded, and of how many."""

    @property
    def num_restarts(self) -> int: ...

    @property
    def silent_for_s(self) -> float:
        """Since when the engine has said nothing."""


@runtime_checkable
class Sleeper(Protocol):
    """An engine of this host that can give its memory back for a while."""

    @property
    def depth(self) -> int | None:
        """The level at which it sleeps; None: it is awake."""

    async def sleep(self, level: int = 2) -> None:
        """Take no requests until ``wake_up``, and give memory back: at ``level`` 0 nothing, at 1 all but the weights, which wait in
        host memory, at 2 all. Deeper than it sleeps already, or not at all. Raises EngineGone where it is not ready."""

    async def wake_up(self) -> None:
        """Load again, and return once it is ready. Raises FastqwenError if it cannot start."""


class Reader(Protocol):
    """Who gets the deltas of requests."""

    def put(self, deltas: Deltas, num_ended: int) -> None:
        """News, with the last delta of ``num_ended`` requests."""


class Inlet(Protocol):
    """How a stream speaks to its engine. None of these waits."""

    def submit(self, stream: Reader, requests: list[EngineRequest]) -> None: ...

    def abort(self, request_ids: Iterable[str]) -> None: ...

    def leave(self, request_ids: list[str]) -> None:
        """Nobody reads these any more: those that still run are aborted."""


class Stream:
    """The deltas of some requests, until each has had its last. For one reader, who closes it or uses ``with``.

    Closing it early aborts what still runs.
    """

    def __init__(self, engine: Inlet, requests: list[EngineRequest]) -> None:
        self._engine = engine
        self._inbox: deque[tuple[Deltas, int]] = deque()  # safe for a thread that puts and one that takes
        self._request_ids: list[str] = []
        self._num_running = 0
        try:
            self.add(requests)
        except BaseException:  # Ctrl-C: half of them may be in the engine
            self.close()
            raise

    def add(self, requests: list[EngineRequest]) -> None:
        """More requests for this stream, such as one that goes on in the place of an aborted one."""
        self._request_ids += [request.request_id for request in requests]
        self._num_running += len(requests)
        self._engine.submit(self, requests)

    def abort(self, request_ids: list[str]) -> None:
        """Their last deltas still come, unless they have just ended."""
        self._engine.abort(request_ids)

    def close(self) -> None:
        left, self._request_ids, self._num_running = self._request_ids, [], 0
        if left:
            self._engine.leave(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def put(self, deltas: Deltas, num_ended: int) -> None:
        """For the engine: news, with the last delta of ``num_ended`` requests."""
        self._inbox.append((deltas, num_ended))

    def _take(self) -> tuple[Deltas, int]:
        """What waits is read together."""
        deltas, num_ended = self._inbox.popleft()
        while self._inbox:
            more, ended = self._inbox.popleft()
            deltas, num_ended = deltas + more, num_ended + ended
        return deltas, num_ended

    def _next(self) -> Deltas:
        deltas, num_ended = self._take()
        self._num_running -= num_ended
        return deltas


class BlockingStream(Stream):
    """``wait`` returns when there may be news."""

    def __init__(self, engine: Inlet, requests: list[EngineRequest], wait: Callable[[], None]) -> None:
        self._wait = wait
        super().__init__(engine, requests)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Deltas:
        if not self._num_running:
            self.close()
            raise StopIteration
        while not self._inbox:
            self._wait()
        return self._next()


class AsyncStream(Stream):
    """Read and filled in one event loop. A reader who is slow costs only its tokens."""

    _wake: asyncio.Future[None] | None = None

    def put(self, deltas: Deltas, num_ended: int) -> None:
        super().put(deltas, num_ended)
        if len(self._inbox) > MAX_WAITING_STEPS:
            waiting, num_ended = self._take()
            super().put(merged(waiting), num_ended)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Deltas:
        if not self._num_running:
            self.close()
            raise StopAsyncIteration
        while not self._inbox:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        return self._next()


class Streams:
    """The engine's side: who waits for which request."""

    def __init__(self) -> None:
        self._of: dict[str, Reader] = {}

    def __len__(self) -> int:
        """Requests that still run."""
        return len(self._of)

    @property
    def request_ids(self) -> list[str]:
        return list(self._of)

    def open(self, stream: Reader, requests: list[EngineRequest]) -> None:
        for request in requests:
            self._of[request.request_id] = stream

    def leave(self, request_ids: list[str]) -> list[str]:
        """Forget these. Gives those that still ran."""
        return [name for name in request_ids if self._of.pop(name, None) is not None]

    def deliver(self, deltas: Deltas) -> None:
        found: dict[Reader, Deltas] = {}
        ended: dict[Reader, int] = {}
        last, own = None, deltas
        for delta in deltas:
            stream = self._of.get(delta.request_id)
            if stream is None:
                continue  # its reader has left
            if stream is not last:
                last, own = stream, found.setdefault(stream, [])
            own.append(delta)
            if delta.finish_reason is not None:
                del self._of[delta.request_id]
                ended[stream] = ended.get(stream, 0) + 1
        for stream, own in found.items():
            stream.put(own, ended.get(stream, 0))

    def end(self, failure: Failure) -> None:
        """Every request that still runs ends, and says why."""
        reason: Literal["abort", "error"] = "abort" if failure.kind == "closed" else "error"
        self.deliver([RequestDelta(request_id=name, finish_reason=reason, error=failure) for name in self._of])


def error_of(failure: Failure | None) -> FastqwenError:
    """What to raise for a request that ended without its answer: BadRequest where sending it again cannot help."""
    if failure is None:
        return GenerationFailed("the request was aborted")
    if failure.kind == "grammar":
        return BadRequest(failure.message, "structured_outputs")
    return GenerationFailed(failure.message)


def merged(deltas: Deltas) -> Deltas:
    """The same news in one delta per sequence."""
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
        waited_s=max(first.waited_s, second.waited_s),
    )


def _both(first: list[TokenLogprobs] | None, second: list[TokenLogprobs] | None) -> list[TokenLogprobs] | None:
    return None if first is None and second is None else (first or []) + (second or [])
