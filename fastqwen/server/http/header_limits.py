"""One connection's budget of bytes and time, whatever part of HTTP it spends them on: uvicorn's protocol, fed piece by piece.

A request's head is parsed once all of it is there, and not before the response in front of it has gone out: requests that
come ahead of time wait as bytes, of which there is a limit, and not as tasks.
"""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fastqwen.server.config import FrontConfig
from fastqwen.server.http.turns import Turns

MAX_HEADER_BYTES = 64 * 2**10
MAX_AHEAD_BYTES = 256 * 2**10  # of requests behind one that is being answered
FRAMING = 2  # a chunked body may take so many times its own size, and FRAMING_BYTES, on the wire
FRAMING_BYTES = 64 * 2**10  # trailers among them
PIECE_BYTES = 16 * 2**10
MAX_PIPELINED = 16  # requests within one piece, where a chunked body does not tell its end
STOPPED_S = 1.0  # a timer that is so late says that this process was stopped, not that the client was slow

_HEAD_END = re.compile(rb"\n\r?\n")
_OFFER = re.compile(rb"(?i)\nupgrade:")
_REQUEST_LINE = re.compile(rb"(?P<method>[^ \r\n]+) [^\r\n]* HTTP/(?P<major>\d)\.(?P<minor>\d)(?=\r?\n)")
_PROBE = re.compile(rb"(?:GET|HEAD) /(?:health|ping|metrics)[/ ]")
_TRANSFER_CODING = re.compile(rb"(?i)\ntransfer-encoding:[ \t]*+(?!chunked[ \t]*\r?\n)")
METHODS = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS", b"TRACE", b"CONNECT"})


def _raw_answer(status: str, message: str) -> bytes:
    """For what never becomes a request."""
    body = b'{"error":{"message":"%s","type":"invalid_request_error","param":null,"code":null}}' % message.encode()
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


TOO_LARGE = _raw_answer("431 Request Header Fields Too Large", "the headers are larger than 64 KiB")
LONG_ADDRESS = _raw_answer("414 URI Too Long", "the address is larger than 64 KiB")
NOT_HTTP = _raw_answer("400 Bad Request", "this is not a valid HTTP request")
OTHER_VERSION = _raw_answer("505 HTTP Version Not Supported", "this server speaks HTTP/1.1 and HTTP/1.0")
UNKNOWN_METHOD = _raw_answer("501 Not Implemented", "this server does not know that method")
UNKNOWN_CODING = _raw_answer("501 Not Implemented", "Transfer-Encoding: only chunked is known here")


def _problem_of(head: bytes) -> bytes | None:
    """The answer to a head that the parser would misunderstand, or call no HTTP where it is."""
    line = _REQUEST_LINE.match(head)
    if line is None:
        return NOT_HTTP
    if line["major"] != b"1":
        return OTHER_VERSION
    if line["method"] not in METHODS:
        return UNKNOWN_METHOD
    return UNKNOWN_CODING if _TRANSFER_CODING.search(head) else None


def _end_with_the_connection(cycle: RequestResponseCycle) -> None:
    """HTTP/1.0 knows no chunks and no 100 Continue (RFC 9112, 6.1; RFC 9110, 10.1.1): an answer of unknown length is over
    when the connection is."""
    send = cycle.send
    cycle.chunked_encoding = False
    cycle.waiting_for_100_continue = False

    async def send_as_it_is(message: Any) -> None:
        if message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_as_it_is  # type: ignore[method-assign]


class _TooMany(Exception):
    """Raised through the parser: more requests than a connection may send ahead."""


