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


MAX_CODINGS = 3  # one over the other
MAX_MEMBERS = 16  # gzip's files one behind the other (RFC 1952, 2.2); what is left is copied for each


def decoded(body: bytes | bytearray, codings: str, max_bytes: int) -> bytes | bytearray | None:
    """``codings`` as the header lists them: the last was done last. None if the body is more than ``max_bytes`` in between or
    at the end. Raises BadRequest for a coding that is not known, or bytes that are not of it."""
    names = [name for name in (one.strip().lower() for one in codings.split(",")) if name not in ("", "identity")]
    unknown = [name for name in names if name not in WINDOW_BITS]
    if unknown or len(names) > MAX_CODINGS:
        raise BadRequest(
            f"Content-Encoding {codings[:50]!r} is not known here: send the body as it is, or in gzip or deflate",
            None,
            "unsupported_content_encoding",
        )
    for name in reversed(names):
        found = _decoded_once(body, name, max_bytes)
        if found is None:
            return None
        body = found
    return body


def _decoded_once(body: bytes | bytearray, name: str, max_bytes: int) -> bytearray | None:
    for bits in WINDOW_BITS[name]:
        found, rest = bytearray(), bytes(body)
        for _ in range(1 if name == "deflate" else MAX_MEMBERS):
            decoder = zlib.decompressobj(bits)
            try:
                found += decoder.decompress(rest, max_bytes + 1 - len(found))
            except zlib.error:
                break
            if len(found) > max_bytes:
                return None
            rest = decoder.unused_data
            if not decoder.eof or not rest:
                break
        if decoder.eof and not rest:
            return found
    raise BadRequest(f"the request body is not valid {name}")
