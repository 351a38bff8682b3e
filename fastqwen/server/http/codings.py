"""Request bodies that were compressed on the way (RFC 9110 8.4), decoded piece by piece and no further than one may be large."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Iterator

from fastqwen.errors import BadRequest

CODINGS = ("gzip", "x-gzip", "deflate")
MAX_CODINGS = 3  # one over the other
MAX_MEMBERS = 16  # gzip's files one behind the other (RFC 1952, 2.2)
PIECE_BYTES = 64 * 2**10  # so much is decoded before others have their turn


class TooLarge(Exception):
    """More bytes than were allowed, in between or at the end."""


def decoders(codings: str) -> list[Decoder]:
    """In the order in which bytes go through them; ``codings`` as the header lists them: the last was done last.

    Raises BadRequest for a coding that is not known.
    """
    names = [name for name in (one.strip().lower() for one in codings.split(",")) if name not in ("", "identity")]
    if any(name not in CODINGS for name in names) or len(names) > MAX_CODINGS:
        raise BadRequest(
            f"Content-Encoding {codings[:50]!r} is not known here: send the body as it is, or in gzip or deflate",
            None,
            "unsupported_content_encoding",
        )
    return [Decoder(name) for name in reversed(names)]


async def decoded(chunks: AsyncIterator[bytes], codings: str, max_bytes: int) -> AsyncIterator[bytes]:
    """Raises BadRequest for bytes that are not of the coding, TooLarge for more than ``max_bytes``."""
    chain = decoders(codings)
    async for chunk in chunks:
        for piece in _through(chain, chunk, max_bytes):
            yield piece
    for decoder in chain:
        decoder.check_end()


def _through(chain: list[Decoder], data: bytes, max_bytes: int) -> Iterator[bytes]:
    if not chain:
        yield data
        return
    first, *rest = chain
    for piece in first.pieces(data):
        if first.num_decoded > max_bytes:
            raise TooLarge
        yield from _through(rest, piece, max_bytes)


class Decoder:
    def __init__(self, name: str) -> None:
        self._name = name
        self._begun = b""
        self._inflater: zlib._Decompress | None = None
        self._num_members = 0
        self.num_decoded = 0

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What can be said of the bytes so far. Raises BadRequest."""
        if self._inflater is None and self._name == "deflate" and len(self._begun + data) < 2:
            self._begun += data
            return
        data, self._begun = self._begun + data, b""
        piece = b""
        while data or len(piece) == PIECE_BYTES:
            if self._inflater is None or self._inflater.eof:
                if not data:
                    return
                self._inflater = self._next(data)
            try:
                piece = self._inflater.decompress(data, PIECE_BYTES)
            except zlib.error:
                raise self._wrong() from None
            data = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
            self.num_decoded += len(piece)
            yield piece

    def check_end(self) -> None:
        """Raises BadRequest where there should be more."""
        if self._inflater is None or not self._inflater.eof:
            raise self._wrong()

    def _next(self, data: bytes) -> zlib._Decompress:
        self._num_members += 1
        if self._num_members > (1 if self._name == "deflate" else MAX_MEMBERS):
            raise self._wrong()
        if self._name != "deflate":
            return zlib.decompressobj(16 + zlib.MAX_WBITS)
        # zlib's head, which some senders leave out, is a multiple of 31 and says 8 (RFC 1950, 2.2).
        has_head = data[0] & 15 == 8 and int.from_bytes(data[:2], "big") % 31 == 0
        return zlib.decompressobj(zlib.MAX_WBITS if has_head else -zlib.MAX_WBITS)

    def _wrong(self) -> BadRequest:
        return BadRequest(f"the request body is not valid {self._name}")
