"""A worker's engine, as a front end has it: the other end of port.py's connection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from fastqwen.client.engine import AsyncStream, Reader, Ready, State, Streams
from fastqwen.cluster.sockets import Calling
from fastqwen.cluster.wire import (
    BEAT_EVERY_S,
    LOST_AFTER_S,
    PROTOCOL,
    Abort,
    Add,
    AskFiles,
    Card,
    Files,
    FromWorker,
    Hello,
    Leave,
    News,
    Ping,
    from_worker,
)
from fastqwen.engine.core import EngineStats
from fastqwen.errors import EngineGone
from fastqwen.records import EngineRequest, Failure

log = logging.getLogger("fastqwen.cluster")

LOST = Failure("gone", "the worker that computed this answer was lost")
LOOK_EVERY_S = 0.25


class LinkedEngine:
    """ReplicaEngine over one connection. A connection that broke, fell silent or lost a message is not mended: its streams
    end, and the front end makes another one. ``on_news`` is told when state, card or load may have changed."""

    def __init__(self, token: str, address: str, on_news: Callable[[LinkedEngine], None] = lambda link: None) -> None:
        self.address = address
        self.is_lost = False
        self.card: Card | None = None
        self.failure = ""
        self.loading = (0, 0)
        self.num_restarts = 0
        self.others_tokens = 0.0
        self.is_draining = False
        self._on_news = on_news
        self._state: State = "loading"
        self._streams = Streams()
        self._stats = EngineStats()
        self._engine_silent_s = 0.0
        self._heard_s = time.monotonic()
        self._number = 0
        self._greeted = False
        self._files: asyncio.Future[Files] = asyncio.get_running_loop().create_future()
        self._calling: Calling[FromWorker] = Calling(
            token, address, from_worker.decode, self._take, self._broke, self._strange
        )
        self._task = asyncio.create_task(self._keep_alive(), name="cluster-link")

    # ---- ReplicaEngine ----

    @property
    def ready(self) -> Ready | None:
        return None if self.card is None else self.card.ready

    @property
    def state(self) -> State:
        return "stopped" if self.is_lost else self._state

    @property
    def silent_for_s(self) -> float:
        return self._engine_silent_s + time.monotonic() - self._heard_s

    def stats(self) -> EngineStats:
        return self._stats

    def stream(self, requests: list[EngineRequest]) -> AsyncStream:
        if self.state != "ready":
            raise EngineGone(f"the worker's engine is {self.state}")
        return AsyncStream(self, requests)

    def submit(self, stream: Reader, requests: list[EngineRequest]) -> None:
        self._streams.open(stream, requests)
        if self.is_lost or not self._calling.send(Add(requests)):
            self._lose("the connection broke")
            self._streams.end(LOST)

    def abort(self, request_ids: Iterable[str]) -> None:
        self._calling.send(Abort(list(request_ids)))

    def leave(self, request_ids: list[str]) -> None:
        left = self._streams.leave(request_ids)
        if left:
            self._calling.send(Leave(left))

    # ---- the connection ----

    async def files(self) -> Files:
        """The model's small files. Raises EngineGone where the worker is lost meanwhile."""
        self._calling.send(AskFiles())
        while not self._files.done():
            if self.is_lost:
                raise EngineGone("the worker was lost while it sent its model's files")
            await asyncio.wait([self._files], timeout=LOOK_EVERY_S)
        return self._files.result()

    async def close(self) -> None:
        self._task.cancel()
        self._lose("it was closed")
        await self._calling.close()

    def _take(self, message: FromWorker) -> None:
        if self.is_lost:
            return
        self._heard_s = time.monotonic()
        if isinstance(message, News):
            self._take_news(message)
        elif isinstance(message, Card):
            self._take_card(message)
        elif not self._files.done():
            self._files.set_result(message)

    def _take_card(self, card: Card) -> None:
        if card.protocol != PROTOCOL:
            self.failure = (
                f"it speaks protocol {card.protocol} and this front end {PROTOCOL}: install one version on both"
            )
            self._lose(self.failure)
            return
        self.card = card

    def _take_news(self, news: News) -> None:
        if news.number != self._number + 1:
            self._lose("messages were lost on the way")
            return
        self._number = news.number
        self.is_draining = news.is_draining
        self.num_restarts = news.num_restarts
        self.others_tokens = news.others_tokens
        self._stats = news.stats
        self._engine_silent_s = news.engine_silent_s
        self._state = "loading" if self.card is None else news.state
        self._on_news(self)  # before the streams hear why they end: what they move to must be known by its new state
        if news.deltas:
            self._streams.deliver(news.deltas)

    def _strange(self) -> None:
        self.failure = self.failure or "it says what this front end does not understand: install one version on both"
        self._lose(self.failure)

    def _broke(self) -> None:
        self._greeted = False
        if self._number:  # before the first word there was nothing to lose: it is tried again
            self._lose("the connection broke")

    def _lose(self, why: str) -> None:
        if self.is_lost:
            return
        self.is_lost = True
        if self._streams:
            log.warning("worker %s is lost while it computes %d requests: %s", self.address, len(self._streams), why)
        self._on_news(self)
        self._streams.end(LOST)

    async def _keep_alive(self) -> None:
        pinged_s = 0.0
        while not self.is_lost:
            now_s = time.monotonic()
            if not self._number and not self._greeted:
                self._greeted = self._calling.send(Hello())
            elif now_s - pinged_s > BEAT_EVERY_S:
                self._calling.send(Ping())
                pinged_s = now_s
            if now_s - self._heard_s > LOST_AFTER_S:
                self._lose(f"it has been silent for {now_s - self._heard_s:.1f} s")
            await asyncio.sleep(LOOK_EVERY_S if self._greeted else LOOK_EVERY_S / 10)
