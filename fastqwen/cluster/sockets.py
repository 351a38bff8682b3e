"""Two ends of encrypted connections over TCP: one that listens to many, and one that calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from fastqwen.cluster.secret import secure_client, secure_server
from fastqwen.cluster.wire import MAX_MESSAGE_BYTES, encode
from fastqwen.errors import BadConfig, FastqwenError

M = TypeVar("M")
MAX_QUEUED = 100_000  # messages for one that does not read; behind these they are dropped, which News.number shows
RECONNECT_MS = 200

log = logging.getLogger("fastqwen.cluster")


def split_address(text: str, default_port: int, flag: str) -> tuple[str, int]:
    """HOST:PORT, HOST, [::1]:PORT, or any of them as FastChat writes them, behind http://. Raises BadConfig."""
    bare = text.removeprefix("tcp://").removeprefix("http://").rstrip("/")
    host, _, port = bare.rpartition(":")
    if not host or bare.endswith("]"):
        host, port = bare, str(default_port)
    if not host or "/" in bare or not port.isdigit() or not 0 <= int(port) < 65536:
        raise BadConfig(f"{flag} {text} is not an address like host:{default_port}")
    return host.strip("[]"), int(port)


def written(host: str, port: int) -> str:
    """HOST:PORT, as split_address reads it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def address_of_worker(host: str, port: int, told: str | None) -> str:
    """What a worker registers: where it listens, or what --worker-address says. Raises BadConfig."""
    return written(host, port) if told is None else written(*split_address(told, port, "--worker-address"))


def own_address(host: str, port: int, flag: str = "--controller") -> str:
    """Of this machine, as ``host`` would see it. Nothing is sent. Raises FastqwenError."""
    try:
        [family, kind, _, _, place] = socket.getaddrinfo(host, port or 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise FastqwenError(f"{flag} {host}: {error.strerror or error}") from None


def free_port(host: str) -> int:
    """One that nobody listens on just now."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        return int(probe.getsockname()[1])


class Listening(Generic[M]):
    """``take(who, message)`` for each message. One that cannot be decoded is logged, and ``on_strange(who)`` told of it."""

    def __init__(
        self,
        token: str,
        decode: Callable[[bytes], M],
        take: Callable[[bytes, M], None],
        on_strange: Callable[[bytes], None] = lambda who: None,
    ) -> None:
        self._decode, self._take, self._on_strange = decode, take, on_strange
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(MAX_QUEUED)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, 1)
        secure_server(self._socket, token)
        self._task: asyncio.Task[None] | None = None

    def bind(self, host: str, port: int, flag: str) -> int:
        """The port; 0 takes any. Raises BadConfig."""
        try:
            self._socket.bind(endpoint(host, port or "*"))
        except zmq.ZMQError as error:
            raise BadConfig(f"cannot listen on {host} port {port}: {error.strerror}; use {flag}") from None
        last = self._socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(last, bytes)
        return int(last.rstrip(b"\0").rpartition(b":")[2])

    def start(self) -> None:
        self._task = asyncio.create_task(self._listen(), name="cluster-listening")

    def send(self, who: bytes, message: Any) -> None:
        """Does not wait. To one that is gone it says nothing."""
        with contextlib.suppress(zmq.ZMQError):
            future: Any = self._socket.send_multipart([who, encode(message)])
            future.add_done_callback(_read_error)

    async def close(self) -> None:
        await _ended(self._task)
        self._context.destroy(linger=200)

    async def _listen(self) -> None:
        while True:
            who, *parts = await self._socket.recv_multipart()
            try:
                message = self._decode(b"".join(parts))
            except (msgspec.DecodeError, RecursionError) as error:
                log.warning("a message that is none of this protocol was dropped: %s", error)
                self._on_strange(who)
                continue
            try:
                self._take(who, message)
            except Exception:  # one peer's message must not end all others
                log.exception("a message could not be handled")


class Calling(Generic[M]):
    """Calls one address, and again for as long as it is open. ``on_lost`` is told when a connection breaks,
    ``on_strange`` when a message came that cannot be decoded."""

    def __init__(
        self,
        token: str,
        address: str,
        decode: Callable[[bytes], M],
        take: Callable[[M], None],
        on_lost: Callable[[], None] = lambda: None,
        on_strange: Callable[[], None] = lambda: None,
    ) -> None:
        self._decode, self._take, self._on_lost, self._on_strange = decode, take, on_lost, on_strange
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(MAX_QUEUED)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # nothing is kept for one that does not answer yet
        secure_client(self._socket, token)
        self._monitor: Any = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._tasks = [
            asyncio.create_task(self._listen(), name="cluster-calling"),
            asyncio.create_task(self._watch(), name="cluster-connection"),
        ]

    def send(self, message: Any) -> bool:
        """Does not wait. False where there is no connection: then the message is gone."""
        try:
            future: Any = self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        future.add_done_callback(_read_error)
        return not (future.done() and future.exception() is not None)

    async def close(self) -> None:
        for task in self._tasks:
            await _ended(task)
        self._socket.disable_monitor()
        self._context.destroy(linger=200)

    async def _listen(self) -> None:
        while True:
            data = await self._socket.recv()
            try:
                self._take(self._decode(data))
            except (msgspec.DecodeError, RecursionError) as error:
                log.warning("a message that is none of this protocol was dropped: %s", error)
                self._on_strange()
            except Exception:
                log.exception("a message could not be handled")

    async def _watch(self) -> None:
        while True:
            parse_monitor_message(await self._monitor.recv_multipart())
            self._on_lost()


def _read_error(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


async def _ended(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
