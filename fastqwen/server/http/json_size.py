"""How many values a JSON text holds, counted while it arrives and before anything is made of them.

A list of two million empty objects is a few megabytes on the wire and a gigabyte as objects; what checks them afterwards
makes an error of each. Strings are skipped, however long.
"""

from __future__ import annotations

import asyncio
import re

from fastqwen.errors import BadRequest
from fastqwen.records import MAX_LOGIT_BIAS, MAX_STOP_STRINGS

MAX_PARTS = 40_000  # texts, keys, lists and objects: 8,000 messages, or a tool's schema many times over
OWN_LIMITS = {"logit_bias": f"at most {MAX_LOGIT_BIAS} entries", "stop": f"at most {MAX_STOP_STRINGS} strings"}
MAX_LONG_NUMBERS = 1000  # of more digits than a float counts, each of which costs as much as a thousand others
LOOKED_AT_ONCE = 2000  # texts and brackets, before others have their turn
NAMED_WITHIN_BYTES = 4 * 2**20  # a larger body is refused without saying in which field
MAX_NUMBERS = 2**20  # token ids: more than any model's context


_LONG_NUMBER = re.compile(rb"(?<![0-9])[0-9]{309,}")
# Possessive, and a text may be cut: a long one must cost neither memory nor a new search from each of its quotes.
_TEXT_OR_BRACKET = re.compile(rb'("[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))(\s*:)?|[\[{]|[\]}]', re.DOTALL)


class TooManyValues(Exception):
    """Says what there is too much of."""


class JsonSize:
    """``add`` raises TooManyValues at the first value too many. What is not JSON is not noticed here."""

    def __init__(self, max_numbers: int = MAX_NUMBERS) -> None:
        self._max_numbers = max_numbers
        self._num_parts = 0
        self._num_commas = 0
        self._num_long = 0
        self._in_text = False
        self._escaped = False  # the last byte was a backslash that belongs to the next one

    def add(self, data: bytes) -> None:
        outside = self._outside(data)
        self._num_parts += outside.count(b"[") + outside.count(b"{")
        self._num_commas += outside.count(b",")
        self._num_long += len(_LONG_NUMBER.findall(outside))
        if self._num_long > MAX_LONG_NUMBERS:
            raise TooManyValues(f"more than {MAX_LONG_NUMBERS} numbers of more than 308 digits")
        if self._num_parts > MAX_PARTS:
            raise TooManyValues(f"more than {MAX_PARTS} texts, keys, lists and objects")
        if self._num_commas > self._max_numbers + MAX_PARTS:
            raise TooManyValues(f"more than {self._max_numbers} numbers")

    def _outside(self, data: bytes) -> bytes:
        """What is not inside of a text; texts are counted."""
        if self._escaped:
            data = data[1:]
            self._escaped = False
        data = data.replace(b"\\\\", b"")
        if data.endswith(b"\\"):
            self._escaped = True
            data = data[:-1]
        parts = data.replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[self._in_text :: 2])
        self._num_parts += len(parts) // 2
        self._in_text ^= len(parts) % 2 == 0
        return outside


async def too_many(found: TooManyValues, begun: bytes | bytearray) -> BadRequest:
    """What to answer; ``begun`` is the body as far as it was read."""
    field = await _field_at_end(begun) if len(begun) <= NAMED_WITHIN_BYTES else None
    where = "the request body" if field is None else field
    advice = OWN_LIMITS.get(field or "", "no request needs that many")
    return BadRequest(f"{where} holds {found}: {advice}", field, "too_many_values")


async def _field_at_end(begun: bytes | bytearray) -> str | None:
    """The name of the outermost object's field that is being read where the text breaks off."""
    depth, field = 0, None
    for number, match in enumerate(_TEXT_OR_BRACKET.finditer(begun)):
        if number % LOOKED_AT_ONCE == 0:
            await asyncio.sleep(0)
        first = match[0][:1]
        if first == b'"':
            if depth == 1 and match[2]:
                field = match[1]
        else:
            depth += 1 if first in b"[{" else -1
    return None if field is None else field[1:-1][:64].decode(errors="replace")
