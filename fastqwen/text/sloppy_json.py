"""JSON as models write it: with Python's words and quotes, commas too many, escapes that JSON does not know. Nothing is evaluated."""

from __future__ import annotations

import re
from typing import Any

from fastqwen.text.strict_json import MAX_DEPTH, StrictJsonError, loads

# Strings of either quote, words outside of them, and a comma behind which nothing comes.
_PIECES = re.compile(
    r"'(?P<single>(?:[^'\\]++|\\.)*+)'|\"(?P<double>(?:[^\"\\]++|\\.)*+)\"|(?P<word>-?\b(?:True|TRUE|False|FALSE|None|NaN|Infinity)\b)"
    r"|,(?=\s*[}\]])",
    re.DOTALL,
)
_WORDS = {"True": "true", "TRUE": "true", "False": "false", "FALSE": "false", "None": "null"}
# A pair of surrogates, half of one, any other character's number, or what else stands behind a backslash.
_ESCAPE = re.compile(
    r"(?P<pair>\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|(?P<half>\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
    r"|(?P<number>\\u[0-9a-fA-F]{4})|\\(?P<char>.)|\"",
    re.DOTALL,
)
_KNOWN = frozenset('"\\/bfnrt')
_CLOSING = {"{": "}", "[": "]"}


def read(text: str) -> Any:
    """What it says as JSON, else what was meant. Raises StrictJsonError where neither can be told."""
    try:
        return loads(text, strict=False)
    except StrictJsonError:
        return loads(repaired(text), strict=False)


def repaired(text: str) -> str:
    """The same in JSON's spelling. NaN and Infinity, which JSON has no numbers for, become texts."""

    def change(found: re.Match[str]) -> str:
        if word := found["word"]:
            return _WORDS.get(word, f'"{word}"')
        inner = found["single"] if found["single"] is not None else found["double"]
        return "" if inner is None else f'"{_ESCAPE.sub(_known_escape, inner)}"'

    return _PIECES.sub(change, text)


def _known_escape(found: re.Match[str]) -> str:
    if found["pair"] or found["number"]:
        return found[0]
    if found["half"]:
        return "\\ufffd"
    char = found["char"]
    if char is None:
        return '\\"'  # in single quotes
    if char in _KNOWN:
        return found[0]
    return "'" if char == "'" else "\\\\" + char


class Brackets:
    """Finds where a JSON object or list ends, by its brackets: a string in it may contain anything, closing marks too.

    ``closers`` are marks that may stand where brackets are missing at the end; ``missing`` is what would close them.
    """

    def __init__(self, closers: tuple[str, ...]) -> None:
        self._closers = closers
        self._seen = 0
        self._open: list[str] = []
        self._quote = ""

    @property
    def missing(self) -> str:
        return "".join(_CLOSING[one] for one in reversed(self._open))

    def end(self, text: str) -> int | None:
        """Where it ends, 0 if there is none, None if the end is not there yet. ``text`` may only grow from call to call."""
        index = self._seen
        while index < len(text):
            char = text[index]
            if self._quote:
                if char == "\\":
                    if index + 1 == len(text):
                        break  # what it escapes is not here yet
                    index += 1
                elif char == self._quote:
                    self._quote = ""
            elif not self._open and char not in "{[":
                if not char.isspace():
                    return 0
            elif char in "\"'":
                self._quote = char
            elif char in "{[":
                self._open.append(char)
                if len(self._open) > MAX_DEPTH:
                    return 0
            elif char in "}]":
                self._open.pop()
                if not self._open:
                    return index + 1
            elif char == "<":
                rest = text[index:]
                if not rest.startswith(self._closers):
                    waits = any(mark.startswith(rest) for mark in self._closers)
                    self._seen = index
                    return None if waits else 0
                return index
            index += 1
        self._seen = index
        return None