class BoundedHttp(HttpToolsProtocol):
    """Closes connections that take too long over a head or a body, or send too much of either, or too far ahead."""

    front: FrontConfig
    turns: Turns
    _last_s = -math.inf  # when the last request began, on the loop's clock
    _waits = False  # for its turn, with a whole head
    _has_turn = False
    _in_body = False
    _body_left = 0  # of a body that told its length
    _budget_bytes = (
        0  # that a chunked body, its framing and its trailers may still take; grows with what is there of it
    )
    _total_bytes = 0  # the same, however much there is
    _searched = 0  # of what is held: there is no end of a head in it
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._held = bytearray()
        self._open: set[Any] = set()  # cycles whose responses are not complete
        self._chunks: list[bytes] = []  # of the piece that is being parsed
        self._start_timer(self.front.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._held.clear()
        super().connection_lost(exc)
        for cycle in self._open:  # uvicorn tells only the last of several
            cycle.disconnected = True
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._held += data
        self._feed()
        if self._waits:
            self.flow.pause_reading()  # a body may stand behind the head that waits
        elif len(self._held) > MAX_AHEAD_BYTES:
            self.transport.abort()

    def _feed(self) -> None:
        """Whatever may be parsed now."""
        while self._held and not self.transport.is_closing() and (piece := self._next_piece()):
            super().data_received(piece)
            self._hand_on()
        if self._held and not self._in_body and not self._answering and not self._waits and self._timer is None:
            self._start_timer(self.front.header_timeout_s)

    @property
    def _answering(self) -> bool:
        """A whole request is there, and its response is not."""
        return not self._in_body and self.cycle is not None and not self.cycle.response_complete

    def _next_piece(self) -> bytes:
        if self._in_body:
            return self._taken(self._body_left or PIECE_BYTES)
        if self._answering or self._waits:
            return b""
        if self._held.startswith((b"\r", b"\n")):  # allowed between requests
            self._held = self._held.lstrip(b"\r\n")
        end = _HEAD_END.search(self._held, self._searched)
        size = len(self._held) if end is None else end.end()
        if size > MAX_HEADER_BYTES:
            self._refuse(TOO_LARGE if b"\n" in self._held[:MAX_HEADER_BYTES] else LONG_ADDRESS)
            return b""
        self._searched = max(0, size - 2) if end is None else end.start()
        if end is None or not self._may_begin():
            return b""
        self._searched = 0
        return self._checked(self._taken(size))

    def _may_begin(self) -> bool:
        """Now; otherwise this goes on when it is this connection's turn."""
        if not self._has_turn:
            probe = _PROBE.match(self._held) is not None
            self._has_turn = self.turns.take(self.loop, self._last_s, probe=probe, begin=self._begin)
        self._waits = not self._has_turn
        if self._waits:
            self._stop_timer()
            return False
        self._has_turn = False
        self._last_s = self.loop.time()
        return True

    def _begin(self) -> None:
        self._waits, self._has_turn = False, True
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self._feed()

    def _checked(self, head: bytes) -> bytes:
        """As the parser reads it; nothing if the answer went out already."""
        problem = _problem_of(head)
        if problem is not None:
            self._refuse(problem)
            return b""
        # An offer of another protocol may be ignored (RFC 9110, 7.8), but the parser would stop at it; and it does not
        # know that a later minor version means the last one it knows (2.5).
        head = _OFFER.sub(b"\nx-ignored-upgrade:", head)
        line, rest = head.split(b"\n", 1)
        return re.sub(rb"HTTP/1\.[2-9](?=\r?$)", b"HTTP/1.1", line) + b"\n" + rest

    def _taken(self, size: int) -> bytes:
        piece = bytes(self._held[:size])
        del self._held[:size]
        if self._body_left:
            self._body_left -= len(piece)
        elif self._in_body:
            self._budget_bytes -= len(piece)
            self._total_bytes -= len(piece)
            if self._budget_bytes < 0 or self._total_bytes < 0:
                self.transport.close()
                return b""
        return piece

    def _refuse(self, answer: bytes) -> None:
        self._held.clear()
        self.transport.write(answer)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(NOT_HTTP)

    def _unsupported_upgrade_warning(self) -> None:
        """CONNECT, which the parser takes for the end of HTTP: the answer is the connection's last."""
        self.cycle.keep_alive = False

    # ---- what the parser finds ----

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self.transport.abort()
            raise _TooMany
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # trailers are read and dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        length = next((value for name, value in self.headers if name == b"content-length"), b"")
        self._body_left = int(length[:20]) if length.isdigit() else 0
        self._budget_bytes = FRAMING_BYTES
        self._total_bytes = FRAMING * self.front.max_body_bytes + FRAMING_BYTES
        self._in_body = True
        # The route has its own clock, and an answer for who is too slow; this one is for bodies that no route reads.
        self._start_timer(self.front.body_timeout_s + self.front.header_timeout_s)
        super().on_headers_complete()
        self._open.add(self.cycle)
        if self.parser.get_http_version() == "1.0":
            _end_with_the_connection(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Chunks of a byte each are not added to the body one by one, which copies it each time."""
        self._budget_bytes += FRAMING * len(body)
        self._chunks.append(body)

    def _hand_on(self) -> None:
        if self._chunks:
            body = b"".join(self._chunks)
            self._chunks.clear()
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._hand_on()
        self._in_body = False
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._open = {cycle for cycle in self._open if not cycle.response_complete}
        super().on_response_complete()
        if self._held:
            self.loop.call_soon(self._feed)

    # ---- time ----

    def _start_timer(self, timeout_s: float) -> None:
        self._stop_timer()
        due_s = self.loop.time() + timeout_s
        self._timer = self.loop.call_at(due_s, self._give_up, due_s)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self, due_s: float) -> None:
        self._timer = None
        if self.loop.time() - due_s > STOPPED_S:
            self._start_timer(self.front.header_timeout_s)
        else:
            self.transport.close()


def bounded_http(config: FrontConfig) -> type[asyncio.Protocol]:
    return type("BoundedHttp", (BoundedHttp,), {"front": config, "turns": Turns()})
