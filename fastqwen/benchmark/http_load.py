"""Streams of completions over HTTP/1.1, cheap enough that hundreds of them cost less than the server that answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fastqwen.errors import FastqwenError

EVENT = b"data: "
DONE = b"data: [DONE]"


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Closing(msgspec.Struct):
    """The events that say more than a token's text."""

    choices: list[Any] = []
    usage: _Usage | None = None
    error: Any = None


_read_closing = msgspec.json.Decoder(_Closing).decode


@dataclass
class Stream:
    """One request's times, in seconds of one clock."""

    start_s: float
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.start_s


class Target:
    """Where requests go. ``headers`` may carry a key."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FastqwenError(f"{url!r} is not an address like http://localhost:8000")
        self.host, secure = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if secure else 80)
        self._ssl = ssl.create_default_context() if secure else None
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def stream(self, body: dict[str, Any]) -> Stream:
        """One completion, read to its end; whatever goes wrong is told in ``error``."""
        found = Stream(time.perf_counter())
        writer = None
        try:
            reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self._ssl, limit=2**20)
            writer.write(self._request(json.dumps(body).encode()))
            await self._read(reader, found)
        except (OSError, asyncio.IncompleteReadError, ValueError, LookupError) as error:
            found.error = f"{type(error).__name__}: {error}"
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        if found.error is None and found.first_s is None:
            found.error = "the stream ended without a token"
        return found

    def _request(self, data: bytes) -> bytes:
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n{self._headers}\r\n"
        )
        return head.encode() + data

    async def _read(self, reader: asyncio.StreamReader, found: Stream) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        if status != 200:
            found.error = f"status {status}: {(await reader.read(2000)).decode(errors='replace').strip()[:300]}"
            return
        # Chunk sizes are lines of their own and no event begins like one, so lines can be read as they come.
        async for line in reader:
            if not line.startswith(EVENT):
                continue
            if line.startswith(DONE):
                return
            self.event(line, found)
            if found.error is not None:
                return
        found.error = "the stream broke off"

    @staticmethod
    def event(line: bytes, found: Stream) -> None:
        if b'"usage":{' in line or b'"error":{' in line:
            try:
                value = _read_closing(line[len(EVENT) :])
            except (msgspec.DecodeError, ValueError, RecursionError) as error:
                found.error = f"an event that is no completion chunk: {error}"
                return
            if value.error is not None:
                found.error = str(value.error.get("message") if isinstance(value.error, dict) else value.error)
            elif not value.choices and value.usage is not None:
                found.num_tokens = value.usage.completion_tokens
                return
        now_s = time.perf_counter()
        if found.first_s is None:
            found.first_s = now_s
        else:
            found.gaps_s.append(now_s - found.last_s)
        found.last_s = now_s


async def closed_loop(target: Target, bodies: list[dict[str, Any]], concurrency: int) -> list[Stream]:
    """All requests, ``concurrency`` of them at any time."""
    waiting = iter(bodies)

    async def worker() -> list[Stream]:
        return [await target.stream(body) for body in waiting]

    return [stream for done in await asyncio.gather(*[worker() for _ in range(concurrency)]) for stream in done]
