"""Reading a request's body, up to a limit."""

from __future__ import annotations

from fastapi import Request

from fastqwen.errors import BadRequest


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises BadRequest once the body is larger than allowed, without reading the rest."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        parts.append(chunk)
    return b"".join(parts)


def _too_large(max_bytes: int) -> BadRequest:
    return BadRequest(f"the request body is larger than {max_bytes} bytes", None, "request_too_large")
