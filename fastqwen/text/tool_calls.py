"""Tool calls in a model's text: Hermes JSON (Qwen2.5, Qwen3) and XML (Qwen3-Coder). Text is parsed, never evaluated.

A reader takes the text behind an opener, in pieces of any size, and says when the call is complete. What it decides
depends on the characters alone and not on how they were cut, so a streamed call equals one that came at once.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fastqwen.text.json_schema import ALL_TYPES, TYPE_OF, properties_of, property_of, types_of, values_of
from fastqwen.text.strict_json import MAX_DEPTH, StrictJsonError, loads

CLOSER = "</tool_call>"
MAX_NAME_CHARS = 256


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


def schemas_of(tools: Sequence[dict[str, Any]]) -> dict[Any, Any]:
    """The schema of each tool's arguments, by the tool's name."""
    functions = [tool.get("function", tool) for tool in tools]
    return {function.get("name"): function.get("parameters") for function in functions}


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

    Values are text; the tool's JSON schema says which of them are numbers, booleans, lists or objects. Closing marks may be
    missing where the next opening one tells the same, names may stand in quotes, and the call may be JSON after all.
    """

    openers = ("<tool_call>", "<function=")

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        self._schemas = {name: (schema, properties_of(schema)) for name, schema in schemas_of(tools).items()}

    def reader(self, opener: str) -> CallReader:
        return _XmlReader(self._schemas, bare=opener == "<function=")


_FUNCTION, _PARAMETER, _VALUE_END, _FUNCTION_END = "<function", "<parameter", "</parameter>", "</function>"
_LABEL = re.compile(r"<(?:function|parameter)\s*(?:name\s*)?=\s*(?P<quote>[\"']?)(?P<label>[^<>]*?)(?P=quote)\s*>")
# Where a value may end: at its closing mark, or at a line that begins with what can only follow it.
_ENDS = re.compile(r"</parameter>|\n[ \t]{0,16}(?=<parameter|</function>)")
_LONGEST_END = 32
_AFTER_VALUE = (_PARAMETER, _FUNCTION_END, CLOSER)


class _XmlReader(CallReader):
    def __init__(self, schemas: dict[Any, tuple[Any, dict[str, Any]]], *, bare: bool) -> None:
        self._schemas = schemas
        self._text = f"{_FUNCTION}=" if bare else ""
        self._json: _HermesReader | None = None
        self._name: str | None = None
        self._key: str | None = None
        self._values: dict[str, str] = {}
        self._searched = 0  # a long value is searched for its end once, not once per token

    def push(self, text: str) -> Outcome | None:
        if self._json is not None:
            return self._json.push(text)
        self._text += text
        while self._call is None:
            if self._name is None and self._text.lstrip().startswith("{"):
                self._json = _HermesReader()
                return self._json.push(self._text)
            advanced = self._advance()
            if advanced is None:
                return None
            if not advanced:
                return Outcome(None)
        return _after_closer(self._call, self._text, final=False)

    def finish(self) -> Outcome:
        if self._json is not None:
            return self._json.finish()
        if self._key is not None and self._text.rstrip().endswith("\n" + _FUNCTION_END):
            self._values[self._key] = (
                self._text.rstrip().removesuffix(_FUNCTION_END).removeprefix("\n").removesuffix("\n")
            )
            self._text = ""
            self._complete()
        return super().finish()

    def _advance(self) -> bool | None:
        """One element further: None if its end is not here yet, False if this is no call."""
        if self._key is not None:
            return self._take_value(self._key)
        text = self._text.lstrip()
        if self._name is None:
            return self._take_label(text, _FUNCTION)
        if text.startswith((_FUNCTION_END, CLOSER)):
            self._text = text.removeprefix(_FUNCTION_END)
            self._complete()
            return True
        if _FUNCTION_END.startswith(text) or CLOSER.startswith(text):
            return None
        return self._take_label(text, _PARAMETER)

    def _complete(self) -> None:
        assert self._name is not None
        self._call = Call(self._name, dump(self._arguments(self._name)))

    def _take_label(self, text: str, opener: str) -> bool | None:
        if not text.startswith(opener):
            return None if opener.startswith(text) else False
        end = text.find(">", len(opener), len(opener) + MAX_NAME_CHARS + 1)
        if end < 0:
            return None if len(text) <= len(opener) + MAX_NAME_CHARS else False
        found = _LABEL.match(text[: end + 1])
        label = found["label"].strip() if found is not None else ""
        if not label:
            return False
        if opener == _FUNCTION:
            self._name = label
        else:
            self._key = label
        self._text, self._searched = text[end + 1 :], 0
        return True

    def _take_value(self, key: str) -> bool | None:
        while (found := _ENDS.search(self._text, self._searched)) is not None:
            ends = self._ends_value(found)
            if ends is None:
                self._searched = found.start()
                return None
            if ends:
                value = self._text[: found.start()].removeprefix("\n")
                self._values[key] = value.removesuffix("\n") if found[0] == _VALUE_END else value
                self._text, self._key = self._text[found.end() :], None
                return True
            self._searched = found.start() + 1
        self._searched = max(self._searched, len(self._text) - _LONGEST_END)
        return None

    def _ends_value(self, found: re.Match[str]) -> bool | None:
        """A value may contain marks like these; what follows tells. None if that is not here yet."""
        rest = self._text[found.end() :].lstrip()
        if found[0] == _VALUE_END:
            if rest.startswith(_AFTER_VALUE):
                return True
            return None if any(mark.startswith(rest) for mark in _AFTER_VALUE) else False
        if rest.startswith(_FUNCTION_END):
            after = rest[len(_FUNCTION_END) :].lstrip()
            return True if after.startswith(CLOSER) else None if CLOSER.startswith(after) else False
        end = rest.find(">", 0, len(_PARAMETER) + MAX_NAME_CHARS)
        if end < 0:
            return None if len(rest) < len(_PARAMETER) + MAX_NAME_CHARS else False
        label = _LABEL.match(rest[: end + 1])
        known = self._schemas.get(self._name, (None, {}))[1]
        return label is not None and label["label"] in known.keys() - self._values.keys() - {self._key}

    def _arguments(self, name: str) -> dict[str, Any]:
        root, known = self._schemas.get(name, (None, {}))
        schemas = {key: known[key] if key in known else property_of(key, root) for key in self._values}
        return {key: typed_value(text, schemas[key], root) for key, text in self._values.items()}


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
    for spelling in (text.strip(), _as_json(text.strip())):
        try:
            found.append(loads(spelling, strict=False))
            if isinstance(found[-1], str):
                found.append(loads(found[-1], strict=False))
        except StrictJsonError:
            continue
    return found


_PYTHON = re.compile(
    r"'(?P<single>(?:[^'\\]++|\\.)*+)'|\"(?:[^\"\\]++|\\.)*+\"|\b(?P<word>True|TRUE|False|FALSE|None)\b|,(?=\s*[}\]])",
    re.DOTALL,
)
_WORDS = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false", "None": "null"}


def _as_json(text: str) -> str:
    """Python's spelling of lists, objects and constants in JSON's; nothing is evaluated."""

    def change(found: re.Match[str]) -> str:
        if found["word"]:
            return _WORDS[found["word"]]
        if found["single"] is not None:
            inner = re.sub(
                r"\\(.)|\"", lambda one: "'" if one[1] == "'" else one[0] if one[1] else '\\"', found["single"]
            )
            return f'"{inner}"'
        return "" if found[0] == "," else found[0]

    return _PYTHON.sub(change, text)
