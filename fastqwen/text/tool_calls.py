"""Tool calls in a model's text: Hermes JSON (Qwen2.5, Qwen3) and XML (Qwen3-Coder). Text is parsed, never evaluated.

A reader takes the text behind an opener, in pieces of any size, and says when the call is complete. What it decides
depends on the characters alone and not on how they were cut, so a streamed call equals one that came at once.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fastqwen.text.strict_json import MAX_DEPTH, StrictJsonError, loads

CLOSER = "</tool_call>"
MAX_NAME_CHARS = 256
JSON_TYPES: dict[type, str] = {
    type(None): "null", bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip


class Call(NamedTuple):
    """``arguments`` is a JSON object as text."""

    name: str
    arguments: str


class Outcome(NamedTuple):
    """``call`` is None where the text behind the opener was no call after all; ``rest`` was not used."""

    call: Call | None
    rest: str = ""


class CallReader(ABC):
    """``_call`` once it is read; ``_text`` is what is behind it."""

    _text = ""
    _call: Call | None = None

    @abstractmethod
    def push(self, text: str) -> Outcome | None:
        """None as long as more text is needed."""

    def finish(self) -> Outcome:
        """The text has ended."""
        if self._call is None:
            return Outcome(None)
        return _after_closer(self._call, self._text, final=True) or Outcome(self._call)


class CallFormat(Protocol):
    @property
    def openers(self) -> tuple[str, ...]: ...

    def reader(self, opener: str) -> CallReader: ...


def dump(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def properties_of(tools: Sequence[dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The schemas of each tool's arguments, by the tool's name; none where its own schema lists none."""
    found = {}
    for tool in tools:
        function = tool.get("function", tool)
        schema = function.get("parameters")
        properties = schema.get("properties") if isinstance(schema, dict) else None
        found[function.get("name")] = properties if isinstance(properties, dict) else {}
    return found


class Hermes:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``"""

    openers = ("<tool_call>",)

    def reader(self, opener: str) -> CallReader:
        return _HermesReader()


class _HermesReader(CallReader):
    """Finds the object's end by its braces, because a string in it may contain anything, the closing mark too."""

    def __init__(self) -> None:
        self._seen = 0
        self._depth = 0
        self._in_string = False

    def push(self, text: str) -> Outcome | None:
        self._text += text
        if self._call is None:
            end = self._object_end()
            if end is None:
                return None
            self._call = None if end == 0 else _hermes_call(self._text[:end])
            if self._call is None:
                return Outcome(None)
            self._text = self._text[end:]
        return _after_closer(self._call, self._text, final=False)

    def _object_end(self) -> int | None:
        """Where the object ends, 0 if there is no object, None if it is not there yet."""
        index, text = self._seen, self._text
        while index < len(text):
            char = text[index]
            if self._in_string:
                if char == "\\":
                    if index + 1 == len(text):
                        break  # what it escapes is not here yet
                    index += 1
                elif char == '"':
                    self._in_string = False
            elif self._depth == 0 and char != "{":
                if not char.isspace():
                    return 0
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    return 0
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return index + 1
            index += 1
        self._seen = index
        return None


def _hermes_call(text: str) -> Call | None:
    try:
        value = loads(text, strict=False)
    except StrictJsonError:
        return None
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models encode them once more
        try:
            arguments = loads(arguments, strict=False)
        except StrictJsonError:
            return None
    return Call(name, dump(arguments)) if isinstance(arguments, dict) else None


def _after_closer(call: Call, text: str, *, final: bool) -> Outcome | None:
    """Pass over ``</tool_call>``, which may be missing, as may be its beginning."""
    rest = text.lstrip()
    if rest.startswith(CLOSER):
        return Outcome(call, rest[len(CLOSER) :])
    if CLOSER.startswith(rest) and not final:
        return None
    return Outcome(call, "" if CLOSER.startswith(rest) else text)


class Xml:
    """``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``

    Values are text; the tool's JSON schema says which of them are numbers, booleans, lists or objects.
    """

    openers = ("<tool_call>", "<function=")

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        self._properties = properties_of(tools)

    def reader(self, opener: str) -> CallReader:
        return _XmlReader(self._properties, bare=opener == "<function=")


_FUNCTION, _PARAMETER, _VALUE_END, _FUNCTION_END = "<function=", "<parameter=", "</parameter>", "</function>"


class _XmlReader(CallReader):
    def __init__(self, properties: dict[Any, dict[str, Any]], *, bare: bool) -> None:
        self._properties = properties
        self._text = _FUNCTION if bare else ""
        self._name: str | None = None
        self._key: str | None = None
        self._values: dict[str, str] = {}
        self._searched = 0  # a long value is searched for its end once, not once per token

    def push(self, text: str) -> Outcome | None:
        self._text += text
        while self._call is None:
            advanced = self._advance()
            if advanced is None:
                return None
            if not advanced:
                return Outcome(None)
        return _after_closer(self._call, self._text, final=False)

    def _advance(self) -> bool | None:
        """One element further: None if its end is not here yet, False if this is no call."""
        if self._key is not None:
            return self._take_value(self._key)
        text = self._text.lstrip()
        if self._name is None:
            return self._take_label(text, _FUNCTION)
        if text.startswith(_FUNCTION_END):
            self._text = text[len(_FUNCTION_END) :]
            self._call = Call(self._name, dump(self._arguments(self._name)))
            return True
        if _FUNCTION_END.startswith(text):
            return None
        return self._take_label(text, _PARAMETER)

    def _take_label(self, text: str, opener: str) -> bool | None:
        if not text.startswith(opener):
            return None if opener.startswith(text) else False
        end = text.find(">", len(opener), len(opener) + MAX_NAME_CHARS + 1)
        if end < 0:
            return None if len(text) <= len(opener) + MAX_NAME_CHARS else False
        label = text[len(opener) : end].strip()
        if not label:
            return False
        if opener == _FUNCTION:
            self._name = label
        else:
            self._key = label
        self._text, self._searched = text[end + 1 :], 0
        return True

    def _take_value(self, key: str) -> bool | None:
        end = self._text.find(_VALUE_END, self._searched)
        if end < 0:
            self._searched = max(0, len(self._text) - len(_VALUE_END))
            return None
        self._values[key] = self._text[:end].removeprefix("\n").removesuffix("\n")
        self._text, self._key = self._text[end + len(_VALUE_END) :], None
        return True

    def _arguments(self, name: str) -> dict[str, Any]:
        known = self._properties.get(name, {})
        return {key: typed_value(text, known.get(key)) for key, text in self._values.items()}


def typed_value(text: str, schema: Any) -> Any:
    """The value that a property's schema makes of a text; the text itself where it fits nothing else."""
    types = _types(schema)
    if not types or types == {"string"}:
        return text
    try:
        value = loads(text.strip() if text.strip() not in ("True", "False") else text.strip().lower())
    except StrictJsonError:
        return text
    kind = JSON_TYPES[type(value)]
    fits = kind in types or (kind == "integer" and "number" in types)
    return value if fits and kind != "string" else text


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    found: set[str] = set()
    listed = schema.get("type")
    found |= {one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, str)}
    for key in ("anyOf", "oneOf"):
        for one in schema.get(key) or []:
            found |= _types(one)
    return found
