"""Tools, schemas, and what a model said when it comes back."""

from __future__ import annotations

import json
from typing import Any

from fastqwen.terminal.conformance.server import PROMPT, Broken, Missing, Server, demand, message_of

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def json_schema(server: Server) -> str:
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    for more in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
        choice = server.chat(
            response_format=response_format,
            max_tokens=600,
            messages=[{"role": "user", "content": "Invent a person."}],
            **more,
        )
        if choice["finish_reason"] == "length":
            raise Missing("the answer did not end within 600 tokens")
        try:
            value = json.loads(choice["message"]["content"] or "")
        except ValueError:
            raise Broken(f"not JSON: {(choice['message']['content'] or '')[:60]!r}") from None
        demand(isinstance(value, dict) and set(value) == {"name", "age"}, f"not of the schema: {value!r}"[:100])
    return "holds, with and without thinking"


def bad_schema_refused(server: Server) -> str:
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no-such-type"}}}
    response = server.post(messages=PROMPT, response_format=response_format, max_tokens=5)
    demand(400 <= response.status_code < 500, f"a schema that means nothing was answered with {response.status_code}")
    return str(response.status_code)


def tools(server: Server) -> str:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [TOOL],
        "max_tokens": 200,
    }
    choice = server.chat(**body, tool_choice="required")
    calls = choice["message"].get("tool_calls") or []
    demand(bool(calls), "tool_choice required, and no call")
    demand(choice["finish_reason"] == "tool_calls", f"finish_reason is {choice['finish_reason']!r}")
    json.loads(calls[0]["function"]["arguments"])
    streamed: dict[int, dict[str, str]] = {}
    for chunk in server.stream(**body, tool_choice="required"):
        for part in chunk["choices"][0]["delta"].get("tool_calls", []) if chunk["choices"] else []:
            entry = streamed.setdefault(part["index"], {"name": "", "arguments": ""})
            for key in entry:
                entry[key] += part["function"].get(key) or ""
    whole = [{key: call["function"][key] for key in ("name", "arguments")} for call in calls]
    demand(list(streamed.values()) == whole, f"streamed {list(streamed.values())}, whole {whole}"[:200])
    return f"{len(calls)} call(s), streamed the same"


def references(server: Server) -> str:
    """A reference in a tool's schema means that schema, also where a call is required."""
    parameters = {
        "type": "object", "properties": {"when": {"$ref": "#/$defs/When"}}, "required": ["when"], "additionalProperties": False,
        "$defs": {"When": {"enum": ["today", "tomorrow"]}},
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "plan", "parameters": parameters}}
    choice = server.chat(tools=[tool], tool_choice="required", max_tokens=400)
    calls = choice["message"].get("tool_calls") or []
    if not calls and choice["finish_reason"] == "length":
        raise Missing("no call within 400 tokens")
    demand(bool(calls), "tool_choice required, and no call")
    when = json.loads(calls[0]["function"]["arguments"]).get("when")
    demand(when in ("today", "tomorrow"), f"the schema allows today and tomorrow, the call has {when!r}")
    return str(when)


def history_comes_back(server: Server) -> str:
    """Whatever a model called, cut off or with long numbers, must not end the conversation."""
    for arguments in ('{"city": "Par', "", '{"n": 100000000000000000000000}'):
        call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        turns = [
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "?"},
        ]
        response = server.post(messages=[*PROMPT, *turns, *PROMPT], max_tokens=4)
        demand(
            response.status_code == 200,
            f"arguments {arguments!r} were answered with {response.status_code}: {message_of(response)}",
        )
    return "cut, empty and long arguments"


def tools_with_schema(server: Server) -> str:
    """Both at once: a call where one is required; else a call, or an answer of the schema."""
    response_format = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    body: dict[str, Any] = {"tools": [TOOL], "response_format": response_format, "max_tokens": 400}
    for choice in ("required", "auto"):
        found = server.chat(**body, tool_choice=choice)
        if found["finish_reason"] == "length":
            raise Missing(f"tool_choice {choice}: no end within 400 tokens")
        called = bool(found["message"].get("tool_calls"))
        demand(called or choice == "auto", "tool_choice required, and no call")
        content: Any = {} if called else json.loads(found["message"]["content"] or "")
        demand(called or set(content) == {"name", "age"}, f"not of the schema: {content!r}"[:100])
    return "the call, or the schema"


def annotations_refuse_nothing(server: Server) -> str:
    """What JSON Schema calls an annotation says nothing about which values are valid, and should refuse nothing."""
    noted = {"type": "string", "format": "colour", "default": 5, "examples": "red", "$comment": "x", "deprecated": True}
    parameters = {"type": "object", "title": "T", "$id": "urn:x", "properties": {"city": noted}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    choice = server.chat(tools=[tool], tool_choice="required", max_tokens=200)
    demand(bool(choice["message"].get("tool_calls")) or choice["finish_reason"] == "length", "no call")
    return "format, default, examples"


def picture_in_a_result(server: Server) -> str:
    """Tools return screenshots; where the model cannot see them, the session should not end."""
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    turns = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": [picture]},
    ]
    response = server.post(messages=[*PROMPT, *turns], max_tokens=4)
    if response.status_code != 200:
        raise Missing(message_of(response))
    return "taken" if not response.json().get("warnings") else "left out, and said so"
