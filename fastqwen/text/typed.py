"""A text as a value: what a property's JSON Schema makes of it."""

from __future__ import annotations

import re
from typing import Any

from fastqwen.text.json_schema import ALL_TYPES, TYPE_OF, types_of, values_of
from fastqwen.text.sloppy_json import repaired
from fastqwen.text.strict_json import StrictJsonError, loads

# Numbers that JSON would spell otherwise: +5, .5, 5., 007
_NUMBER = re.compile(r"(?P<sign>[+-]?)0*(?P<whole>\d*)\.?(?P<part>(?<=\.)\d*|)(?P<power>(?:[eE][+-]?\d+)?)")


def typed_value(text: str, schema: Any, root: Any = None) -> Any:
    """The value that a property's schema makes of a text; the text itself where it fits nothing else.

    None is no schema. ``root`` is what its references mean.
    """
    if schema is None:
        return text
    types, values = types_of(schema, root), values_of(schema, root)
    readings = _readings(text)
    if values is not None:
        for one in (text, text.strip(), *readings):
            if any(type(one) is type(value) and one == value for value in values):
                return one
    others = types - {"string"}
    if types == ALL_TYPES:  # nothing is said of it: what is not a text beyond doubt
        others = frozenset({"object", "array"})
    for one in readings:
        if isinstance(one, float) and "number" not in others and one.is_integer():
            one = int(one)
        kind = TYPE_OF[type(one)]
        if kind in others or (kind == "integer" and "number" in others):
            return one
    return text


def _readings(text: str) -> list[Any]:
    """What it may mean beside itself: JSON, JSON as text in JSON, and the same as Python writes it."""
    found: list[Any] = []
    text = text.strip()
    for spelling in dict.fromkeys((text, repaired(text), _as_number(text))):
        try:
            found.append(loads(spelling, strict=False))
            if isinstance(found[-1], str):
                found.append(loads(found[-1], strict=False))
        except StrictJsonError:
            continue
    return found


def _as_number(text: str) -> str:
    found = _NUMBER.fullmatch(text)
    if found is None or not (found["whole"] or found["part"] or "0" in text):
        return text
    part = f".{found['part']}" if found["part"] else ""
    return f"{'-' if found['sign'] == '-' else ''}{found['whole'] or '0'}{part}{found['power']}"
