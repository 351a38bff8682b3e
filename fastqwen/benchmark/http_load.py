"""Streams of completions over HTTP/1.1, cheap enough that hundreds of them cost less than the server that answers."""

from __future__ import annotations

import asyncio
import ssl
import time
import urllib.parse
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fastqwen.errors import FastqwenError

EVENT = b"data: "
DONE = b"data: [DONE]"
MAX_REST_BYTES = 2**20  # of a line, or of an answer that is not a stream


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int
    prompt_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Closing(msgspec.Struct):
    """The events that say more than a token's text."""

    choices: list[Any] = []
    usage: _Usage | None = None
    error: Any = None


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None


class _Told(msgspec.Struct):
    choices: list[_Choice] = []


_read_closing = msgspec.json.Decoder(_Closing).decode
_read_ids = msgspec.json.Decoder(_Told).decode
Talk = Generator[bytes, "Stream", None]  # a request's body, then, told how it was answered, the next one's


@dataclass
class Stream:
    """One request's times, in seconds of one clock."""

    start_s: float
    first_s: float | None = None
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt
    keeps_lines: bool = False
    lines: list[bytes] = field(default_factory=list)  # the events of tokens
    error: str | None = None

    @property
    def token_ids(self) -> list[int]:
        """The answer's, where the server was asked for them (return_token_ids). Raises FastqwenError for one that says none."""
        found = [choice.token_ids for line in self.lines for choice in _read_ids(line[len(EVENT) :]).choices[:1]]
        if not any(found):
            raise FastqwenError("the server tells no token ids (return_token_ids), which --turns needs")
        return [token_id for ids in found for token_id in ids or []]

    @property
    def ttft_s(self) -> float:
        assert self.first_s is not None
        return self.first_s - self.start_s

    @property
    def normalized_latency_s(self) -> float:
        """From the request to the last token, for each token of the answer (Yu et al., Orca, OSDI 2022)."""
        return (self.last_s - self.start_s) / max(1, self.num_tokens)


class Target:
    """Where requests go. ``headers`` may carry a key."""

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FastqwenError(f"{url!r} is not an address like http://localhost:8000")
        self.host, secure = parts.hostname, parts.scheme == "https"
        self.port = parts.port or (443 if secure else 80)
        self._address = self.host  # its number once a connection has found it: to look a name up takes a thread
        self._ssl = ssl.create_default_context() if secure else None
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/completions"
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items())

    async def stream(self, body: bytes, *, keeps_lines: bool = False) -> Stream:
        """One completion, read to its end; whatever goes wrong is told in ``error``."""
        loop = asyncio.get_running_loop()
        stream = Stream(time.perf_counter(), keeps_lines=keeps_lines)
        answer = _Answer(stream, self._request(body), loop.create_future())
        hostname = self.host if self._ssl else None
        try:
            transport, _ = await loop.create_connection(
                lambda: answer, self._address, self.port, ssl=self._ssl, server_hostname=hostname
            )
            self._address = transport.get_extra_info("peername", [self.host])[0]
            await answer.closed
        except OSError as error:
            stream.error = f"{type(error).__name__}: {error}"
        if stream.error is None and stream.first_s is None:
            stream.error = "the stream ended without a token"
        return stream

    def _request(self, data: bytes) -> bytes:
        head = (
            f"POST {self._path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n{self._headers}\r\n"
        )
        return head.encode() + data


class _Answer(asyncio.Protocol):
    """Sends a request and reads its answer as it comes, without the layers of a stream reader: a token costs this side
    much less than the server."""

    def __init__(self, stream: Stream, request: bytes, closed: asyncio.Future[None]) -> None:
        self._stream, self._request, self.closed = stream, request, closed
        self._transport: Any = None
        self._rest = b""  # what is not yet a whole head, or a whole line
        self._status: int | None = None
        self._is_whole = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._rest += data
        if self._status is None:
            self._read_head()
        if self._status == 200:
            self._read_events()
        if self._is_whole or self._stream.error is not None or len(self._rest) > MAX_REST_BYTES:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._is_whole and self._stream.error is None:
            self._stream.error = self._why_not_whole(exc)
        if not self.closed.done():
            self.closed.set_result(None)

    def _read_head(self) -> None:
        head, end, rest = self._rest.partition(b"\r\n\r\n")
        if not end:
            return
        try:
            self._status, self._rest = int(head.split(b" ", 2)[1]), rest
        except (ValueError, LookupError) as error:
            self._stream.error = f"{type(error).__name__}: {error}"

    def _read_events(self) -> None:
        now_s = time.perf_counter()
        # Chunk sizes are lines of their own and no event begins like one, so lines can be read as they come.
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            if not line.startswith(EVENT):
                continue
            if line.startswith(DONE):
                self._is_whole = True
                return
            take_event(line, self._stream, now_s)
            if self._stream.error is not None:
                return

    def _why_not_whole(self, exc: Exception | None) -> str:
        if exc is not None:
            return f"{type(exc).__name__}: {exc}"
        if self._status is None:
            return "the connection was closed before an answer came"
        if self._status != 200:
            return f"status {self._status}: {self._rest.decode(errors='replace').strip()[:300]}"
        return "the stream broke off"


def take_event(line: bytes, stream: Stream, now_s: float) -> None:
    if b'"usage":{' in line or b'"error":{' in line:
        try:
            value = _read_closing(line[len(EVENT) :])
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            stream.error = f"an event that is no completion chunk: {error}"
            return
        if value.error is not None:
            stream.error = str(value.error.get("message") if isinstance(value.error, dict) else value.error)
        elif not value.choices and value.usage is not None:
            stream.num_tokens, stream.num_prompt_tokens = value.usage.completion_tokens, value.usage.prompt_tokens
            details = value.usage.prompt_tokens_details
            stream.num_cached_tokens = 0 if details is None else details.cached_tokens or 0
            return
    if stream.keeps_lines:
        stream.lines.append(line)
    if stream.first_s is None:
        stream.first_s = now_s
    else:
        stream.gaps_s.append(now_s - stream.last_s)
    stream.last_s = now_s


async def closed_loop(
    target: Target, bodies: list[bytes], concurrency: int, on_end: Callable[[Stream], None] = lambda stream: None
) -> list[Stream]:
    """All requests, ``concurrency`` of them at any time. ``on_end`` is told of each."""
    return await talk_loop(target, map(_once, bodies), concurrency, on_end)


async def talk_loop(
    target: Target,
    talks: Iterable[Talk],
    concurrency: int,
    on_end: Callable[[Stream], None] = lambda stream: None,
    *,
    keeps_lines: bool = False,
) -> list[Stream]:
    """All talks, ``concurrency`` of them at any time, the requests of each one after another."""
    waiting = iter(talks)

    async def worker() -> list[Stream]:
        done: list[Stream] = []
        for talk in waiting:
            body = next(talk, None)
            while body is not None:
                done.append(await target.stream(body, keeps_lines=keeps_lines))
                on_end(done[-1])
                try:
                    body = talk.send(done[-1])
                except StopIteration:
                    body = None
        return done

    return [stream for done in await asyncio.gather(*[worker() for _ in range(concurrency)]) for stream in done]


def _once(body: bytes) -> Talk:
    yield body
