"""``fastqwen controller``: knows who is there, and tells who asks. No token of any answer passes through it.

Front ends keep the last list that they heard, so running streams and new requests do not notice when it is away.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from pathlib import Path

import msgspec

from fastqwen.cluster.config import RAY_PORT
from fastqwen.cluster.members import Registry
from fastqwen.cluster.ray_node import RayNode, head_words
from fastqwen.cluster.secret import VARIABLE, own_file, read_token
from fastqwen.cluster.sockets import Listening, own_address, split_address, written
from fastqwen.cluster.wire import Beat, Bye, Drain, Heard, Members, ToController, to_controller
from fastqwen.errors import FastqwenError
from fastqwen.lifeline import end_with_starter
from fastqwen.logs import configure_logging
from fastqwen.server.http.listen import run_loop

LOOK_EVERY_S = 0.25

log = logging.getLogger("fastqwen.cluster")


class Controller:
    def __init__(self, token: str, ray_address: str = "") -> None:
        self._ray_address = ray_address
        self.registry = Registry()
        self._since_s = time.time()
        self._listening: Listening[ToController] = Listening(token, to_controller.decode, self._take)
        self._task: asyncio.Task[None] | None = None

    def bind(self, host: str, port: int) -> int:
        return self._listening.bind(host, port, "--port to choose another")

    def start(self) -> None:
        self._listening.start()
        self._task = asyncio.create_task(self._keep_looking(), name="cluster-registry")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        await self._listening.close()

    def _take(self, who: bytes, message: ToController) -> None:
        now_s = time.monotonic()
        if isinstance(message, Beat):
            member = message.member
            if self.registry.beat(member, now_s):
                log.info("worker %s: %s", member.address, ", ".join(member.names))
            self._listening.send(who, Heard(drain=self.registry.is_drained(member.key)))
        elif isinstance(message, Bye):
            gone = self.registry.bye(message.key)
            if gone is not None:
                log.info("worker %s has ended", gone.address)
        else:
            drained = self.registry.drain(message.which) if isinstance(message, Drain) else []
            for member in drained:
                log.info("worker %s is told to finish", member.address)
            self._listening.send(who, self._members(now_s, len(drained)))

    def _members(self, now_s: float, num_drained: int) -> Members:
        members, silent_s = self.registry.listed(now_s)
        return Members(members, silent_s, self._since_s, num_drained, self._ray_address)

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for member in self.registry.lost(time.monotonic()):
                log.warning("worker %s (%s) fell silent", member.address, ", ".join(member.names))


class ControllerConfig(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    port: int
    token_file: Path | None = None
    log_format: str = "text"
    ray: bool = False  # start a Ray head as well,
    ray_port: int = RAY_PORT  # which listens here,
    ray_address: str | None = None  # or join that one


def control(config: ControllerConfig) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    end_with_starter()
    configure_logging(config.log_format)
    token = read_token(config.token_file, make=True)
    if config.ray_address is not None:
        host, port = split_address(config.ray_address, RAY_PORT, "--ray-address")
        words, found = (
            ["--address", written(host, port), "--node-ip-address", own_address(host, port)],
            written(host, port),
        )
    else:
        words, found = head_words(config.host, config.ray_port), written(config.host, config.ray_port)
    if not config.ray and config.ray_address is None:
        return run_loop(_control(config, token, ""))
    with RayNode(words, token) as node:
        return run_loop(_control(config, token, found, node))


async def _control(config: ControllerConfig, token: str, ray_address: str, node: RayNode | None = None) -> int:
    controller = Controller(token, ray_address)
    port = controller.bind(config.host, config.port)
    controller.start()
    where = config.token_file or f"{own_file()}, or {VARIABLE} if it is set"
    log.info("the controller listens on %s:%d; workers and front ends need its token (%s)", config.host, port, where)
    ending = asyncio.create_task(until_signal())
    while not ending.done() and (node is None or node.poll() is None):
        await asyncio.wait([ending], timeout=None if node is None else 1.0)
    await controller.close()
    if not ending.done():
        raise FastqwenError("Ray has ended here, and so does the controller")
    return 0


async def until_signal() -> None:
    """Until Ctrl-C or SIGTERM."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    await ended.wait()
