"""No silent parameters: for each field of a request there is a case in which it changes what the client gets.

The table is checked against the schema, so a new field without a case fails here.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastqwen.server.schema import WITHOUT_EFFECT, ChatRequest, CompletionRequest
from tests.server.harness import QWEN3, ask, make_state

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
SWITCH = QWEN3 + "{{ extra }}{{ reasoning_effort }}"

# Field: (value, the rest of the body, what the model says). The answer with the field must differ from the one without,
# or the engine must have been asked for something else.
SAMPLING: dict[str, tuple[Any, dict[str, Any], str]] = {
    "n": (2, {}, "Hello"),
    "temperature": (0.5, {}, "Hello"),
    "top_p": (0.5, {}, "Hello"),
    "top_k": (3, {}, "Hello"),
    "min_p": (0.1, {}, "Hello"),
    "repetition_penalty": (1.1, {}, "Hello"),
    "presence_penalty": (0.5, {}, "Hello"),
    "frequency_penalty": (0.5, {}, "Hello"),
    "logit_bias": ({"72": -100}, {}, "Hello"),
    "seed": (7, {}, "Hello"),
    "stop": (["l"], {}, "Hello"),
    "stop_token_ids": ([108], {}, "Hello"),
    "include_stop_str_in_output": (True, {"stop": ["l"]}, "Hello"),
    "ignore_eos": (True, {}, "Hello"),
    "min_tokens": (9, {}, "Hello"),
    "max_tokens": (2, {}, "Hello"),
    "skip_special_tokens": (False, {"ignore_eos": True}, "Hello"),
    "prompt_logprobs": (1, {}, "Hello"),
    "priority": (-3, {}, "Hello"),
    "cache_salt": ("x", {}, "Hello"),
    "response_format": ({"type": "json_object"}, {}, "Hello"),
    "structured_outputs": ({"choice": ["yes"]}, {}, "Hello"),
    "guided_json": ({"type": "object"}, {}, "Hello"),
    "guided_regex": ("ab", {}, "Hello"),
    "guided_choice": (["yes"], {}, "Hello"),
    "guided_grammar": ('start: "yes"', {}, "Hello"),
    "stream": (True, {}, "Hello"),
    "stream_options": ({"include_usage": True}, {"stream": True}, "Hello"),
    **{name: ({"a": "b"} if name == "metadata" else name in ("store",) or "x", {}, "Hello") for name in WITHOUT_EFFECT},
}
CHAT = {
    **SAMPLING,
    "messages": ([{"role": "user", "content": "other"}], {}, "Hello"),
    "max_completion_tokens": (2, {}, "Hello"),
    "logprobs": (True, {}, "Hello"),
    "top_logprobs": (2, {"logprobs": True}, "Hello"),
    "add_generation_prompt": (False, {}, "Hello"),
    "chat_template_kwargs": ({"extra": "x"}, {}, "Hello"),
    "tools": ([TOOL], {}, CALL),
    "tool_choice": ("none", {"tools": [TOOL]}, CALL),
    "parallel_tool_calls": (False, {"tools": [TOOL]}, CALL * 2),
    "enable_thinking": (False, {}, "Hello"),
    "reasoning_effort": ("low", {}, "Hello"),
    "thinking_budget": (3, {}, "<think>" + "abc" * 30),
    "loop_recovery": (False, {"max_tokens": 900}, "<think>" + "abc" * 300),
}
COMPLETIONS = {
    **SAMPLING,
    "prompt": ("other", {}, "Hello"),
    "suffix": ("after", {}, "Hello"),
    "echo": (True, {}, "Hello"),
    "best_of": (3, {}, "Hello"),
    "logprobs": (2, {}, "Hello"),
    "add_special_tokens": (False, {}, "Hello"),
}
ROUTES = {
    "/v1/chat/completions": (ChatRequest, CHAT, {"messages": [{"role": "user", "content": "hi"}]}),
    "/v1/completions": (CompletionRequest, COMPLETIONS, {"prompt": "hi"}),
}
CASES = [(route, name) for route, (_, table, _) in ROUTES.items() for name in table]


@pytest.mark.parametrize("route", ROUTES)
def test_each_field_has_a_case(route: str):
    schema, table, _ = ROUTES[route]
    assert set(table) | {"model"} == set(schema.model_fields)


def outcome(route: str, body: dict[str, Any], said: str) -> Any:
    def script(prompt: str, seed: int) -> str:
        return "A" if "Considering" in prompt else said

    state = make_state(script, template=SWITCH)
    asked: list[Any] = []
    run = state.workers.run

    async def noted(job: Any) -> list[int]:
        asked.append(job)
        return await run(job)

    state.workers.run = noted
    response = ask(state, route, body)
    assert response.status_code == 200, response.text
    engine = [
        (one.prompt_token_ids, one.sampling, one.stop_token_ids, one.max_tokens, one.priority, one.cache_salt, one.grammar,
         one.seed if "seed" in body else 0)
        for one in state.engine.speaker.requests
    ]  # fmt: skip
    if response.headers["content-type"].startswith("text/event-stream"):
        return "stream", response.text.count("usage"), engine
    values = response.json()
    for key in ("id", "created"):
        values.pop(key)
    for choice in values["choices"]:
        for call in choice.get("message", {}).get("tool_calls", []):
            call.pop("id")
    return values, engine, asked


@pytest.mark.parametrize(("route", "name"), CASES)
def test_each_field_has_an_effect(route: str, name: str):
    _, table, base = ROUTES[route]
    value, rest, said = table[name]
    body = {"max_tokens": 60, **base, **rest}
    if name in ("max_completion_tokens", "max_tokens"):
        del body["max_tokens"]
    assert outcome(route, {**body, name: value}, said) != outcome(route, body, said)


def test_a_name_decides_only_where_names_are_strict():
    body = {"prompt": "hi", "model": "other"}
    assert ask(make_state(), "/v1/completions", body).status_code == 200
    refused = ask(make_state(strict_model_name=True), "/v1/completions", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_an_unknown_field_is_refused_by_name():
    response = ask(make_state(), "/v1/completions", {"prompt": "hi", "no_such_field": 1})
    assert response.json()["error"]["param"] == "no_such_field"


def test_suffix_is_refused_by_a_model_that_cannot_fill_gaps():
    state = make_state()
    del state.text.tokenizer.control_tokens["<|fim_prefix|>"]
    assert ask(state, "/v1/completions", {"prompt": "a", "suffix": "b"}).json()["error"]["param"] == "suffix"


def test_suffix_is_put_where_the_model_expects_it():
    state = make_state()
    ask(state, "/v1/completions", {"prompt": "a", "suffix": "b"})
    tokens = state.text.tokenizer.control_tokens
    wanted = [tokens["<|fim_prefix|>"], ord("a"), tokens["<|fim_suffix|>"], ord("b"), tokens["<|fim_middle|>"]]
    assert state.engine.speaker.requests[0].prompt_token_ids == wanted
