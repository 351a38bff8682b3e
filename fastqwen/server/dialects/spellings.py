"""Other spellings of what a chat request says, as clients carry them over from one API to another, in the chat's own.

Each function takes a field's value as it came, and gives it back untouched where it is no such spelling.
"""

from __future__ import annotations

import json
from typing import Any

PLAIN_CHOICES = {"auto": "auto", "none": "none", "required": "required", "any": "required"}


def content(given: Any) -> Any:
    """A part that stands for itself; a tool's result that is no text, which becomes its JSON."""
    if isinstance(given, dict) and "type" in given:
        return [given]
    return json.dumps(given, ensure_ascii=False) if isinstance(given, (dict, int, float)) else given


def tool(given: Any) -> Any:
    """A function without an object of its own: ``/v1/responses`` and Anthropic's API write them so."""
    if not isinstance(given, dict) or "function" in given or given.get("type") not in (None, "function"):
        return given
    if "name" not in given:
        return given
    names = {
        "name": "name",
        "description": "description",
        "parameters": "parameters",
        "input_schema": "parameters",
        "strict": "strict",
    }
    function = {names[key]: value for key, value in given.items() if key in names}
    return {
        "type": "function",
        "function": function,
        **{key: given[key] for key in given.keys() - names.keys() - {"type"}},
    }


def tool_choice(given: Any) -> Any:
    """Words of other APIs, as objects or not."""
    if isinstance(given, str):
        return PLAIN_CHOICES.get(given, given)
    if not isinstance(given, dict):
        return given
    kind = given.get("type", "function")
    if kind in PLAIN_CHOICES and given.keys() <= {"type"}:
        return PLAIN_CHOICES[kind]
    if kind in ("function", "tool") and "function" not in given and "name" in given:
        return {"type": "function", "function": {"name": given["name"]}}
    return {"type": kind, **given}


def flat_tool(given: Any) -> Any:
    """The other way round: a function as the chat writes it, for ``/v1/responses``."""
    if not isinstance(given, dict) or "name" in given or not isinstance(given.get("function"), dict):
        return given
    return {**{key: value for key, value in given.items() if key != "function"}, **given["function"]}
