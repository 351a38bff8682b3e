"""What clients send beyond what we know: accepted, and said in the answer's warnings; never lost without a word."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastqwen.server.dialects.body import parse
from fastqwen.server.dialects.schema import CompletionRequest
from tests.server.harness import QWEN3, ask, chat, make_state

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
USER = [{"role": "user", "content": "hi"}]
ADD = {"type": "object", "properties": {"a": {"type": "integer"}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
PLAIN = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
ONE_SYSTEM = (
    "{%- for m in messages %}{%- if m.role == 'system' and not loop.first %}{{ raise_exception('System first') }}{%- endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{%- endfor %}"
)


def prompt_of(state: Any) -> str:
    return state.text.tokenizer.decode(state.engine.requests[-1].prompt_token_ids)


def warned(path: str, body: dict[str, Any], **state: Any) -> list[str]:
    response = ask(make_state(**state), path, body)
    assert response.status_code == 200, response.text
    return response.json().get("warnings", [])


@pytest.mark.parametrize(
    ("path", "body", "place"),
    [
        (CHAT, chat(verbosity="low"), "verbosity"),
        (CHAT, chat(reasoning_effort="ultra"), "reasoning_effort"),
        (CHAT, chat(stream_options={"include_obfuscation": True}, stream=False), "stream_options.include_obfuscation"),
        (CHAT, chat(tools=[{"type": "web_search"}]), "tools.0"),
        (CHAT, {"messages": [{"role": "critic", "content": "hm"}]}, "messages.0.role"),
        (CHAT, {"messages": [{**USER[0], "opts": {"a": 1}}]}, "messages.0.opts"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}]}, "mood"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "poem"}, "x"]}]}, "messages.0.content.0"),
        (RESPONSES, {"input": "hi", "client_metadata": {"a": "b"}}, "client_metadata"),
        (RESPONSES, {"input": "hi", "tools": [{"type": "namespace", "name": "n", "tools": []}]}, "tools.0"),
        (RESPONSES, {"input": "hi", "include": ["web_search_call.results"]}, "web_search_call.results"),
        (RESPONSES, {"input": [{"type": "web_search_call", "id": "x"}, *USER]}, "input.0"),
        (MESSAGES, {"messages": USER, "max_tokens": 5, "context_management": {"edits": []}}, "context_management"),
        (MESSAGES, {"messages": USER, "max_tokens": 5, "thinking": {"type": "deep"}}, "thinking.type"),
        (
            MESSAGES,
            {"messages": USER, "max_tokens": 5, "tools": [{"name": "f", "input_schema": {}, "defer_loading": True}]},
            "tools.0.defer_loading",
        ),
        (
            MESSAGES,
            {"messages": USER, "max_tokens": 5, "tools": [{"type": "bash_20250124", "name": "bash"}]},
            "tools.0",
        ),
    ],
)
def test_what_is_not_known_is_accepted_and_said(path: str, body: dict[str, Any], place: str):
    assert any(place in warning for warning in warned(path, body))
    assert ask(make_state(strict_fields=True), path, body).status_code == 400


@pytest.mark.parametrize("name", ["stream", "n", "stop", "tools", "seed", "functions", "audio", "store", "verbosity"])
def test_null_is_not_given(name: str):
    assert warned(CHAT, chat(**{name: None})) == []


@pytest.mark.parametrize(
    "fields", [{"functions": [], "modalities": ["text"]}, {"use_beam_search": False, "bad_words": []}]
)
def test_values_that_mean_nothing_are_accepted(fields: dict[str, Any]):
    assert warned(CHAT, chat(**fields)) == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, chat(functions=[{"name": "f"}]), "functions"),
        (CHAT, chat(audio={"voice": "x"}), "audio"),
        (CHAT, chat(tools=[{"type": "web_search"}], tool_choice="required"), "tool_choice"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "none"}]}, "input"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(path: str, body: dict[str, Any], param: str):
    response = ask(make_state(), path, body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("number", ["3", "3.0", "3e0", "30E-1", "0.3e1"])
def test_a_whole_number_has_any_spelling(number: str):
    body = json.dumps(chat(max_tokens="N")).replace('"N"', number).encode()
    assert ask(make_state(), CHAT, body).json()["usage"]["completion_tokens"] == 3
    ids = b'{"max_tokens": 2, "prompt": [%s, 104.0, 105]}' % number.encode()
    assert ask(make_state(), COMPLETIONS, ids).json()["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"top_p": 0}),
        (CHAT, {"top_p": 1, "temperature": 2, "presence_penalty": -2, "frequency_penalty": 2}),
        (CHAT, {"seed": 9223372036854776000}),
        (CHAT, {"seed": -9223372036854776000}),
        (CHAT, {"logprobs": True, "top_logprobs": 20}),
        (CHAT, {"n": 128, "max_tokens": 1}),
        (COMPLETIONS, {"best_of": 0, "logprobs": 0}),
        (COMPLETIONS, {"max_tokens": 0}),
        (RESPONSES, {"max_output_tokens": 0, "top_logprobs": 0}),
        (MESSAGES, {"max_tokens": 0, "top_k": 0, "temperature": 0}),
    ],
)
def test_documented_ranges_hold_at_their_ends(path: str, fields: dict[str, Any]):
    bases: dict[str, dict[str, Any]] = {
        CHAT: {"messages": USER},
        COMPLETIONS: {"prompt": "hi"},
        RESPONSES: {"input": "hi"},
    }
    assert warned(path, {**bases.get(path, {"messages": USER, "max_tokens": 5}), **fields}) == []


def test_no_tokens_at_all_scores_the_prompt():
    body = {"prompt": "Once", "max_tokens": 0, "echo": True, "logprobs": 1}
    answer = ask(make_state(), COMPLETIONS, body).json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("Once", "length", 0)
    assert choice["logprobs"]["tokens"] == list("Once") and choice["logprobs"]["token_logprobs"][0] is None
    assert ask(make_state(), COMPLETIONS, {**body, "stream": True}).text.count('"text":"Once"') == 1


def test_an_answer_that_the_context_has_no_room_for_is_shortened_and_said():
    [warning] = warned(CHAT, chat(max_tokens=200), max_model_len=208, blocks=64)
    assert "max_tokens was shortened from 200" in warning


def test_system_messages_among_the_turns_reach_every_template():
    body = {
        "system": "one",
        "messages": [*USER, {"role": "system", "content": "two"}, {"role": "user", "content": "three"}],
        "max_tokens": 5,
    }
    state = make_state(template=ONE_SYSTEM)
    answer = ask(state, MESSAGES, body).json()
    assert "system messages" in answer["warnings"][0]
    roles = [part.split("\n")[0] for part in prompt_of(state).split("<|im_start|>")[1:]]
    assert roles == ["system", "user", "user", "user"]
    developers = [{"role": "developer", "content": "one"}, {"role": "developer", "content": "two"}, *USER]
    state = make_state(template=ONE_SYSTEM)
    ask(state, RESPONSES, {"input": developers})
    assert "<|im_start|>system\none\n\ntwo<|im_end|>" in prompt_of(state)


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_an_answers_beginning_is_gone_on_from(path: str):
    state = make_state()
    messages = [*USER, {"role": "assistant", "content": "Sure, "}]
    more = {"continue_final_message": True} if path == CHAT else {}
    assert ask(state, path, {"messages": messages, "max_tokens": 5, **more}).status_code == 200
    assert prompt_of(state).endswith("<|im_start|>assistantSure, ")


def test_going_on_needs_an_assistants_turn():
    for fields in ({}, {"add_generation_prompt": True}):
        response = ask(make_state(), CHAT, chat(continue_final_message=True, **fields))
        assert response.json()["error"]["param"] == "continue_final_message"


def test_a_response_goes_on_from_the_one_before():
    state = make_state(lambda prompt, seed: "first" if "again" not in prompt else "second")
    first = ask(state, RESPONSES, {"input": "hi"}).json()
    second = ask(state, RESPONSES, {"input": "again", "previous_response_id": first["id"]}).json()
    third = ask(state, RESPONSES, {"input": "more", "previous_response_id": second["id"]}).json()
    assert third["previous_response_id"] == second["id"] and first["id"].startswith("resp_")
    turns = [part.strip().removesuffix("<|im_end|>") for part in prompt_of(state).split("<|im_start|>")[1:-1]]
    assert turns == ["userhi", "assistantfirst", "useragain", "assistantsecond", "usermore"]


def test_an_item_is_referred_to_and_store_false_keeps_nothing():
    tools = [{"type": "function", "name": "add", "parameters": ADD}]
    for store, status in ((None, 200), (False, 400)):
        state = make_state(lambda prompt, seed: CALL)
        call = ask(state, RESPONSES, {"input": "hi", "tools": tools, "store": store}).json()["output"][-1]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "r"}
        items = [*USER, {"type": "item_reference", "id": call["id"]}, result]
        assert ask(state, RESPONSES, {"input": items}).status_code == status


def test_effort_and_format_of_the_output_act():
    state = make_state(lambda prompt, seed: '{"a": 1}', template="{{ reasoning_effort }}" + QWEN3)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    config = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    body = {"messages": USER, "max_tokens": 90, "output_config": config, "thinking": {"type": "disabled"}}
    assert json.loads(ask(state, MESSAGES, body).json()["content"][0]["text"]) == {"a": 1}
    assert prompt_of(state).startswith("low")


def test_thinking_that_is_not_shown_can_come_back():
    state = make_state(
        lambda prompt, seed: "<think>Hm</think>yes",
        template=QWEN3 + "{{ messages[1].reasoning_content if messages[1] }}",
    )
    body = {"messages": USER, "max_tokens": 50, "thinking": {"type": "adaptive", "display": "omitted"}}
    thinking, text = ask(state, MESSAGES, body).json()["content"]
    assert (thinking["thinking"], text["text"]) == ("", "yes")
    ask(state, MESSAGES, {**body, "messages": [*USER, {"role": "assistant", "content": [thinking, text]}, *USER]})
    assert prompt_of(state).endswith("Hm")
    held = {"input": "hi", "include": ["reasoning.encrypted_content"], "store": False}
    reasoning = ask(state, RESPONSES, held).json()["output"][0]
    del reasoning["content"]
    ask(state, RESPONSES, {"input": [*USER, reasoning, {"role": "assistant", "content": "yes"}, *USER]})
    assert prompt_of(state).endswith("Hm")


def test_allowed_tools_are_the_only_ones_offered():
    tools = [{"type": "function", "function": {"name": name, "parameters": ADD}} for name in ("add", "sub")]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tools[1]]}}
    state = make_state()
    ask(state, CHAT, chat(tools=tools, tool_choice=choice))
    assert '"sub"' in prompt_of(state) and '"add"' not in prompt_of(state)


def test_warnings_are_logged_once(caplog: pytest.LogCaptureFixture):
    state = make_state()
    for _ in range(3):
        ask(state, CHAT, chat(verbosity="low"))
    assert sum("verbosity has no effect" in record.message for record in caplog.records) == 1


def test_a_form_that_nobody_knows_does_not_stand_in_the_way_of_the_one_that_is_known():
    body = b'{"prompt": "x", "structured_outputs": {"choice": ["yes"], "in_verse": true}}'
    found = parse(CompletionRequest, body)
    forms = found.structured()
    assert forms is not None and forms.choice == ["yes"]
    assert any("structured_outputs.in_verse" in warning for warning in found.warnings.listed)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (r"a\ud83d b", "a\ufffd b"), (r"\ude00", "\ufffd"), (r"\ud83d\ude00 \uD83D", "\U0001f600 \ufffd"),
        (r"\\\ud83d", "\\\ufffd"), (r"\ude00\ud83d\ud83d\ude00", "\ufffd\ufffd\U0001f600"), (r"\\ud83d \ud83d", "\\ud83d \ufffd"),
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_does_not_end_a_conversation(sent: str, told: str):
    body = b'{"messages":[{"role":"user","content":"%b"}],"max_tokens":5,"x":1}' % sent.encode()
    state = make_state()
    for path in (CHAT, "/v1/messages"):
        response = ask(state, path, body)
        assert response.status_code == 200 and "surrogate" in " ".join(response.json()["warnings"])
        assert told in state.text.tokenizer.decode(state.engine.requests[-1].prompt_token_ids)
    assert ask(make_state(), CHAT, b"\xef\xbb\xbf" + json.dumps(chat()).encode()).status_code == 200


def test_a_failed_tool_says_so_and_no_key_of_a_block_is_lost():
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {}, "caller": {"type": "direct"}}
    results = [{"type": "tool_result", "tool_use_id": "a", "content": content, "is_error": True, "mood": "bad"}
               for content in (None, "", "no such file", [{"type": "text", "text": "in a list"}])]  # fmt: skip
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": results},
    ]
    state = make_state()
    response = ask(state, "/v1/messages", {"messages": turns, "max_tokens": 5})
    prompt = state.text.tokenizer.decode(state.engine.requests[-1].prompt_token_ids)
    assert (
        prompt.count("[the tool failed]") == 4 and "failed]\nno such file" in prompt and "failed]\nin a list" in prompt
    )
    warnings = response.json()["warnings"]
    assert [one.split(" ")[0] for one in warnings[:2]] == ["messages.1.content.0.caller", "messages.2.content.0.mood"]
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "namespace": "n", "id": "i"}
    output = {"type": "function_call_output", "call_id": "c", "output": "r", "mood": "bad"}
    found = ask(
        make_state(), "/v1/responses", {"input": [call, output, {"role": "user", "content": "x", "phase": "p"}]}
    )
    named = [one.split(" ")[0] for one in found.json()["warnings"]]
    assert named == ["input.0.namespace", "input.1.mood", "input.2.phase"]


@pytest.mark.parametrize(
    "tool", [{"type": "function", "name": "add", "parameters": ADD}, {"name": "add", "input_schema": ADD}]
)
@pytest.mark.parametrize(
    "choice", ["any", {"type": "required"}, {"type": "function", "name": "add"}, {"function": {"name": "add"}}]
)
def test_tools_and_their_choice_are_read_in_the_spellings_of_other_apis(tool: dict[str, Any], choice: Any):
    state = make_state(template=QWEN3)
    found = ask(state, CHAT, chat(tools=[tool], tool_choice=choice, enable_thinking=False)).json()
    assert "warnings" not in found and state.engine.requests[-1].grammar is not None
    assert '"name": "add"' in prompt_of(state)


@pytest.mark.parametrize("choice", ["none", {"type": "none"}])
def test_no_call_in_either_spelling(choice: Any):
    state = make_state(template=QWEN3)
    ask(
        state,
        RESPONSES,
        {"input": "hi", "tools": [{"type": "function", "function": {"name": "add"}}], "tool_choice": choice},
    )
    assert "add" not in prompt_of(state)


def test_whatever_a_tool_gave_reaches_the_prompt():
    flat = {"id": "c", "type": "function", "name": "add", "arguments": {"a": 1}}
    for content, told in (({"sum": 2}, '{"sum": 2}'), (7, "7"), ([{"type": "text", "text": 7.5}], "7.5")):
        state = make_state(template=QWEN3)
        turns = [*USER, {"role": "assistant", "tool_calls": [flat]}, {"role": "tool", "content": content}]
        assert "warnings" not in ask(state, CHAT, chat(messages=turns)).json()
        assert told in prompt_of(state) and '"name": "add"' in prompt_of(state)


def test_calls_that_came_back_broken_end_no_conversation():
    for calls in ([{"id": "c"}], ["add"], {"0": {"function": {"name": "add"}}}):
        turns = [*USER, {"role": "assistant", "content": "x", "tool_calls": calls}, *USER]
        assert any("messages.1.tool_calls" in one for one in warned(CHAT, chat(messages=turns)))


@pytest.mark.parametrize(
    ("path", "body"),
    [(MESSAGES, {"messages": USER, "max_tokens": 64000}), (RESPONSES, {"input": "hi", "max_output_tokens": 64000})],
)
def test_agents_may_ask_for_more_than_the_context(path: str, body: dict[str, Any]):
    assert any("max_tokens was shortened from 64000" in one for one in warned(path, body))
