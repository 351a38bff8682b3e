"""``fastqwen worker --upstream URL``: any OpenAI-compatible server as a worker. Its address stays with this process."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
import uuid
from pathlib import Path

import httpx
import msgspec

from fastqwen.client.engine import State
from fastqwen.cluster.beacon import Beacon
from fastqwen.cluster.config import CONTROLLER_PORT, WorkerConfig
from fastqwen.cluster.machine import this_machine
from fastqwen.cluster.secret import read_token
from fastqwen.cluster.sockets import Listening, address_of_worker, endpoint, own_address, split_address
from fastqwen.cluster.wire import PEER_LOST_AFTER_S, Alive, Drop, Fetch, Member, Part, ToUpstream, to_upstream
from fastqwen.errors import FastqwenError
from fastqwen.logs import configure_logging
from fastqwen.server.http.listen import run_loop
from fastqwen.server.web.upstream import Upstream
from fastqwen.version import __version__

LOOK_EVERY_S = 2.0  # at the server behind
DRAIN_LOOK_S = 0.05
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/embeddings", "/tokenize", "/detokenize",
)  # fmt: skip

log = logging.getLogger("fastqwen.cluster")


class RelayPort:
    """Passes requests on to the server behind, and its answers back as they come."""

    def __init__(self, upstream: Upstream, token: str) -> None:
        self.state: State = "loading"
        self.is_draining = False
        self.names_there: list[str] = []  # of the server's models, as it lists them
        self._upstream = upstream
        self._running: dict[tuple[bytes, int], asyncio.Task[None]] = {}
        self._heard_s: dict[bytes, float] = {}
        self._task: asyncio.Task[None] | None = None
        self._listening: Listening[ToUpstream] = Listening(token, to_upstream.decode, self._take)

    def bind(self, host: str, port: int) -> int:
        return self._listening.bind(host, port, "--port to choose another")

    def start(self) -> None:
        self._listening.start()
        self._task = asyncio.create_task(self._drop_the_silent(), name="cluster-relay-peers")

    @property
    def num_requests(self) -> int:
        return len(self._running)

    async def close(self) -> None:
        for task in [*self._running.values(), *([self._task] if self._task is not None else [])]:
            task.cancel()
        await self._listening.close()

    async def _drop_the_silent(self) -> None:
        """Front ends that give no sign of life are gone, and nobody waits for their answers."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for who in [one for one, at_s in self._heard_s.items() if time.monotonic() - at_s > PEER_LOST_AFTER_S]:
                del self._heard_s[who]
                for task in [task for (asker, _), task in self._running.items() if asker == who]:
                    task.cancel()

    def _take(self, who: bytes, message: ToUpstream) -> None:
        self._heard_s[who] = time.monotonic()
        if isinstance(message, Fetch):
            place = (who, message.number)
            self._running[place] = task = asyncio.create_task(self._answer(who, message))
            task.add_done_callback(lambda _: self._running.pop(place, None))
        elif isinstance(message, Drop):
            running = self._running.get((who, message.number))
            if running is not None:
                running.cancel()
        else:
            self._listening.send(who, Alive(self.state, self.is_draining))

    def _renamed(self, body: bytes) -> bytes:
        """Under the server's own name of its model, where --served-model-name gave it one that the server does not know."""
        if not self.names_there:
            return body
        try:
            asked = msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError):
            return body  # the server says what is wrong with it
        if not isinstance(asked, dict) or "model" not in asked or asked["model"] in self.names_there:
            return body
        return msgspec.json.encode({**asked, "model": self.names_there[0]})

    async def _answer(self, who: bytes, asked: Fetch) -> None:
        number = asked.number
        if asked.path not in PATHS:
            self._listening.send(who, Part(number, error=f"{asked.path[:100]} is no path of the API", is_last=True))
            return
        try:
            body = self._renamed(asked.body)
            response = await self._upstream.open("POST", asked.path, body=body, hops=asked.hops)
            kind = response.headers.get("content-type", "")
            try:
                if kind.startswith("text/event-stream"):
                    async for lines in self._upstream.lines(response):
                        self._listening.send(who, Part(number, response.status_code, kind, lines))
                    body = b""
                else:
                    body = await self._upstream.read(response)
            finally:
                await response.aclose()
            self._listening.send(who, Part(number, response.status_code, kind, body, is_last=True))
        except (FastqwenError, httpx.HTTPError) as error:
            self._listening.send(who, Part(number, error=str(error) or type(error).__name__, is_last=True))


def relay(url: str, key: str | None, names: list[str], config: WorkerConfig, token_file: Path | None) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    configure_logging(config.log_format)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return run_loop(_relay(url, key, names, config, read_token(token_file)))


async def _relay(url: str, key: str | None, names: list[str], config: WorkerConfig, token: str) -> int:
    upstream = Upstream(url, key, flag="--upstream", key_flag="--upstream-key")
    controller = split_address(config.controller, CONTROLLER_PORT, "--controller")
    host = config.host or own_address(*controller)
    port = RelayPort(upstream, token)
    address = address_of_worker(host, port.bind(host, config.port), config.worker_address)
    served = names or await _names_of(upstream)
    member = Member(
        key=uuid.uuid4().hex, address=address, names=served, kind="upstream", state="loading",
        host=socket.gethostname(), pid=os.getpid(), version=__version__, device=upstream.place, started_s=time.time(),
    )  # fmt: skip
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)

    def describe() -> Member:
        return msgspec.structs.replace(
            member,
            state=port.state,
            is_draining=port.is_draining,
            num_running=port.num_requests,
            machine=this_machine(),
        )

    port.start()
    beacon = Beacon(token, endpoint(*controller), describe, ended.set)
    looking = asyncio.create_task(_keep_looking(upstream, port))
    log.info("worker of %s at %s, for the server at %s", ", ".join(served), address, upstream.url)
    try:
        await ended.wait()
        port.is_draining = True
        until_s = time.monotonic() + config.drain_timeout_s
        while port.num_requests and time.monotonic() < until_s:
            await asyncio.sleep(DRAIN_LOOK_S)
    finally:
        looking.cancel()
        await beacon.close()
        await port.close()
        await upstream.close()
    return 0


async def _names_of(upstream: Upstream) -> list[str]:
    """Raises FastqwenError where the server does not answer now: without its list nobody knows what it has."""
    status, models, _ = await upstream.models(None)
    if status != 200 or not models:
        raise FastqwenError(f"{upstream.url} lists no model (status {status}): name them with --served-model-name")
    return [str(model["id"]) for model in models]


async def _keep_looking(upstream: Upstream, port: RelayPort) -> None:
    while True:
        try:
            status, models, _ = await upstream.models(None)
            port.names_there = [str(model["id"]) for model in models] or port.names_there
            state: State = "ready" if status == 200 else "restarting"
        except FastqwenError as error:
            if port.state == "ready":
                log.warning("%s", error)
            state = "restarting"
        port.state = state
        await asyncio.sleep(LOOK_EVERY_S)
