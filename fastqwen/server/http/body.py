"""Reading a request's body, up to a size and within a time; and noticing that nobody waits for the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from fastqwen.errors import BadRequest
from fastqwen.server.config import FrontConfig

Answer = TypeVar("Answer")


async def read_body(request: Request, config: FrontConfig) -> bytes:
    """Raises BadRequest once the body is larger than allowed or comes too slowly, without reading the rest."""
    max_bytes = config.max_body_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                parts.append(chunk)
    except TimeoutError:
        raise BadRequest(
            f"the request body was not there after {config.body_timeout_s:g} s", None, "request_timeout"
        ) from None
    return b"".join(parts)


def _too_large(max_bytes: int) -> BadRequest:
    return BadRequest(
        f"the request body is larger than {max_bytes} bytes (--max-body-bytes)", None, "request_too_large"
    )


async def unless_gone(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer | None:
    """The work's result, or None if the client leaves first: then the work is cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.create_task(work)
    leaving = asyncio.create_task(gone())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
