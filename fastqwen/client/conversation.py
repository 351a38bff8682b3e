"""A script's messages as chat templates want them: texts of content parts, a call's arguments as an object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.text.content import joined_or_parts


def for_template(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI's form of messages. Raises BadRequest for content that is no text."""
    if not messages:
        raise BadRequest("messages is empty, at least one is needed", "messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, place: str) -> dict[str, Any]:
    if not hasattr(message, "keys") or not isinstance(message.get("role"), str):
        raise BadRequest(f"{place} must be a dict with role and content", "messages")
    found = dict(message)
    content = found.get("content")
    if content is None:
        found["content"] = ""
    elif not isinstance(content, str):
        found["content"] = joined_or_parts([_part(part, place) for part in content])
    if found.get("reasoning") and not found.get("reasoning_content"):
        found["reasoning_content"] = found.pop("reasoning")
    calls = found.get("tool_calls")
    if calls:
        found["tool_calls"] = [_call(call, place) for call in calls]
    elif "tool_calls" in found:
        del found["tool_calls"]
    return found


def _part(part: Any, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise BadRequest(f"{place}: content part of type {str(kind)[:100]!r}: this model reads text only", "messages")
    return str(part["text"])


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest(f"{place}: each of tool_calls needs function.name", "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise BadRequest(f"{place}: arguments of {function['name']} are not JSON: {error}", "messages") from None
    return {**call, "function": {**function, "arguments": arguments or {}}}
