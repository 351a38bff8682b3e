"""What a JSON Schema says of a text, as an expression for a terminal of a Lark grammar.

XML calls hold texts as they are, so that the JSON side of a grammar, which knows them in quotes, cannot be asked.
"""

from __future__ import annotations

from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.records import MAX_GRAMMAR_CHARS
from fastqwen.text.json_schema import resolved, types_of

_DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]{1,9})?([zZ]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
# Those that the JSON side enforces, too: RFC 3339 for times, RFC 1123 for hosts, RFC 3986 for addresses.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[tT ]{_TIME}",
    "duration": r"P([0-9]{1,9}W|([0-9]{1,9}D|[0-9]{1,9}Y|[0-9]{1,9}M|T[0-9]{1,9}[HMS])([0-9]{1,9}[DM]|T?[0-9]{1,9}[HMS])*)",
    "email": rf"[a-zA-Z0-9!#$%&'*+/=?^_`{{|}}~.-]{{1,64}}@{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": r"[0-9a-fA-F:]{2,39}(\.[0-9.]{1,12})?",
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "uri": r"[a-zA-Z][a-zA-Z0-9+.-]*:[a-zA-Z0-9._~:/?#\[\]@!$&'()*+,;=%-]+",
}


def text_expression(schema: Any, root: Any) -> str | None:
    """None where every text is allowed. Parts that allow no text have no say. Raises BadRequest for one beyond all bounds."""
    return _expression(schema, root, {})


# What was found of each part, by its identity; the part itself keeps that from being given to another.
Found = dict[int, tuple[Any, str | None]]


def _expression(schema: Any, root: Any, known: Found) -> str | None:
    if id(schema) in known:
        return known[id(schema)][1]
    known[id(schema)] = (schema, None)  # a part that leads back to itself says nothing more by that
    found = _expression_of_resolved(resolved(schema, root), root, known)
    if found is not None and len(found) > MAX_GRAMMAR_CHARS:
        raise BadRequest("the patterns of a tool's parameters are too many", "tools")
    known[id(schema)] = (schema, found)
    return found


def _expression_of_resolved(schema: Any, root: Any, known: Found) -> str | None:
    if not isinstance(schema, dict):
        return None
    found = [*_own(schema), *(_expression(part, root, known) for part in _list(schema, "allOf"))]
    for name in ("anyOf", "oneOf"):
        parts = [one for one in _list(schema, name) if "string" in types_of(one, root)]
        allowed = [_expression(one, root, known) for one in parts]
        if allowed and None not in allowed:
            found.append(" | ".join(f"({one})" for one in allowed))
    return " & ".join(f"({one})" for one in found if one is not None) or None


def _own(schema: dict[str, Any]) -> list[str | None]:
    found: list[str | None] = []
    shortest, longest = _count(schema.get("minLength")) or 0, _count(schema.get("maxLength"))
    if shortest or longest is not None:
        found.append(_terminal(f"(?s:.){{{shortest},{'' if longest is None else longest}}}"))
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and pattern:
        found.append(_terminal(_whole(pattern)))
    if schema.get("format") in FORMATS:
        found.append(_terminal(FORMATS[schema["format"]]))
    return found


def _whole(pattern: str) -> str:
    """JSON Schema searches, a terminal is everything: what no anchor holds may have more around it."""
    return "|".join(f"({_whole_alternative(one)})" for one in _split(pattern))


def _whole_alternative(pattern: str) -> str:
    starts = pattern.startswith("^")
    inner = pattern[1:] if starts else pattern
    ends = inner.endswith("$") and (len(inner) - len(inner[:-1].rstrip("\\"))) % 2 == 1
    inner = inner[:-1] if ends else inner
    return f"{'' if starts else '(?s:.*)'}({inner}){'' if ends else '(?s:.*)'}"


def _split(pattern: str) -> list[str]:
    """At the bars that stand in no group and no class."""
    parts, depth, in_class, escaped = [""], 0, False, False
    for char in pattern:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            parts.append("")
            continue
        parts[-1] += char
    return parts


def _terminal(expression: str) -> str:
    """Between the slashes of Lark; slashes that are escaped already stay so."""
    found, escaped = "", False
    for char in expression:
        found += "\\/" if char == "/" and not escaped else "\\n" if char == "\n" else char
        escaped = char == "\\" and not escaped
    return f"/{found}/"


def _count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31 else None


def _list(schema: dict[str, Any], name: str) -> list[Any]:
    found = schema.get(name)
    return found if isinstance(found, list) else []
