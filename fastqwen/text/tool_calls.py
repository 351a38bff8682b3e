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

from fastqwen.text import sloppy_json
from fastqwen.text.json_schema import properties_of, property_of, required_of
from fastqwen.text.strict_json import StrictJsonError
from fastqwen.text.typed import typed_value

OPENER, CLOSER = "<tool_call>", "</tool_call>"
MAX_NAME_CHARS = 256


class Call(NamedTuple):
    """``arguments`` is a JSON object as text."""

    name: str
    arguments: str


class Outcome(NamedTuple):
    """``calls`` is empty where the text behind the opener was no call after all; ``rest`` was not used."""

    calls: tuple[Call, ...]
    rest: str = ""


class CallReader(ABC):
    @abstractmethod
    def push(self, text: str) -> Outcome | None:
        """None as long as more text is needed."""

    @abstractmethod
    def finish(self) -> Outcome:
        """The text has ended."""


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


class Xml:
    """``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``

    Values are text; the tool's JSON schema says which of them are numbers, booleans, lists or objects. Closing marks may be
    missing where the next opening one tells the same, names may stand in quotes, and the call may be JSON after all.
    """

    openers: tuple[str, ...] = (OPENER, "<function=", "<function name=")

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        self._schemas = {name: (schema, properties_of(schema)) for name, schema in schemas_of(tools).items()}

    def reader(self, opener: str) -> CallReader:
        return _XmlReader(self._schemas, begun="" if opener == OPENER else opener)


