"""Bodies that may take long to read: checked in a text worker, so that nobody else waits and what takes too long can be ended.

``check`` runs there; ``checked`` asks for it. What comes back is small and plain: unknown fields are gone, and no text is longer
than could fit into a prompt.
"""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel

from fastqwen.errors import BadRequest
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.body import Body, parse, parse_checked
from fastqwen.server.dialects.conversation import MEDIA_PARTS
from fastqwen.server.dialects.schema import ChatMessage
from fastqwen.text.worker import Check, Checked

B = TypeVar("B", bound=Body)

CHECKS = __name__  # for the text workers
DIRECT_BYTES = 32 * 2**10  # what is smaller takes a few milliseconds, whatever it is
# Fields whose texts become a part of the prompt, wherever they stand.
PROMPT_FIELDS = frozenset(
    {
        "prompt", "input", "inputs", "messages", "system", "instructions", "query", "documents", "text_1", "text_2", "content",
        "text", "texts", "arguments", "reasoning", "reasoning_content", "thinking", "output",
    }
)  # fmt: skip
# Of a conversation, all that stands beside the texts included: templates leave out what was thought in earlier turns.
CONVERSATION_SHARE = 4
CONTAINERS = frozenset({"tool_calls", "function"})


async def read_as(state: ServerState, kind: type[B], body: bytes | bytearray) -> B:
    """Raises BadRequest that names the first wrong field."""
    strict = state.config.strict_fields
    if len(body) <= DIRECT_BYTES:
        return parse(kind, body, strict_fields=strict)
    name = f"{kind.__module__}:{kind.__name__}"
    found = await state.workers.check(Check(name, strict, state.text.tokenizer.max_chars), body)
    read = parse_checked(kind, body if found.body is None else found.body, found.warnings, strict_fields=strict)
    await asyncio.sleep(0)  # what thousands of messages take is spent in pieces
    return read


def check(job: Check, body: bytes | bytearray) -> Checked:
    """Raises BadRequest."""
    if not job.kind:  # the first of a worker: everything is imported before anybody's time is counted
        for room in ("chat", "chat_batch", "classify", "embeddings", "messages", "responses", "scores"):
            importlib.import_module(f"fastqwen.server.dialects.{room}")
        return Checked(None, [])
    module, name = job.kind.split(":")
    kind: type[Body] = getattr(importlib.import_module(module), name)
    found = parse(kind, body, strict_fields=job.strict_fields)
    plain = _plain(found)
    _check_length(plain, job.max_chars)
    if found.is_as_sent and not found.warnings.listed:
        return Checked(None, [])
    return Checked(json.dumps(plain, ensure_ascii=False).encode(), found.warnings.listed)


def _check_length(plain: dict[str, Any], max_chars: int) -> None:
    """Raises BadRequest where it is sure that the prompt cannot fit."""
    for place, length in _long_texts(plain, max_chars):
        raise _too_long(length, max_chars, place)
    told = plain.get("messages") or []
    conversations = told if told and isinstance(told[0], list) else [told]
    length, allowed = max(map(_num_chars, conversations)), CONVERSATION_SHARE * max_chars
    if length > allowed:
        raise _too_long(length, allowed, "messages")


def _too_long(length: int, allowed: int, place: str) -> BadRequest:
    return BadRequest(
        f"the prompt has {length} characters; more than {allowed} cannot fit into this model's maximum context length. "
        "Please reduce the length of the input prompt",
        place,
        "context_length_exceeded",
    )


def _plain(value: Any) -> Any:
    """What was sent of what is known, in the names that it was sent in."""
    if isinstance(value, ChatMessage):
        return {name: _plain(one) for name, one in {**value.__dict__, **(value.model_extra or {})}.items()}
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            fields[name].alias or name: _plain(getattr(value, name))
            for name in fields
            if name in value.model_fields_set
        }
    if isinstance(value, list) and value and isinstance(value[0], (BaseModel, list)):
        return [_plain(one) for one in value]
    return value


def _long_texts(value: Any, max_chars: int, place: str = "", counts: bool = False) -> Iterator[tuple[str, int]]:
    """Their places and lengths; media are not read."""
    if isinstance(value, str):
        if counts and len(value) > max_chars:
            yield place, len(value)
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, (str, list, dict)):
                yield from _long_texts(one, max_chars, place, counts)
    elif isinstance(value, dict) and value.get("type") not in MEDIA_PARTS:
        for name, one in value.items():
            if isinstance(one, (str, list, dict)) and (name in PROMPT_FIELDS or name in CONTAINERS):
                yield from _long_texts(one, max_chars, place or name, name in PROMPT_FIELDS)


def _num_chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_num_chars, value))
    if isinstance(value, dict) and value.get("type") not in MEDIA_PARTS:
        return sum(len(name) + _num_chars(one) for name, one in value.items() if name not in MEDIA_PARTS)
    return 0
