"""Request bodies that were compressed on the way (RFC 9110 8.4), decoded no further than a body may be large."""

from __future__ import annotations

import zlib

from fastqwen.errors import BadRequest

# What zlib is to expect: gzip's head, and for deflate its own, which some senders leave out.
WINDOW_BITS = {
    "gzip": (16 + zlib.MAX_WBITS,),
    "x-gzip": (16 + zlib.MAX_WBITS,),
    "deflate": (zlib.MAX_WBITS, -zlib.MAX_WBITS),
}


def decoded(body: bytes | bytearray, coding: str, max_bytes: int) -> bytes | bytearray | None:
    """None if it is more than ``max_bytes``. Raises BadRequest for a coding that is not known, or bytes that are not of it."""
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        return body
    if coding not in WINDOW_BITS:
        raise BadRequest(
            f"Content-Encoding {coding[:50]!r} is not known here: send the body as it is, or in gzip or deflate",
            None,
            "unsupported_content_encoding",
        )
    for bits in WINDOW_BITS[coding]:
        decoder = zlib.decompressobj(bits)
        try:
            found = decoder.decompress(body, max_bytes + 1)
        except zlib.error:
            continue
        if len(found) > max_bytes:
            return None
        if decoder.eof and not decoder.unused_data:
            return found
    raise BadRequest(f"the request body is not valid {coding}")
