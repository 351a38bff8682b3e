"""How a process speaks to the controller: a worker says what it is, a front end asks who is there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from fastqwen.cluster.sockets import Calling
from fastqwen.cluster.wire import (
    BEAT_EVERY_S,
    LOST_AFTER_S,
    Ask,
    Beat,
    Bye,
    Drain,
    FromController,
    Heard,
    Member,
    Members,
    from_controller,
)
from fastqwen.errors import FastqwenError

log = logging.getLogger("fastqwen.cluster")

ANSWER_WITHIN_S = 5.0
RETRY_S = 0.1


class Beacon:
    """A worker's. ``describe`` is asked once a second; ``on_drain`` is called once the controller says so."""

    def __init__(self, token: str, address: str, describe: Callable[[], Member], on_drain: Callable[[], None]) -> None:
        self._address, self._describe, self._on_drain = address, describe, on_drain
        self._heard_s = time.monotonic()
        self._is_known = False
        self._calling: Calling[FromController] = Calling(token, address, from_controller.decode, self._take)
        self._task = asyncio.create_task(self._keep_beating(), name="cluster-beacon")

    def beat(self) -> bool:
        return self._calling.send(Beat(self._describe()))

    async def close(self) -> None:
        self._task.cancel()
        self._calling.send(Bye(self._describe().key))
        await self._calling.close()

    def _take(self, message: FromController) -> None:
        self._heard_s = time.monotonic()
        if not self._is_known:
            log.info("the controller at %s knows this worker", self._address)
        self._is_known = True
        if isinstance(message, Heard) and message.drain:
            self._on_drain()

    async def _keep_beating(self) -> None:
        while True:
            sent = self.beat()
            if time.monotonic() - self._heard_s > LOST_AFTER_S:
                if self._is_known:
                    log.warning(
                        "the controller at %s does not answer; this worker goes on and calls again", self._address
                    )
                self._is_known = False
                self._heard_s = time.monotonic()
            await asyncio.sleep(BEAT_EVERY_S if sent else RETRY_S)


class Watcher:
    """A front end's: ``on_members`` gets each list that the controller sends."""

    def __init__(self, token: str, address: str, on_members: Callable[[Members], None]) -> None:
        self._on_members = on_members
        self.heard_s: float | None = None  # monotonic
        self._calling: Calling[FromController] = Calling(token, address, from_controller.decode, self._take)
        self._task = asyncio.create_task(self._keep_asking(), name="cluster-watcher")

    @property
    def is_away(self) -> bool:
        return self.heard_s is None or time.monotonic() - self.heard_s > LOST_AFTER_S

    async def close(self) -> None:
        self._task.cancel()
        await self._calling.close()

    def _take(self, message: FromController) -> None:
        self.heard_s = time.monotonic()
        if isinstance(message, Members):
            self._on_members(message)

    async def _keep_asking(self) -> None:
        while True:
            sent = self._calling.send(Ask())
            await asyncio.sleep(BEAT_EVERY_S if sent else RETRY_S)


async def ask_controller(token: str, address: str, question: Ask | Drain) -> Members:
    """One question. Raises FastqwenError where no answer comes."""
    answer: asyncio.Future[Members] = asyncio.get_running_loop().create_future()

    def take(message: FromController) -> None:
        if isinstance(message, Members) and not answer.done():
            answer.set_result(message)

    calling: Calling[FromController] = Calling(token, address, from_controller.decode, take)
    try:
        async with asyncio.timeout(ANSWER_WITHIN_S):
            while not calling.send(question):
                await asyncio.sleep(RETRY_S)
            return await answer
    except TimeoutError:
        raise FastqwenError(
            f"no controller answers at {address.removeprefix('tcp://')}: is it running there, and has it the same token?"
        ) from None
    finally:
        await calling.close()
