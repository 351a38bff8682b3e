"""JSON from outside: no NaN, no Infinity, no lone surrogates, no endless numbers, and only so deep."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from itertools import accumulate
from typing import Any, NoReturn

MAX_DEPTH = 64
MAX_DIGITS = 4000  # of a whole number; Python itself reads a few more
MAX_ENDLESS = 1000  # whole numbers that no float holds: each costs as much as a thousand others
MAX_BRACKETS = 100_000
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # possessive: a long one must not cost memory
_SURROGATE = re.compile("[\ud800-\udfff]")


class StrictJsonError(ValueError):
    """The text is not JSON, or JSON that nobody should have to process; its message is for the user."""


def loads(text: str, *, strict: bool = True) -> Any:
    """``strict=False`` lets strings contain raw control characters, which models write. Raises StrictJsonError."""
    if depth(text) > MAX_DEPTH:
        raise StrictJsonError(f"the JSON is nested more than {MAX_DEPTH} levels deep")
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_Numbers(), strict=strict)
    except StrictJsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise StrictJsonError(f"the JSON is not valid: {error}") from None
    if "\\u" in text or not text.isascii():
        _check_strings(value)
    return value


def depth(text: str) -> int:
    """How deep lists and objects are nested; brackets in strings do not count. Raises StrictJsonError for too many."""
    outside = _STRING.sub("", text)
    if outside.count("[") + outside.count("{") > MAX_BRACKETS:
        raise StrictJsonError(f"the JSON has more than {MAX_BRACKETS} lists and objects")
    brackets = (char for char in outside if char in "[]{}")
    return max(accumulate(1 if char in "[{" else -1 for char in brackets), default=0)


def _check_strings(value: Any) -> None:
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise StrictJsonError("the JSON contains a lone surrogate, which is no character")
    elif isinstance(value, list):
        for item in value:
            _check_strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_strings(key)
            _check_strings(item)


class _Numbers:
    """One text's."""

    def __init__(self) -> None:
        self._num_endless = 0

    def __call__(self, text: str) -> float | int:
        """A float, or the whole number itself where that is too large for one."""
        value = float(text)
        if math.isfinite(value):
            return value
        exact = Decimal(text)
        if exact.adjusted() >= MAX_DIGITS:
            raise StrictJsonError(f"the JSON contains a number of more than {MAX_DIGITS} digits")
        self._num_endless += 1
        if self._num_endless > MAX_ENDLESS:
            raise StrictJsonError(f"the JSON contains more than {MAX_ENDLESS} numbers that no float holds")
        return int(exact)


def _refuse(name: str) -> NoReturn:
    raise StrictJsonError(f"{name} is not valid in JSON")
