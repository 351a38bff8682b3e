"""The heads of other servers' answers, bounded. Each line of one has a limit in httpx; "100 Continue" may come for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import httpcore
import httpx

MAX_HEAD_BYTES = 128 * 2**10  # also what was read with it of the body
PIECE_BYTES = 8 * 2**10  # is parsed in one go, and may be hundreds of heads

_left: ContextVar[list[int] | None] = ContextVar("bytes left for the head that is being read", default=None)


@contextmanager
def head_awaited() -> Iterator[None]:
    """Around a call that gives an answer whose body is still to come."""
    token = _left.set([MAX_HEAD_BYTES])
    try:
        yield
    finally:
        _left.reset(token)


def bound_heads(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """The same client, through whatever proxy it goes: httpx has no public place for this that leaves the proxies be."""
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx.AsyncHTTPTransport):
            pool: Any = transport._pool
            pool._network_backend = _Backend(pool._network_backend)
    return client


class _Backend(httpcore.AsyncNetworkBackend):
    def __init__(self, inner: httpcore.AsyncNetworkBackend) -> None:
        self._inner = inner

    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._inner.connect_tcp(*args, **options))

    async def connect_unix_socket(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._inner.connect_unix_socket(*args, **options))

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, inner: httpcore.AsyncNetworkStream) -> None:
        self._inner = inner

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left = _left.get()
        if left is None:
            return await self._inner.read(max_bytes, timeout)
        data = await self._inner.read(min(max_bytes, PIECE_BYTES), timeout)
        left[0] -= len(data)
        if left[0] < 0:
            raise httpcore.RemoteProtocolError(f"it sent {MAX_HEAD_BYTES} bytes, and no answer among them")
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._inner.start_tls(*args, **options))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
