"""Thinking, efforts, kept reasoning and XML calls with templates in the shape of Qwen3.5, 3.6 and 3.8."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastqwen.server.answer.state import ServerState
from tests.server.harness import ask, assembled, chat, make_state
from tests.server.hybrid_templates import ALWAYS, LARGE, PRESERVING, SMALL, WITH_EFFORT

CHAT = "/v1/chat/completions"
OPEN, CLOSED = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"}, "count": {"type": "integer"}, "where": {"type": "object"},
                    "all": {"type": "boolean"},
                },
            },
        },
    }
]  # fmt: skip
XML = (
    "<tool_call>\n<function=find>\n<parameter=text>\n12\n</parameter>\n<parameter=count>\n12\n</parameter>\n"
    '<parameter=where>\n{"a": [1]}\n</parameter>\n<parameter=all>\ntrue\n</parameter>\n</function>\n</tool_call>'
)
ARGUMENTS = {"text": "12", "count": 12, "where": {"a": [1]}, "all": True}


def state_of(template: str, text: str = "Hello") -> ServerState:
    return make_state(lambda prompt, seed: text, template=template)


def prompt_of(state: ServerState, **body: Any) -> str:
    """What the model is asked; the request must be taken."""
    response = ask(state, CHAT, chat(max_tokens=4) | body)
    assert response.status_code == 200, response.text
    ids = state.engine.requests[-1].prompt_token_ids  # type: ignore[attr-defined]
    return state.text.tokenizer.decode(ids)


def message_of(state: ServerState, **body: Any) -> dict[str, Any]:
    response = ask(state, CHAT, chat() | body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()["choices"][0]["message"]
    return found


@pytest.mark.parametrize(
    ("template", "switch", "end"),
    [
        (SMALL, {}, CLOSED),
        (SMALL, {"enable_thinking": True}, OPEN),
        (SMALL, {"chat_template_kwargs": {"enable_thinking": True}}, OPEN),
        (LARGE, {}, OPEN),
        (LARGE, {"enable_thinking": False}, CLOSED),
        (LARGE, {"reasoning_effort": "none"}, CLOSED),
        (PRESERVING, {}, OPEN),
        (WITH_EFFORT, {}, OPEN),
        (WITH_EFFORT, {"reasoning_effort": "none"}, CLOSED),
        (ALWAYS, {}, OPEN),
    ],
)
def test_the_templates_own_default_holds_unless_a_request_says_otherwise(template: str, switch: Any, end: str):
    assert prompt_of(state_of(template), **switch).endswith(end)


@pytest.mark.parametrize("template", [LARGE, PRESERVING, WITH_EFFORT, ALWAYS])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_begins_inside_the_thinking_that_the_prompt_opened(template: str, stream: bool):
    state = state_of(template, "Hm.\n</think>\n\nHello")
    if stream:
        said = assembled(ask(state, CHAT, chat(stream=True)))[0]
        found = {"content": said["content"], "reasoning_content": said["reasoning_content"]}
    else:
        found = message_of(state)
    assert (found["content"], found["reasoning_content"].strip()) == ("Hello", "Hm.")


@pytest.mark.parametrize("template", [SMALL, LARGE])
def test_and_outside_where_the_prompt_closed_it(template: str):
    found = message_of(state_of(template, "Hello"), enable_thinking=False)
    assert found["content"] == "Hello" and not found.get("reasoning_content")


EFFORTS = {"low": "little", "minimal": "little", "medium": "", "high": "long", "max": "long", "xhigh": "long"}


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("way", ["field", "switch", "responses", "messages"])
def test_efforts_are_what_the_template_knows(effort: str, way: str):
    """A template that knows xhigh, medium and low gets these, whichever API's words a client has."""
    state = state_of(WITH_EFFORT, "Hm.</think>Hello")
    if way == "responses":
        response = ask(state, "/v1/responses", {"input": "hi", "reasoning": {"effort": effort}})
    elif way == "messages":
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "output_config": {"effort": effort}}
        response = ask(state, "/v1/messages", body)
    else:
        field = {"reasoning_effort": effort}
        response = ask(state, CHAT, chat(**(field if way == "field" else {"chat_template_kwargs": field})))
    assert response.status_code == 200, response.text
    asked = state.text.tokenizer.decode(state.engine.requests[-1].prompt_token_ids)  # type: ignore[attr-defined]
    assert f"Think {EFFORTS[effort]}." in asked if EFFORTS[effort] else "<|im_start|>system" not in asked


