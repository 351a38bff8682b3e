"""Models of other servers, as a front end has them: requests are passed on, and tried at another one until a word has come."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastqwen.client.engine import State
from fastqwen.cluster.routing import Router
from fastqwen.cluster.sockets import Calling
from fastqwen.cluster.wire import (
    BEAT_EVERY_S,
    LOST_AFTER_S,
    Alive,
    Drop,
    Fetch,
    FromUpstream,
    Hello,
    Part,
    Ping,
    from_upstream,
)
from fastqwen.errors import EngineGone, Overloaded, UpstreamGone
from fastqwen.server.http.errors import describe, error_response
from fastqwen.server.http.sse import EventStream
from fastqwen.server.web.upstream import HOPS

log = logging.getLogger("fastqwen.cluster")

MAX_HOPS = 4  # clusters over clusters; a front end that was named as its own worker's server would ask itself for ever
BYTES_PER_TOKEN = 4  # of a body: nobody here knows the other server's tokens
NO_WORD = Part(0, error="the worker that passes this answer on was lost", is_last=True)
JSON = "application/json"


class LinkedServer:
    """A worker of kind "upstream"."""

    def __init__(self, token: str, address: str, on_news: Callable[[LinkedServer], None] = lambda link: None) -> None:
        self.state: State = "loading"
        self.is_draining = False
        self.is_lost = False
        self._on_news = on_news
        self._heard_s = time.monotonic()
        self._numbers = itertools.count(1)
        self._parts: dict[int, asyncio.Queue[Part]] = {}
        self._calling: Calling[FromUpstream] = Calling(token, address, from_upstream.decode, self._take, self._broke)
        self._task = asyncio.create_task(self._keep_alive(), name="cluster-relay")

    async def fetch(self, path: str, body: bytes, hops: int = 1) -> AsyncGenerator[Part, None]:
        """What comes of the answer, to its last part. Raises UpstreamGone where it breaks off."""
        number = next(self._numbers)
        queue: asyncio.Queue[Part] = asyncio.Queue()
        self._parts[number] = queue
        ended = False
        try:
            if self.is_lost or not self._calling.send(Fetch(number, path, body, hops)):
                raise UpstreamGone(NO_WORD.error)
            while not ended:
                part = await queue.get()
                ended = part.is_last
                if part.error:
                    raise UpstreamGone(part.error)
                yield part
        finally:
            del self._parts[number]
            if not ended:
                self._calling.send(Drop(number))

    async def close(self) -> None:
        self._task.cancel()
        self._lose()
        await self._calling.close()

    def _take(self, message: FromUpstream) -> None:
        self._heard_s = time.monotonic()
        if isinstance(message, Alive):
            self.state, self.is_draining = message.state, message.is_draining
            self._on_news(self)
        elif message.number in self._parts:
            self._parts[message.number].put_nowait(message)

    def _broke(self) -> None:
        if self.state != "loading":
            self._lose()

    def _lose(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            self._on_news(self)
            for queue in self._parts.values():
                queue.put_nowait(NO_WORD)

    async def _keep_alive(self) -> None:
        while not self.is_lost:
            self._calling.send(Hello() if self.state == "loading" else Ping())
            if time.monotonic() - self._heard_s > LOST_AFTER_S:
                self._lose()
            await asyncio.sleep(BEAT_EVERY_S / 2)


class RelayedModel:
    """One model name over the servers that have it."""

    max_model_len: int | None = None

    def __init__(self, *, max_requests: int, stall_timeout_s: float) -> None:
        self.router = Router()
        self.replicas: dict[str, LinkedServer] = {}
        self._max_requests, self._stall_timeout_s = max_requests, stall_timeout_s

    @property
    def is_there(self) -> bool:
        return any(not replica.is_draining for replica in self.replicas.values())

    @property
    def is_ready(self) -> bool:
        return any(self._is_open(key) for key in self.replicas)

    def add_replica(self, key: str, link: LinkedServer) -> None:
        self.replicas[key] = link
        self.router.join(key, cache_tokens=1)

    def remove_replica(self, key: str) -> None:
        del self.replicas[key]
        self.router.leave(key)

    def admit(self) -> None:
        takers = [key for key in self.replicas if self._is_open(key)]
        if not takers:
            raise EngineGone("no server that has this model answers")
        if all(self.router.num_requests(key) >= self._max_requests for key in takers):
            raise Overloaded(f"each of {len(takers)} servers has {self._max_requests} requests: try again in a moment")

    def _is_open(self, key: str) -> bool:
        return self.replicas[key].state == "ready" and not self.replicas[key].is_draining

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. The body comes in one message: who calls has read it."""
        body = (await receive())["body"]
        parts = self._parts(scope["path"], body, _hops(scope))
        try:
            first = await anext(parts)
        except (UpstreamGone, EngineGone) as error:
            await error_response(*describe(error), scope["path"])(scope, receive, send)
            return
        async with aclosing(parts):
            if first.kind.startswith("text/event-stream"):
                events = _events(first, parts)
                await EventStream(events, stall_timeout_s=self._stall_timeout_s, done=b"")(scope, receive, send)
            else:
                kind = first.kind if first.kind.startswith((JSON, "text/plain")) else "text/plain; charset=utf-8"
                headers = {"retry-after": "1"} if first.status in (429, 503) else None
                await Response(first.data, first.status, headers, media_type=kind)(scope, receive, send)

    async def _parts(self, path: str, body: bytes, hops: int) -> AsyncGenerator[Part, None]:
        """From one server after the other, until one says a word: from then on only it can go on."""
        if hops >= MAX_HOPS:
            raise UpstreamGone(f"this request came through {hops} workers with --upstream: one of them leads back here")
        tried: set[str] = set()
        while True:
            ticket = self.router.choose(
                [], len(body) // BYTES_PER_TOKEN + 1, 2**31, is_open=lambda key: key not in tried and self._is_open(key)
            )
            if ticket is None:
                raise EngineGone("no server that has this model answers")
            tried.add(ticket.replica)
            has_spoken = False
            try:
                async with aclosing(self.replicas[ticket.replica].fetch(path, body, hops + 1)) as parts:
                    async for part in parts:
                        has_spoken = True
                        yield part
                return
            except UpstreamGone as error:
                if has_spoken:
                    raise
                log.warning("a server did not answer, another one is asked: %s", error)
            finally:
                self.router.end(ticket, whole=False)


def _hops(scope: Scope) -> int:
    told = next((value for name, value in scope["headers"] if name == HOPS.encode()), b"")
    return int(told) if told.isdigit() and len(told) < 4 else 0


async def _events(first: Part, rest: AsyncGenerator[Part, None]) -> AsyncGenerator[bytes, None]:
    yield first.data
    async for part in rest:
        if part.data:
            yield part.data
