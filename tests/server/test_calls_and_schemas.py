"""Tools and schemas together, and what a model said coming back, however it looks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.server.harness import ask, chat, make_state

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
PLAN = {
    "type": "object",
    "properties": {"period": {"$ref": "#/$defs/P"}, "color": {"enum": ["red", "blue"]},
        "count": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}},
    "required": ["period", "color", "count"],
    "$defs": {"P": {"type": "object", "properties": {"kind": {"enum": ["day", "week"]}}, "required": ["kind"],
                    "additionalProperties": False},
              "N": {"type": "integer"}},
}  # fmt: skip
FORM = {"type": "json_schema", "json_schema": {"name": "A", "schema": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}}}  # fmt: skip
OFF = {"chat_template_kwargs": {"enable_thinking": False}}
XML = "{# <tool_call><function= #}" + "{%- for m in messages %}{{ m.role }}{{ m.content }}{%- endfor %}{{ tools }}"


def tool(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def hermes(name: str, arguments: str) -> str:
    return '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>' % (name, arguments)  # noqa: UP031


def answer(said: str, template: str | None = None, **more: Any) -> dict[str, Any]:
    state = make_state(lambda prompt, seed: said, **({"template": template} if template else {}))
    response = ask(state, CHAT, chat(max_tokens=400, **more))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def calls(message: dict[str, Any]) -> list[tuple[str, Any]]:
    found = [one["function"] for one in message.get("tool_calls", [])]
    return [(one["name"], json.loads(one["arguments"])) for one in found]


def test_with_tools_and_a_schema_an_answer_is_a_call_or_of_the_schema():
    tools = [tool("weather", CITY), tool("plan", PLAN)]
    said = hermes("weather", '{"city": "Bern"}')
    assert calls(answer(said, tools=tools, response_format=FORM, **OFF)) == [("weather", {"city": "Bern"})]
    assert json.loads(answer('{"a": 5}', tools=tools, response_format=FORM, **OFF)["content"]) == {"a": 5}
    neither = answer("I would say", tools=tools, response_format=FORM, **OFF)
    assert calls(neither) or json.loads(neither["content"]).keys() == {"a"}
    for form in ({"choice": ["yes", "no"]}, {"regex": "yes|no"}, {"grammar": 'start: "yes"'}):
        assert answer("yes", tools=tools, structured_outputs=form, **OFF)["content"] == "yes"


def test_a_required_call_wins_over_a_schema():
    said = hermes("weather", '{"city": "Bern"}')
    more = {"tools": [tool("weather", CITY)], "response_format": FORM, "tool_choice": "required", **OFF}
    assert calls(answer(said, **more)) == [("weather", {"city": "Bern"})]


def test_references_hold_in_a_required_call():
    arguments = {"period": {"kind": "week"}, "color": "red", "count": None}
    said = hermes("plan", json.dumps(arguments))
    assert calls(answer(said, tools=[tool("plan", PLAN)], tool_choice="required", **OFF)) == [("plan", arguments)]
    odd = hermes("plan", json.dumps({**arguments, "period": {"kind": "year"}}))
    [(_, found)] = calls(answer(odd, tools=[tool("plan", PLAN)], tool_choice="required", **OFF))
    assert found["period"]["kind"] in ("day", "week")


@pytest.mark.parametrize("color", ["blue", "purple"])
def test_xml_values_hold_in_a_required_call(color: str):
    said = (
        '<tool_call>\n<function=plan>\n<parameter=period>\n{"kind": "week"}\n</parameter>\n'
        f"<parameter=color>\n{color}\n</parameter>\n<parameter=count>\n7\n</parameter>\n</function>\n</tool_call>"
    )
    [(_, found)] = calls(answer(said, XML, tools=[tool("plan", PLAN)], tool_choice="required"))
    assert found["period"] == {"kind": "week"} and found["color"] in ("red", "blue")
    assert found["count"] is None or isinstance(found["count"], int)


@pytest.mark.parametrize(("code", "name"), [("AB12", "Al"), ("ab", "x"), ("AB12", "line\n</parameter>\nmore")])
def test_xml_texts_hold_in_a_required_call(code: str, name: str):
    schema = {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]{2}$"},
            "name": {"type": ["string", "null"], "minLength": 2, "maxLength": 8},
        },
        "patternProperties": {"^n_": {"type": "integer"}},
        "required": ["code", "name", "n_1"],
    }
    said = (
        f"<tool_call>\n<function=plan>\n<parameter=code>\n{code}\n</parameter>\n<parameter=name>\n{name}\n</parameter>\n"
        "<parameter=n_1>\n5\n</parameter>\n</function>\n</tool_call>"
    )
    [(_, found)] = calls(answer(said, XML, tools=[tool("plan", schema)], tool_choice="required"))
    assert re.fullmatch("[A-Z]{2}[0-9]{2}", found["code"]) and isinstance(found["n_1"], int)
    assert found["name"] is None or 2 <= len(found["name"]) <= 8
    if (code, name) == ("AB12", "Al"):
        assert found == {"code": code, "name": name, "n_1": 5}


BROKEN = [
    '{"a": "unfini',
    "no JSON",
    "NaN",
    '{"a": "\\ud83d"}',
    '{"a": ' + "9" * 5000 + "}",
    "[" * 100,
]


@pytest.mark.parametrize("arguments", [*BROKEN, "", "null", "[1, 2]", '"text"', '{"a": 1e400}', f'{{"a": {10**30}}}'])
def test_whatever_was_called_can_come_back(arguments: str):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "r"}]
    response = ask(
        make_state(max_model_len=16384), CHAT, {"messages": [{"role": "user", "content": "x"}, *turns], "max_tokens": 5}
    )
    assert response.status_code == 200, response.text
    assert ("warnings" in response.json()) == (arguments in BROKEN)
    items = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}]
    output = {"type": "function_call_output", "call_id": "c", "output": {"a": 10**30}}
    assert (
        ask(
            make_state(max_model_len=16384), RESPONSES, {"input": [*items, output, {"role": "user", "content": "x"}]}
        ).status_code
        == 200
    )


def test_long_numbers_go_through_messages():
    said = hermes("f", '{"amount": 100000000000000000000000}')
    state = make_state(lambda prompt, seed: said)
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 200,
        "tools": [{"name": "f", "input_schema": {"maximum": 10**30}}],
    }
    use = ask(state, MESSAGES, body).json()["content"][-1]
    assert use["input"] == {"amount": 10**23}
    result = {
        "type": "tool_result",
        "tool_use_id": use["id"],
        "content": [{"type": "text", "text": "r"}, {"type": "image", "source": {}}],
    }
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    again = ask(state, MESSAGES, {**body, "messages": [*body["messages"], *turns]})
    assert again.status_code == 200 and "image" in again.json()["warnings"][0]
    prompt = state.text.tokenizer.decode(state.engine.requests[-1].prompt_token_ids)
    assert "100000000000000000000000" in prompt and "r[image: left out" in prompt


def test_an_image_that_was_refused_does_not_end_the_session():
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    assert ask(make_state(), CHAT, {"messages": [image], "max_tokens": 5}).status_code == 400
    later = ask(make_state(), CHAT, {"messages": [image, {"role": "user", "content": "without then"}], "max_tokens": 5})
    assert later.status_code == 200 and "left out" in later.json()["warnings"][0]


def test_documents_that_are_text_reach_the_prompt():
    state = make_state()
    document = {
        "type": "document",
        "title": "T",
        "source": {"type": "text", "media_type": "text/plain", "data": "the words"},
    }
    result = {"type": "search_result", "source": "s", "title": "U", "content": [{"type": "text", "text": "found"}]}
    body = {
        "messages": [{"role": "user", "content": [document, result, {"type": "text", "text": "?"}]}],
        "max_tokens": 5,
    }
    assert ask(state, MESSAGES, body).status_code == 200
    prompt = state.text.tokenizer.decode(state.engine.requests[-1].prompt_token_ids)
    assert "the words" in prompt and "found" in prompt
