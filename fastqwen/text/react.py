"""Tools for Qwen-1, which was trained to reason in lines: Thought, Action, Action Input, Observation, Final Answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastqwen.errors import BadRequest
from fastqwen.text.answer import Parts, TextParser
from fastqwen.text.content import text_of
from fastqwen.text.json_schema import properties_of
from fastqwen.text.strict_json import StrictJsonError, loads
from fastqwen.text.tool_calls import Call, dump, schemas_of

STOP = "Observation:"  # what comes next is not the model's to say
_LABELS = ("Thought:", "Action:", "Action Input:", STOP, "Final Answer:")

# The words that the model was trained on; other words make it call tools less reliably.
_HEAD = "Answer the following questions as best you can. You have access to the following tools:\n\n"
_FORMAT = """
Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: """


def with_tools(messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation with tools told in words, and calls and their results as lines of the assistant's turn."""
    found: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], text_of(message.get("content"))
        if role == "assistant":
            lines = _as_lines(message, content)
            if found and found[-1]["role"] == "assistant":
                found[-1]["content"] += "\n" + lines
            else:
                found.append({"role": "assistant", "content": lines})
        elif role in ("tool", "function"):
            if not found or found[-1]["role"] != "assistant":
                raise BadRequest("a tool's result must follow the assistant's message that called it", "messages")
            found[-1]["content"] += f"\nObservation: {content}"
        else:
            found.append({"role": role, "content": content})
    users = [index for index, message in enumerate(found) if message["role"] == "user"]
    if not users:
        raise BadRequest("there must be a message of role user", "messages")
    question = found[users[-1]]
    question["content"] = instruction(tools) + question["content"]
    return found


def instruction(tools: Sequence[dict[str, Any]]) -> str:
    functions = [tool["function"] for tool in tools]
    told = [
        f"{one['name']}: {one.get('description', '')} Parameters: {json.dumps(one.get('parameters', {}), ensure_ascii=False)}"
        " Format the arguments as a JSON object.\n"
        for one in functions
    ]
    return _HEAD + "\n".join(told) + _FORMAT.format(names=",".join(one["name"] for one in functions))


def _as_lines(message: dict[str, Any], content: str) -> str:
    calls = message.get("tool_calls") or []
    if not calls:
        return (
            content
            if content.startswith("Thought:")
            else f"Thought: I now know the final answer\nFinal Answer: {content}"
        )
    thought = message.get("reasoning_content") or content or "I should use a tool."
    lines = [f"Thought: {thought}"]
    for call in calls:
        function = call.get("function", {})
        arguments = function.get("arguments", "{}")
        text = arguments if isinstance(arguments, str) else dump(arguments)
        lines.append(f"Action: {function.get('name', '')}\nAction Input: {text}")
    return "\n".join(lines)


class ReActParser(TextParser):
    """Thoughts are reasoning, the final answer is content, an action is a call. Text without labels is content."""

    def __init__(self, tools: Sequence[dict[str, Any]]) -> None:
        self._schemas = schemas_of(tools)
        self._section = ""
        self._space = ""
        self._line_start = True
        self._begun = False  # whether the section has text that is not white space
        self._fields: dict[str, str] = {}

    @property
    def thinking(self) -> bool:
        return self._section == "Thought:"

    def _end(self, parts: Parts) -> None:
        self._end_call(parts)

    def _step(self, parts: Parts, *, final: bool) -> bool:
        """Take one line's beginning or one line's rest."""
        if not self._held:
            return False
        if self._line_start and self._section != "Final Answer:":
            text = self._held.lstrip(" ")
            label = next((one for one in _LABELS if text.startswith(one)), None)
            if label is not None:
                self._enter(parts, label)
                self._held = text[len(label) :]
                return True
            if not final and any(one.startswith(text) for one in _LABELS):
                return False
        end = self._held.find("\n") + 1 or len(self._held)
        self._take(parts, self._held[:end])
        self._line_start = self._held[end - 1] == "\n"
        self._held = self._held[end:]
        return True

    def _enter(self, parts: Parts, label: str) -> None:
        if label != "Action Input:":
            self._end_call(parts)
        self._section, self._space, self._line_start, self._begun = label, "", False, False

    def _take(self, parts: Parts, text: str) -> None:
        if self._section in ("Action:", "Action Input:"):
            self._fields[self._section] = self._fields.get(self._section, "") + text
            return
        if self._section == STOP:
            return  # what a tool would say is not the model's to invent
        text = self._space + text
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        self._begun = self._begun or bool(kept)
        self._space = text[len(kept) :]
        if self._section == "Thought:":
            parts.reasoning += kept
        else:
            parts.content += kept

    def _end_call(self, parts: Parts) -> None:
        name = self._fields.pop("Action:", "").strip()
        text = self._fields.pop("Action Input:", "").strip()
        if name:
            parts.calls.append(Call(name, self._arguments(name, text)))

    def _arguments(self, name: str, text: str) -> str:
        """A JSON object; a bare text becomes the tool's only argument."""
        try:
            value = loads(text, strict=False)
        except StrictJsonError:
            value = text
        if isinstance(value, dict):
            return dump(value)
        properties = properties_of(self._schemas.get(name))
        only = next(iter(properties)) if len(properties) == 1 else "input"
        return dump({only: value} if text else {})
