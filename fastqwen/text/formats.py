"""Which words a model thinks and calls tools in: derived from its chat template, or told by a flag."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastqwen.errors import BadConfig
from fastqwen.text.answer import THINK, THINK_END, AnswerParser, TextParser
from fastqwen.text.chatml import PiecewiseChatMl
from fastqwen.text.react import ReActParser
from fastqwen.text.template import ChatTemplate
from fastqwen.text.tool_calls import CallFormat, Hermes, Xml

# Under each format the names that users of other servers know it by.
TOOL_FORMATS = {
    "hermes": "hermes", "qwen": "hermes", "qwen25": "hermes",
    "qwen3_coder": "qwen3_coder", "qwen3_xml": "qwen3_coder",
    "react": "react", "none": "none",
}  # fmt: skip
REASONING_FORMATS = {"qwen3": "qwen3", "deepseek_r1": "qwen3", "none": "none"}


@dataclass(frozen=True)
class Formats:
    """``tools``: hermes, qwen3_coder, react or none. ``reasoning``: whether the model may think in a marked block."""

    tools: str
    reasoning: bool
    source: str  # the template's text: its switches are found in it
    thinking_end: str | None = None  # what is said in the model's place to end its thinking; None: not chosen

    def has_switch(self, name: str) -> bool:
        """Whether the template looks at a variable of that name."""
        return name in self._words

    def reads_message_key(self, name: str) -> bool:
        """Whether the template looks at that key of a message, as far as its usual spellings tell."""
        return name in self._message_keys

    # Sets, made once: names come from clients, thousands in a request, and an expression for each takes seconds.
    @functools.cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self.source))

    @functools.cached_property
    def _message_keys(self) -> frozenset[str]:
        found = re.findall(r"(?=\bm\w*(?:\.(?:get\(\s*['\"])?|\[\s*['\"])(\w[\w-]*))", self.source)
        return frozenset(one for key in found for one in (key, key.split("-")[0]))

    def names(self, word: str) -> bool:
        """Whether the template has the word in quotes: a role or a switch's value that it knows."""
        return f"'{word}'" in self.source or f'"{word}"' in self.source

    def parser(self, *, opened: bool, tools: Sequence[dict[str, Any]] = ()) -> TextParser | None:
        """None where the text is the content, as it is."""
        if tools and self.tools == "react":
            return ReActParser(tools)
        calls: CallFormat | None = None
        if tools and self.tools != "none":
            calls = (Xml if self.tools == "qwen3_coder" else Hermes)(tools)
        if calls is None and not self.reasoning:
            return None
        names = [tool["function"]["name"] for tool in tools]
        return AnswerParser(reasoning=self.reasoning, opened=opened, calls=calls, tool_names=names)


def derive_formats(
    template: ChatTemplate | PiecewiseChatMl | None,
    *,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    reasoning_config: dict[str, Any] | None = None,
) -> Formats:
    """Raises BadConfig for a flag that names no format."""
    thinking_end, named_parser = _reasoning_parts(reasoning_config or {})
    if reasoning_parser == "auto" and named_parser:
        reasoning_parser = named_parser
    source = template.source if template is not None else ""
    if tool_call_parser == "auto":
        tools = _tools_of(template, source)
    else:
        tools = _named(tool_call_parser, TOOL_FORMATS, "--tool-call-parser")
    if reasoning_parser == "auto":
        reasoning = THINK_END in source
    else:
        reasoning = _named(reasoning_parser, REASONING_FORMATS, "--reasoning-parser") != "none"
    return Formats(tools, reasoning, source, thinking_end)


def _reasoning_parts(config: dict[str, Any]) -> tuple[str | None, str]:
    """What ends thinking, and which parser, of vLLM's object; what is empty says nothing. Raises BadConfig."""
    for name, value in config.items():
        if name not in ("reasoning_start_str", "reasoning_end_str", "reasoning_parser"):
            raise BadConfig(
                f"--reasoning-config has no {name[:80]!r}: use reasoning_start_str, reasoning_end_str or reasoning_parser"
            )
        if value is not None and not isinstance(value, str):
            raise BadConfig(f"--reasoning-config: {name} must be a text")
    start, end = config.get("reasoning_start_str") or THINK, config.get("reasoning_end_str") or None
    if start.strip() != THINK:
        raise BadConfig(
            f"--reasoning-config: reasoning_start_str is {start[:80]!r}, but Qwen's models begin with {THINK}"
        )
    if end is not None and (not end.rstrip().endswith(THINK_END) or end.count(THINK_END) > 1):
        raise BadConfig(
            f"--reasoning-config: reasoning_end_str is {end[:80]!r}, but must end with {THINK_END}, as Qwen's models do"
        )
    return end, config.get("reasoning_parser") or ""


def _named(word: str, formats: dict[str, str], flag: str) -> str:
    if word not in formats:
        raise BadConfig(f"{flag} {word}: use auto, {', '.join(formats)}")
    return formats[word]


def _tools_of(template: ChatTemplate | PiecewiseChatMl | None, source: str) -> str:
    if isinstance(template, PiecewiseChatMl):
        return "react"
    if "<tool_call>" in source:
        return "qwen3_coder" if "<function=" in source else "hermes"
    return "none"
