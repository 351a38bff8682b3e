"""/v1/messages and /v1/responses: the same chat in other words."""

from __future__ import annotations

import json

import pytest

from tests.server.harness import ask, get, make_state

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
TEXT = f"<think>Hm</think>I add. {CALL}"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
USER = [{"role": "user", "content": "hi"}]


def says(text: str):
    return lambda prompt, seed: text


def events(response) -> list[dict]:
    assert response.status_code == 200, response.text
    found = []
    for block in response.text.split("\n\n"):
        if block:
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert found[-1]["type"] == name.removeprefix("event: ")
    return found


def input_tokens(usage: dict[str, int]) -> int:
    return usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]


@pytest.mark.parametrize("caching", [True, False])
def test_messages_tell_what_was_read_from_the_cache_and_what_was_written(caching: bool):
    state = make_state(engine={"enable_prefix_caching": caching})
    body = {"messages": [{"role": "user", "content": "a" * 100}], "max_tokens": 5, "stream": True}
    for read in (False, True):
        found = events(ask(state, "/v1/messages", body))
        begun, usage = found[0]["message"]["usage"], found[-2]["usage"]
        assert begun["input_tokens"] == input_tokens(begun) == input_tokens(usage) > 100
        whole = begun["input_tokens"] // 16 * 16 if caching else 0
        kinds = (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"])
        assert kinds == ((whole, 0) if read else (0, whole))


def test_messages_has_blocks_for_thinking_text_and_tools():
    body = {
        "messages": USER,
        "max_tokens": 500,
        "tools": [{"name": "add", "input_schema": SCHEMA}],
        "system": "Be brief.",
    }
    answer = ask(make_state(says(TEXT)), "/v1/messages", body).json()
    assert [block["type"] for block in answer["content"]] == ["thinking", "text", "tool_use"]
    assert answer["content"][2]["input"] == {"a": 1}
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"]["output_tokens"] == len(TEXT) + 1


def test_messages_streamed_equals_whole():
    body = {"messages": USER, "max_tokens": 500, "tools": [{"name": "add", "input_schema": SCHEMA}]}
    whole = ask(make_state(says(TEXT)), "/v1/messages", body).json()
    blocks: list[dict] = []
    for event in events(ask(make_state(says(TEXT)), "/v1/messages", {**body, "stream": True})):
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            for key, target in (("thinking", "thinking"), ("text", "text"), ("partial_json", "json")):
                if key in delta:
                    blocks[event["index"]][target] += delta[key]
        elif event["type"] == "message_delta":
            assert event["delta"]["stop_reason"] == whole["stop_reason"]
    assert [block.get("thinking") or block.get("text") or json.loads(block["json"]) for block in blocks] == [
        block.get("thinking") or block.get("text") or block["input"] for block in whole["content"]
    ]


def test_messages_takes_a_tools_result_and_names_a_stop_sequence():
    messages = [
        *USER,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "2"}]},
    ]
    body = {"messages": messages, "max_tokens": 50, "stop_sequences": ["!"]}
    answer = ask(make_state(says("two! more")), "/v1/messages", body).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "!")
    assert answer["content"] == [{"type": "text", "text": "two"}]


def test_count_tokens_counts_what_messages_would_use():
    state = make_state()
    body = {"messages": USER, "system": "x"}
    counted = ask(state, "/v1/messages/count_tokens", body).json()["input_tokens"]
    assert input_tokens(ask(make_state(), "/v1/messages", {**body, "max_tokens": 5}).json()["usage"]) == counted
    assert state.engine.requests == []


@pytest.mark.parametrize("block", [{"type": "image"}, {"type": "text"}])
def test_messages_refuses_in_anthropics_shape(block: dict):
    body = {"messages": [{"role": "user", "content": [block]}], "max_tokens": 5}
    response = ask(make_state(), "/v1/messages", body)
    assert response.status_code == 400
    assert response.json()["type"] == "error"


def test_responses_has_items_for_reasoning_message_and_calls():
    body = {"input": "hi", "tools": [{"type": "function", "name": "add", "parameters": SCHEMA}], "instructions": "x"}
    answer = ask(make_state(says(TEXT)), "/v1/responses", body).json()
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message", "function_call"]
    assert answer["status"] == "completed"
    assert answer["output"][1]["content"][0]["text"] == "I add."
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_responses_streamed_ends_with_the_whole_response():
    body = {"input": "hi", "tools": [{"type": "function", "name": "add", "parameters": SCHEMA}], "stream": True}
    found = events(ask(make_state(says(TEXT)), "/v1/responses", body))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[0]["type"] == "response.created"
    assert found[-1]["type"] == "response.completed"
    text = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    assert text == found[-1]["response"]["output"][1]["content"][0]["text"] == "I add."


def test_responses_takes_a_whole_round_of_items():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "1+1"}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
    ]
    answer = ask(make_state(says("two")), "/v1/responses", {"input": items, "max_output_tokens": 2}).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


@pytest.mark.parametrize(
    "field",
    [{"previous_response_id": "x"}, {"background": True}, {"conversation": "x"}],
)
def test_responses_refuses_what_needs_a_memory(field: dict):
    response = ask(make_state(), "/v1/responses", {"input": "hi", **field})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(field))


def test_an_answer_is_given_once_more_while_it_is_kept():
    state = make_state()
    whole = ask(state, "/v1/responses", {"input": "hi"}).json()
    assert get(state, f"/v1/responses/{whole['id']}").json() == whole
    [streamed] = events(ask(state, "/v1/responses", {"input": "hi", "stream": True}))[-1:]
    assert get(state, f"/v1/responses/{streamed['response']['id']}").json() == streamed["response"]
    cancelled = ask(state, f"/v1/responses/{whole['id']}/cancel", {})
    assert cancelled.status_code == 400 and "Cannot cancel a synchronous" in cancelled.text
    forgotten = ask(state, "/v1/responses", {"input": "hi", "store": False}).json()["id"]
    for path in (f"/v1/responses/{forgotten}", "/v1/responses/resp_no"):
        refused = get(state, path)
        assert refused.status_code == 404 and "not found" in refused.json()["error"]["message"]


def test_what_went_in_and_came_out_is_told_as_tokens_where_it_is_asked_for():
    body = {"input": "hi", "enable_response_messages": True}
    whole = ask(make_state(says("Hello.")), "/v1/responses", body).json()
    [put], [said] = whole["input_messages"], whole["output_messages"]
    assert put["type"] == said["type"] == "raw_message_tokens"
    assert "<|im_start|>userhi" in put["message"] and len(put["tokens"]) == whole["usage"]["input_tokens"]
    assert said["message"].startswith("Hello.") and len(said["tokens"]) == whole["usage"]["output_tokens"]
    assert "input_messages" not in ask(make_state(), "/v1/responses", {"input": "hi"}).json()