@pytest.mark.parametrize(
    "body", [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"reasoning_effort": "none"}}], ids=str
)
def test_no_effort_is_no_thinking(body: dict[str, Any]):
    assert prompt_of(state_of(WITH_EFFORT), **body).endswith(CLOSED)


@pytest.mark.parametrize("body", [{"enable_thinking": False}, {"reasoning_effort": "none"}], ids=str)
def test_a_model_that_always_thinks_says_so(body: dict[str, Any]):
    response = ask(state_of(ALWAYS), CHAT, chat(**body))
    assert response.status_code == 400 and "this model always thinks" in response.json()["error"]["message"]


HISTORY = [
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "A", "reasoning_content": "old thoughts"},
    {"role": "user", "content": "2"},
]


@pytest.mark.parametrize(
    ("template", "body", "kept"),
    [
        (LARGE, {}, False),
        (PRESERVING, {}, False),
        (PRESERVING, {"chat_template_kwargs": {"preserve_thinking": True}}, True),
        (WITH_EFFORT, {}, True),
        (WITH_EFFORT, {"chat_template_kwargs": {"preserve_thinking": False}}, False),
    ],
)
@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_old_reasoning_is_kept_where_the_template_keeps_it(template: str, body: Any, kept: bool, key: str):
    history = [{(name != "reasoning_content" and name) or key: text for name, text in one.items()} for one in HISTORY]
    assert ("old thoughts" in prompt_of(state_of(template), messages=history, **body)) == kept


def test_a_switch_that_a_template_does_not_have_is_told():
    response = ask(state_of(LARGE), CHAT, chat(chat_template_kwargs={"preserve_thinking": True}))
    assert "preserve_thinking has no effect" in response.text


def test_the_next_turn_begins_as_the_last_one_ended():
    """With old reasoning kept, a prefix cache finds the whole last turn."""
    state = state_of(WITH_EFFORT, "Hm.\n</think>\n\nHello")
    first = prompt_of(state, max_tokens=99)
    answer = "Hm.\n</think>\n\nHello<|im_end|>\n"
    turn = {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."}
    second = prompt_of(state, messages=[*chat()["messages"], turn, {"role": "user", "content": "2"}])
    assert second.startswith(first + answer)


@pytest.mark.parametrize("template", [SMALL, LARGE, WITH_EFFORT])
def test_calls_are_read_and_come_back_as_they_were(template: str):
    state = state_of(template, f"I look.\n{XML}\n{XML}")
    found = message_of(state, tools=TOOLS, **({} if template == SMALL else {"enable_thinking": False}))
    calls = found["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [ARGUMENTS] * 2
    assert found["content"].strip() == "I look."
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "r"} for call in calls]
    messages = [*chat()["messages"], {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    again = prompt_of(state, messages=messages, tools=TOOLS)
    assert again.count(XML) == 2 and again.count("<tool_response>\nr\n</tool_response>") == 2


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_arguments_that_come_as_text_are_objects_for_the_template(tools: Any):
    call = {"id": "c", "type": "function", "function": {"name": "find", "arguments": json.dumps(ARGUMENTS)}}
    messages = [*chat()["messages"], {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "r"}]  # fmt: skip
    assert XML in prompt_of(state_of(WITH_EFFORT), messages=messages, **({"tools": tools} if tools else {}))


def test_what_a_template_refuses_is_the_callers_mistake():
    response = ask(state_of(WITH_EFFORT), CHAT, {"messages": [{"role": "system", "content": "b"}]})
    assert response.status_code == 400 and "No user query" in response.json()["error"]["message"]


def test_a_late_system_message_is_told_as_the_users():
    messages = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    assert "<|im_start|>user\nb<|im_end|>" in prompt_of(state_of(WITH_EFFORT), messages=messages)
