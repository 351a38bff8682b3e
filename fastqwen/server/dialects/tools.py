"""What a chat request wants of tools: for the template, for the parser, and as a grammar where a call is required."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.server.dialects.schema import AllowedTools, ChatRequest, ChosenTool, Tool
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.text import react
from fastqwen.text.formats import Formats
from fastqwen.text.grammar import json_grammar_part, quoted
from fastqwen.text.json_schema import embedded, properties_of, property_of, required_of, types_of, values_of
from fastqwen.text.text_schema import text_expression

TEXT_END = '[suffix="\\n</parameter>\\n"]'
NO_TEXT_END = "~/(?s:.*)\\n<\\/parameter>\\n(?s:.*)/"
MAX_CALLS = 16  # where a grammar requires calls, so that a model cannot repeat them forever


@dataclass(frozen=True)
class ToolOptions:
    """``tools`` is empty where none may be called. ``required`` lists the tools of which one must be called."""

    tools: list[dict[str, Any]]
    required: list[dict[str, Any]]
    single: bool

    def messages(self, messages: list[dict[str, Any]], formats: Formats) -> list[dict[str, Any]]:
        tells_itself = formats.tools == "react" and (self.tools or any("tool_calls" in one for one in messages))
        return react.with_tools(messages, self.tools) if tells_itself and self.tools else messages

    def template_options(self, formats: Formats) -> dict[str, Any]:
        return {"tools": self.tools} if self.tools and formats.tools != "react" else {}


def function_tools(tools: Sequence[Tool] | None, warnings: Warnings) -> list[dict[str, Any]]:
    """Those that the model is told of. Raises BadRequest for a function without its object."""
    found = []
    for index, tool in enumerate(tools or []):
        if tool.type != "function":
            warnings.unknown(
                f"tools.{index}", f"there are no tools of type {tool.type[:50]!r} here, so it is not offered"
            )
        elif tool.function is None:
            raise BadRequest(f"tools.{index}.function: Field required", f"tools.{index}.function")
        else:
            found.append(tool.for_template())
    return found


def tool_options(body: ChatRequest, formats: Formats, warnings: Warnings) -> ToolOptions:
    """Raises BadRequest, naming the field."""
    tools = function_tools(body.tools, warnings)
    choice: Any = body.tool_choice
    if isinstance(choice, ChosenTool) and choice.allowed_tools is not None:
        tools = _allowed(tools, choice.allowed_tools)
        choice = choice.allowed_tools.mode
    if not tools and choice not in (None, "none", "auto"):
        raise BadRequest("tool_choice asks for a call, but there are no tools", "tool_choice")
    if not tools or choice == "none":
        return ToolOptions([], [], False)
    if formats.tools == "none":
        raise BadRequest(
            "this model's chat template has no tool format; --tool-call-parser hermes tells the server to assume one",
            "tools",
        )
    single = body.parallel_tool_calls is False
    if isinstance(choice, ChosenTool):
        wanted = choice.function.name if choice.function is not None else f"a tool of type {choice.type}"
        named = [tool for tool in tools if tool["function"]["name"] == wanted]
        if not named:
            raise BadRequest(f"tool_choice names {wanted[:200]!r}, which is not among the tools", "tool_choice")
        return ToolOptions(tools, named, True)
    return ToolOptions(tools, tools if choice == "required" else [], single)


def _allowed(tools: list[dict[str, Any]], allowed: AllowedTools) -> list[dict[str, Any]]:
    names = {
        (one.get("function") or one).get("name") for one in allowed.tools if isinstance(one.get("function", {}), dict)
    }
    found = [tool for tool in tools if tool["function"]["name"] in names]
    if not found:
        raise BadRequest("tool_choice allows none of the tools", "tool_choice")
    return found


def call_rules(tools: list[dict[str, Any]], options: ToolOptions, formats: Formats) -> str:
    """Rules of a Lark grammar of which ``start_call`` is an answer that is nothing but calls of these tools.

    Each tool's schema stands in its own rule, as its own root, so that references in it mean what they meant.
    """
    call = "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))
    if formats.tools == "react":
        start = 'start_call: "Thought: " /[^\\n]{0,500}/ "\\nAction: " call'
        rules = _react_rules(tools)
    else:
        more = "" if options.single else f' ("\\n" call){{0,{MAX_CALLS - 1}}}'
        start = f"start_call: call{more}"
        rules = _xml_rules(tools) if formats.tools == "qwen3_coder" else _hermes_rules(tools)
    return "\n".join([start, call, *rules])


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object"}


def _hermes_rules(tools: list[dict[str, Any]]) -> list[str]:
    rules = ["SPACE: /[ \\n]{1,64}/"]
    for index, tool in enumerate(tools):
        name = json.dumps(tool["function"]["name"], ensure_ascii=False)
        words = ["{", '"name"', ":", name, ",", '"arguments"', ":"]
        head = " (SPACE)? ".join(quoted(word) for word in words)
        rules.append(f'call_{index}: "<tool_call>\\n" {head} (SPACE)? body_{index} (SPACE)? "}}\\n</tool_call>"')
        rules.append(f"body_{index}: {json_grammar_part(_parameters(tool))}")
    return rules


def _xml_rules(tools: list[dict[str, Any]]) -> list[str]:
    rules = [f"text{TEXT_END}: /(.|\\n)*/"]
    for index, tool in enumerate(tools):
        root = _parameters(tool)
        needed, properties = required_of(root), properties_of(root)
        properties |= {key: property_of(key, root) for key in sorted(needed - properties.keys())}
        name = tool["function"]["name"]
        parts = [f"p_{index}_{at}" + ("" if key in needed else "?") for at, key in enumerate(properties)]
        opening, closing = quoted(f"<tool_call>\n<function={name}>\n"), quoted("</function>\n</tool_call>")
        rules.append(f"call_{index}: {opening} {' '.join(parts)} {closing}")
        for at, (key, schema) in enumerate(properties.items()):
            rules.append(
                f"p_{index}_{at}: {quoted(f'<parameter={key}>')} {_xml_value(f'v_{index}_{at}', schema, root, rules)}"
            )
    return rules


def _xml_value(rule: str, schema: Any, root: Any, rules: list[str]) -> str:
    """A value and its end: a text stands there as it is, everything else as JSON. Adds ``rule`` where it needs one."""
    types, values = types_of(schema, root), values_of(schema, root)
    forms: list[str] = []
    if not types or ("string" in types and values is None):
        expression = text_expression(schema, root) if types else None
        if expression is None:
            return '"\\n" text'
        rules += [f"{rule}_text{TEXT_END}: {rule.upper()}", f"{rule.upper()}: ({expression}) & {NO_TEXT_END}"]
        forms.append(f"{rule}_text")
    allowed = [quoted(one) for one in values or [] if isinstance(one, str)]
    others = types - {"string"}
    if others:
        more = {"type": sorted(others)} if "string" in types else {}
        allowed.append(json_grammar_part(embedded(schema, root, **more)))
    if allowed:
        rules.append(f"{rule}: {' | '.join(allowed)}")
        forms.append(f'{rule} "\\n</parameter>\\n"')
    return f'"\\n" ({" | ".join(forms)})'


def _react_rules(tools: list[dict[str, Any]]) -> list[str]:
    rules = []
    for index, tool in enumerate(tools):
        head = f"{quoted(tool['function']['name'])} {quoted(chr(10) + 'Action Input: ')}"
        rules += [f"call_{index}: {head} body_{index}", f"body_{index}: {json_grammar_part(_parameters(tool))}"]
    return rules
