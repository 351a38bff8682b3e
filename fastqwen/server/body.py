"""Reading a request's body, up to a size and within a time."""

from __future__ import annotations

import asyncio

from fastapi import Request

from fastqwen.errors import BadRequest
from fastqwen.server.state import ServerConfig


async def read_body(request: Request, config: ServerConfig) -> bytes:
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
