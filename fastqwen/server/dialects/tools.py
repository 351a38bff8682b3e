"""What a chat request wants of tools: for the template, for the parser, and as a grammar where a call is required."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.server.dialects.schema import AllowedTools, ChatRequest, ChosenTool, Tool
from fastqwen.server.dialects.warnings import Warnings
from fastqwen.text import react
from fastqwen.text.formats import Formats
from fastqwen.text.grammar import json_grammar_part, lark, quoted

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


def required_grammar(options: ToolOptions, formats: Formats) -> str | None:
    """llguidance's text for an answer that is nothing but calls, None where none is required. Raises BadRequest."""
    if not options.required:
        return None
    more = "" if options.single else f' ("\\n" call){{0,{MAX_CALLS - 1}}}'
    if formats.tools == "qwen3_coder":
        return lark(f"start: call{more}\n{_xml_rules(options.required)}")
    if formats.tools == "react":
        return lark(f'start: "Thought: " /[^\\n]{{0,500}}/ "\\nAction: " call\n{_react_rules(options.required)}')
    schemas = [
        {
            "type": "object",
            "properties": {"name": {"const": one["function"]["name"]}, "arguments": _parameters(one)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one in options.required
    ]
    body = json_grammar_part({"anyOf": schemas})
    return lark(f'start: call{more}\ncall: "<tool_call>\\n" body "\\n</tool_call>"\nbody: {body}')


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object"}


def _xml_rules(tools: list[dict[str, Any]]) -> str:
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(tools)))]
    for index, tool in enumerate(tools):
        schema = _parameters(tool)
        properties = schema.get("properties") or {}
        needed = schema.get("required") or []
        name = tool["function"]["name"]
        parts = [f"p_{index}_{at}" + ("" if key in needed else "?") for at, key in enumerate(properties)]
        opening, closing = quoted(f"<tool_call>\n<function={name}>\n"), quoted("</function>\n</tool_call>")
        rules.append(f"call_{index}: {opening} {' '.join(parts)} {closing}")
        for at, (key, value) in enumerate(properties.items()):
            rules.append(f"p_{index}_{at}: {quoted(f'<parameter={key}>')} {_xml_value(value)}")
    rules.append('text[suffix="\\n</parameter>\\n"]: /(.|\\n)*/')
    return "\n".join(rules)


def _xml_value(schema: Any) -> str:
    if not isinstance(schema, dict) or schema.get("type", "string") == "string":
        return '"\\n" text'
    return f'"\\n" {json_grammar_part(schema)} "\\n</parameter>\\n"'


def _react_rules(tools: list[dict[str, Any]]) -> str:
    calls = [
        f"{quoted(one['function']['name'])} {quoted(chr(10) + 'Action Input: ')} body_{index}"
        for index, one in enumerate(tools)
    ]
    bodies = [f"body_{index}: {json_grammar_part(_parameters(one))}" for index, one in enumerate(tools)]
    return "\n".join(["call: " + " | ".join(calls), *bodies])
