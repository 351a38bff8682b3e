"""Reading a request's body, up to a size and within a time; and noticing that nobody waits for the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.types import Receive

from fastqwen.errors import BadRequest
from fastqwen.server.config import FrontConfig
from fastqwen.server.http.codings import decoded

Answer = TypeVar("Answer")


async def read_body(request: Request, config: FrontConfig) -> bytes:
    """Raises BadRequest once the body is larger than allowed or comes too slowly, without reading the rest."""
    max_bytes = config.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            body = await joined(request.stream(), max_bytes)
    except TimeoutError:
        raise BadRequest(
            f"the request body was not there after {config.body_timeout_s:g} s", None, "request_timeout"
        ) from None
    if body is not None:
        body = decoded(body, request.headers.get("content-encoding", ""), max_bytes)
    if body is None:
        raise _too_large(max_bytes)
    return body


async def joined(chunks: AsyncIterator[bytes], max_bytes: int) -> bytes | None:
    """All of them, or None as soon as they are more than ``max_bytes``; then the rest is not read."""
    parts, size = [], 0
    async for chunk in chunks:
        size += len(chunk)
        if size > max_bytes:
            return None
        parts.append(chunk)
    return b"".join(parts)


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