class Hermes(Xml):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, several of them or a list; or XML after all."""

    openers = (OPENER,)


def _after_closer(calls: tuple[Call, ...], text: str, *, final: bool) -> Outcome | None:
    """Pass over ``</tool_call>``, which may be missing, as may be its beginning, and over brackets too many in front of it."""
    rest = text.lstrip(" \t\r\n}]")
    if rest.startswith(CLOSER):
        return Outcome(calls, rest[len(CLOSER) :])
    if CLOSER.startswith(rest) and not final:
        return None
    return Outcome(calls, "" if CLOSER.startswith(rest) else text)


class _HermesReader(CallReader):
    def __init__(self) -> None:
        self._text = ""
        self._calls: tuple[Call, ...] = ()
        self._brackets = sloppy_json.Brackets((CLOSER,))

    def push(self, text: str) -> Outcome | None:
        self._text += text
        while not self._calls or self._text.lstrip().startswith(("{", ",")):
            rest = self._text.lstrip().removeprefix(",") if self._calls else self._text
            end = self._brackets.end(rest)
            if end is None:
                return None
            found = _hermes_calls(rest[:end] + self._brackets.missing) if end else ()
            if not found:
                return Outcome(self._calls, self._text if self._calls else "")
            self._calls += found
            self._text, self._brackets = rest[end:], sloppy_json.Brackets((CLOSER,))
        return _after_closer(self._calls, self._text, final=False)

    def finish(self) -> Outcome:
        return (_after_closer(self._calls, self._text, final=True) if self._calls else None) or Outcome(())


def _hermes_calls(text: str) -> tuple[Call, ...]:
    """Of an object, or of a list of them; none if one of them is no call."""
    for spelling in (text, text.strip()[1:-1]):  # some write each brace twice, as their template does
        try:
            value = sloppy_json.read(spelling)
        except StrictJsonError:
            continue
        found = [_hermes_call(one) for one in (value if isinstance(value, list) else [value])]
        return tuple(one for one in found if one is not None) if None not in found else ()
    return ()


def _hermes_call(value: Any) -> Call | None:
    value = value if isinstance(value, dict) else {}
    if isinstance(value.get("function"), dict):  # as OpenAI's API writes calls
        value = value["function"]
    name = value.get("name", value.get("function"))
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
        return None
    flat = {key: one for key, one in value.items() if key not in ("name", "function", "type", "id")}
    arguments = value.get("arguments", value.get("parameters", flat))
    if isinstance(arguments, str) and arguments.strip():  # some models encode them once more
        try:
            arguments = sloppy_json.read(arguments)
        except StrictJsonError:
            return None
    arguments = arguments or {}
    return Call(name, dump(arguments)) if isinstance(arguments, dict) else None


_FUNCTION, _PARAMETER, _VALUE_END, _FUNCTION_END = "<function", "<parameter", "</parameter", "</function"
_LABEL = re.compile(
    r"<(?:function|parameter)\s*(?:name\s*)?=\s*(?P<quote>[\"']?)(?P<label>[^<>]*?)(?P=quote)\s*(?P<closed>/?)>"
)
# Where a value may end: at its closing mark, or in front of what can only follow it.
_ENDS = re.compile(
    r"</parameter\s*(?:=[^<>\n]{0,64})?>|\r?\n[ \t]{0,16}(?=<parameter|</function|</tool_call>)|(?=<parameter)"
)
_LONGEST_END = 96
_AFTER_VALUE = (_PARAMETER, _FUNCTION_END, CLOSER)
# The same where nothing follows: at least one of the marks that end all.
_LAST = re.compile(
    r"(?:</parameter[^<>]{0,64}>|\s{0,64}</function[^<>]{0,64}>(?:\s{0,64}</tool_call>)?|\s{0,64}</tool_call>)\s{0,64}\Z"
)
_SPACE = re.compile(r"\s*")


class _XmlReader(CallReader):
    def __init__(self, schemas: dict[Any, tuple[Any, dict[str, Any]]], *, begun: str) -> None:
        self._schemas = schemas
        self._text = begun
        self._call: Call | None = None
        self._json: _HermesReader | None = None
        self._name: str | None = None
        self._key: str | None = None
        self._values: dict[str, str] = {}
        self._object: dict[str, Any] | None = None  # all arguments at once, as JSON
        self._brackets = sloppy_json.Brackets((_FUNCTION_END, CLOSER))
        self._searched = 0  # a long value is searched for its end once, not once per token

    def push(self, text: str) -> Outcome | None:
        if self._json is not None:
            return self._json.push(text)
        self._text += text
        while self._call is None:
            begun = "" if self._name is not None else self._text.lstrip().removeprefix(OPENER).lstrip()
            if begun.startswith(("{", "[")):
                self._json = _HermesReader()
                return self._json.push(begun)
            advanced = self._advance()
            if advanced is None:
                return None
            if not advanced:
                return Outcome(())
        return _after_closer((self._call,), self._text, final=False)

    def finish(self) -> Outcome:
        if self._json is not None:
            return self._json.finish()
        if self._call is None:
            self._finish_open_call()
        return (_after_closer((self._call,), self._text, final=True) if self._call else None) or Outcome(())

    def _finish_open_call(self) -> None:
        """Values that are closed make a call, also where its own end is missing."""
        if self._key is not None and (found := _LAST.search(self._text)) is not None:
            self._values[self._key] = _value_of(self._text[: found.start()])
        elif self._key is not None or self._text.strip() or not (self._values or self._object is not None):
            return
        self._text = ""
        self._complete()

    def _advance(self) -> bool | None:
        """One element further: None if its end is not here yet, False if this is no call."""
        if self._key is not None:
            return self._take_value(self._key)
        text = self._text.lstrip()
        if self._name is None:
            return self._take_label(text.removeprefix(OPENER).lstrip(), _FUNCTION)
        if text.startswith("{") and not self._values and self._object is None:
            return self._take_object(text)
        if text.startswith((_FUNCTION_END, CLOSER)):
            return self._take_end(text)
        if _FUNCTION_END.startswith(text) or CLOSER.startswith(text):
            return None
        return self._take_label(text, _PARAMETER)

    def _take_object(self, text: str) -> bool | None:
        self._text = text
        end = self._brackets.end(text)
        if not end:
            return None if end is None else False
        try:
            value = sloppy_json.read(text[:end] + self._brackets.missing)
        except StrictJsonError:
            return False
        self._object, self._text = value, text[end:]
        return True

    def _take_end(self, text: str) -> bool | None:
        if text.startswith(_FUNCTION_END):
            end = text.find(">", 0, _LONGEST_END)
            if end < 0:
                return None if len(text) < _LONGEST_END else False
            text = text[end + 1 :]
        self._text = text
        self._complete()
        return True

    def _complete(self) -> None:
        assert self._name is not None
        arguments = self._arguments(self._name) if self._object is None else self._object
        self._call = Call(self._name, dump(arguments))

    def _take_label(self, text: str, opener: str) -> bool | None:
        if not text.startswith(opener):
            return None if any(one.startswith(text) for one in (opener, OPENER)) else False
        end = text.find(">", len(opener), len(opener) + MAX_NAME_CHARS + 1)
        if end < 0:
            return None if len(text) <= len(opener) + MAX_NAME_CHARS else False
        found = _LABEL.match(text[: end + 1])
        label = found["label"].strip() if found is not None else ""
        if found is None or not label:
            return False
        self._text, self._searched = text[end + 1 :], 0
        if opener == _PARAMETER:
            self._key = label
            return True
        self._name = label
        if found["closed"]:
            self._complete()
        return True

    def _take_value(self, key: str) -> bool | None:
        while (found := _ENDS.search(self._text, self._searched)) is not None:
            ends = self._ends_value(found)
            if ends is None:
                self._searched = found.start()
                return None
            if ends:
                self._values[key] = _value_of(self._text[: found.start()])
                self._text, self._key = self._text[found.end() :], None
                return True
            self._searched = found.start() + 1
        self._searched = max(self._searched, len(self._text) - _LONGEST_END)
        return None

    def _ends_value(self, found: re.Match[str]) -> bool | None:
        """A value may contain marks like these; what follows tells. None if that is not here yet."""
        behind = _SPACE.match(self._text, found.end())
        at = found.end() if behind is None else behind.end()
        rest = self._text[at : at + 2 * MAX_NAME_CHARS]
        if found[0].startswith(_VALUE_END):
            if rest.startswith(_AFTER_VALUE):
                return True
            return None if any(mark.startswith(rest) for mark in _AFTER_VALUE) else False
        if rest.startswith(CLOSER):  # it ends the call if another one begins, or nothing
            after = rest[len(CLOSER) :].lstrip()
            return True if after.startswith(OPENER) else None if OPENER.startswith(after) else False
        if rest.startswith(_FUNCTION_END):
            end = rest.find(">", 0, _LONGEST_END)
            after = rest[end + 1 :].lstrip() if end > 0 else ""
            return True if after.startswith(CLOSER) else None if CLOSER.startswith(after) else False
        end = rest.find(">", 0, len(_PARAMETER) + MAX_NAME_CHARS)
        if end < 0:
            return None if len(rest) < len(_PARAMETER) + MAX_NAME_CHARS else False
        label = _LABEL.match(rest[: end + 1])
        return label is not None and label["label"] in self._expected(in_a_line=not found[0])

    def _expected(self, *, in_a_line: bool) -> set[str]:
        """What the next parameter may be called; in the midst of a line only if the call is not complete without it."""
        root, known = self._schemas.get(self._name, (None, {}))
        return ({*required_of(root)} if in_a_line else {*known}) - self._values.keys() - {self._key}

    def _arguments(self, name: str) -> dict[str, Any]:
        root, known = self._schemas.get(name, (None, {}))
        schemas = {key: known[key] if key in known else property_of(key, root) for key in self._values}
        return {key: typed_value(text, schemas[key], root) for key, text in self._values.items()}


def _value_of(raw: str) -> str:
    """Without the line breaks around it, which belong to the marks; if these are indented, without that as well."""
    inner = re.sub(r"\A\r?\n", "", raw)
    tail = re.search(r"\r?\n([ \t]*)\Z", inner)
    if tail is None or (tail[1] and inner == raw):
        return inner
    lines, indent = inner[: tail.start()].split("\n"), tail[1]
    if indent and all(line.startswith(indent) or not line.strip() for line in lines):
        lines = [line.removeprefix(indent) for line in lines]
    return "\n".join(lines)
