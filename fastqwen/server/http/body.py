"""Reading a request's body, up to a size and within a time; and noticing that nobody waits for the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Receive

from fastqwen.errors import BadRequest
from fastqwen.server.config import FrontConfig
from fastqwen.server.http.codings import TooLarge, decoded
from fastqwen.server.http.json_size import MAX_NUMBERS, JsonSize, TooManyValues, too_many

Answer = TypeVar("Answer")

COUNTED_AT_ONCE = 64 * 2**10


async def read_body(request: Request, config: FrontConfig, max_numbers: int = MAX_NUMBERS) -> bytearray:
    """A JSON body. Raises BadRequest once it is larger than allowed, holds too many values or comes too slowly, without
    reading the rest."""
    max_bytes = config.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            chunks: AsyncIterator[bytes] = request.stream()
            coding = request.headers.get("content-encoding", "")
            if coding:
                chunks = decoded(chunks, coding, max_bytes)
            fits = await _read_counted(chunks, body, max_bytes, JsonSize(max_numbers))
    except TooLarge:
        fits = False
    except TimeoutError:
        raise BadRequest(
            f"the request body was not there after {config.body_timeout_s:g} s", None, "request_timeout"
        ) from None
    except TooManyValues as error:
        raise await too_many(error, body) from None
    if not fits:
        raise _too_large(max_bytes)
    return body


async def _read_counted(chunks: AsyncIterator[bytes], body: bytearray, max_bytes: int, size: JsonSize) -> bool:
    """Into ``body``; False where it is larger."""
    async for chunk in chunks:
        body += chunk
        if len(body) > max_bytes:
            return False
        for start in range(0, len(chunk), COUNTED_AT_ONCE):
            size.add(chunk[start : start + COUNTED_AT_ONCE])
        await asyncio.sleep(0)  # a body that is there already must not be read in one go
    return True


async def joined(chunks: AsyncIterator[bytes], max_bytes: int) -> bytearray | None:
    """All of them, or None as soon as they are more than ``max_bytes``; then the rest is not read."""
    found = bytearray()
    async for chunk in chunks:
        found += chunk
        if len(found) > max_bytes:
            return None
    return found


def _too_large(max_bytes: int) -> BadRequest:
    return BadRequest(
        f"the request body is larger than {max_bytes} bytes (--max-body-bytes)", None, "request_too_large"
    )


async def client_leaves(receive: Receive) -> None:
    """Returns then; what is still read of the body is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer | None:
    """The work's result, or None if the client leaves first: then the work is cancelled."""
    answering = asyncio.create_task(work)
    leaving = asyncio.create_task(client_leaves(request.receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
