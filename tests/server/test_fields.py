"""No silent parameters: for each field of a request there is a case in which it changes what the client gets.

The table is checked against the schema, so a new field without a case fails here.
"""

from __future__ import annotations

from typing import Any

import pytest

from fastqwen.server.dialects.body import WITHOUT_EFFECT
from fastqwen.server.dialects.chat_batch import ChatBatchRequest
from fastqwen.server.dialects.classify import ClassifyRequest
from fastqwen.server.dialects.embeddings import CohereEmbedRequest, EmbeddingRequest
from fastqwen.server.dialects.messages import CountRequest, MessagesRequest
from fastqwen.server.dialects.pooling import PoolingRequest
from fastqwen.server.dialects.responses_request import ResponsesRequest
from fastqwen.server.dialects.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from fastqwen.server.dialects.scores import RerankRequest, ScoreRequest
from tests.server.harness import QWEN3, ask, classifying, get, make_state

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
BEGUN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure"}]
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
    "bad_words": (["H"], {}, "Hello"),
    "allowed_token_ids": ([72], {}, "Hello"),
    "truncate_prompt_tokens": (1, {}, "Hello"),
    "logprob_token_ids": ([5], {"logprobs": True}, "Hello"),
    "use_beam_search": (True, {}, "Hello"),
    "length_penalty": (10.0, {"use_beam_search": True, "n": 2}, ""),
    "return_token_ids": (True, {}, "Hello"),
    "return_tokens_as_token_ids": (True, {"logprobs": True}, "Hello"),
    "request_id": ("mine", {}, "Hello"),
    "truncation_side": ("right", {"truncate_prompt_tokens": 1}, "Hello"),
    **{
        name: ({"a": "b"} if name == "metadata" else name in ("store",) or "x", {}, "Hello")
        for name in sorted(WITHOUT_EFFECT)
    },
}
CHAT = {
    **SAMPLING,
    "messages": ([{"role": "user", "content": "other"}], {}, "Hello"),
    "max_completion_tokens": (2, {}, "Hello"),
    "logprobs": (True, {}, "Hello"),
    "top_logprobs": (2, {"logprobs": True}, "Hello"),
    "add_generation_prompt": (False, {}, "Hello"),
    "continue_final_message": (True, {"messages": BEGUN}, "Hello"),
    "chat_template_kwargs": ({"extra": "x"}, {}, "Hello"),
    "tools": ([TOOL], {}, CALL),
    "tool_choice": ("none", {"tools": [TOOL]}, CALL),
    "parallel_tool_calls": (False, {"tools": [TOOL]}, CALL * 2),
    "enable_thinking": (False, {}, "Hello"),
    "reasoning_effort": ("low", {}, "Hello"),
    "thinking_budget": (3, {}, "<think>" + "abc" * 30),
    "thinking_token_budget": (3, {}, "<think>" + "abc" * 30),
    "include_reasoning": (False, {}, "<think>Hm</think>Hello"),
    "loop_recovery": (False, {"max_tokens": 900}, "<think>" + "abc" * 300),
    "echo": (True, {"messages": BEGUN, "continue_final_message": True}, "Hello"),
    "return_prompt_text": (True, {}, "Hello"),
    # Refused: templates of requests are not trusted, and this model's has no place for documents.
    "chat_template": ("x", {}, "Hello"),
    "documents": ([{"text": "x"}], {}, "Hello"),
}
BATCH = {
    **CHAT,
    "messages": ([CHAT["messages"][0]], {}, "Hello"),
    "continue_final_message": (True, {"messages": [BEGUN]}, "Hello"),
    "echo": (True, {"messages": [BEGUN], "continue_final_message": True}, "Hello"),
    # Refused: one answer of each conversation, and no more of it than a choice has a place for.
    "tools": ([TOOL], {}, "Hello"),
    "tool_choice": ("required", {}, "Hello"),
    "parallel_tool_calls": (False, {}, "Hello"),
    "length_penalty": (10.0, {}, "Hello"),
    "stream_options": ({"include_usage": True}, {}, "Hello"),
}
COMPLETIONS = {
    **SAMPLING,
    "logprob_token_ids": ([5], {"logprobs": 1}, "Hello"),
    "prompt": ("other", {}, "Hello"),
    "suffix": ("after", {}, "Hello"),
    "echo": (True, {}, "Hello"),
    "best_of": (3, {}, "Hello"),
    "logprobs": (2, {}, "Hello"),
    "thinking_token_budget": (3, {}, "<think>" + "abc" * 30),
    "add_special_tokens": (False, {}, "Hello"),
    "return_tokens_as_token_ids": (True, {"logprobs": 1}, "Hello"),
}
MINE = {"input": None, "messages": [{"role": "user", "content": "hi"}]}
POOLED = {
    "input": ("other", {}, ""),
    "messages": ([{"role": "user", "content": "hi"}], {"input": None}, ""),
    "add_generation_prompt": (True, MINE, ""),
    "continue_final_message": (True, {"input": None, "messages": BEGUN}, ""),
    "chat_template": ("x", MINE, ""),
    "chat_template_kwargs": ({"extra": "x"}, MINE, ""),
    "truncate_prompt_tokens": (1, {}, ""),
    "truncation_side": ("right", {"truncate_prompt_tokens": 1}, ""),
    "add_special_tokens": (False, {}, ""),
    "use_activation": (False, {}, ""),
    "priority": (-3, {}, ""),
    "cache_salt": ("x", {}, ""),
    "request_id": ("mine", {}, ""),
    "user": ("x", {}, ""),
}
EMBEDDINGS = {
    **POOLED,
    "encoding_format": ("base64", {}, ""),
    "embed_dtype": ("float16", {"encoding_format": "base64"}, ""),
    "endianness": ("big", {"encoding_format": "base64"}, ""),
    "dimensions": (3, {}, ""),
    "normalize": (False, {}, ""),
}
COHERE_EMBED = {
    "texts": (["other"], {}, ""),
    "inputs": ([{"content": [{"type": "text", "text": "hi"}]}], {"texts": None}, ""),
    "images": (["data:"], {}, ""),
    "input_type": ("search_query", {}, ""),
    "output_dimension": (3, {}, ""),
    "embedding_types": (["base64"], {}, ""),
    "truncate": ("START", {"max_tokens": 1}, ""),
    "max_tokens": (1, {}, ""),
    "priority": (-3, {}, ""),
}
FUNCTION = {"type": "function", **TOOL["function"]}
RESPONSES = {
    "input": ("other", {}, "Hello"),
    "instructions": ("Be brief.", {}, "Hello"),
    "max_output_tokens": (2, {}, "Hello"),
    **{name: SAMPLING[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed", "stop")},
    **{name: SAMPLING[name] for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")},
    "chat_template_kwargs": ({"extra": "x"}, {}, "Hello"),
    "top_logprobs": (2, {}, "Hello"),
    "stream": (True, {}, "Hello"),
    "enable_response_messages": (True, {}, "Hello"),
    "tools": ([FUNCTION], {}, CALL),
    "tool_choice": ("none", {"tools": [FUNCTION]}, CALL),
    "parallel_tool_calls": (False, {"tools": [FUNCTION]}, CALL * 2),
    "reasoning": ({"effort": "low"}, {}, "Hello"),
    "text": ({"format": {"type": "json_object"}}, {}, "Hello"),
    "include": (["reasoning.encrypted_content"], {}, "<think>Hm</think>Hello"),
    "metadata": ({"a": "b"}, {}, "Hello"),
    **dict.fromkeys(("user", "safety_identifier", "service_tier", "prompt_cache_key"), ("x", {}, "Hello")),
    "store": (False, {}, "Hello"),
    "truncation": ("auto", {}, "Hello"),
    # Refused by name, as they need a server with a longer memory.
    **{name: SAMPLING[name] for name in ("logit_bias", "stop_token_ids", "ignore_eos", "include_stop_str_in_output")},
    **{name: SAMPLING[name] for name in ("skip_special_tokens", "structured_outputs", "priority", "cache_salt")},
    "include_reasoning": (False, {}, "<think>Hm</think>Hello"),
    "request_id": ("is-mine", {}, "Hello"),
    "background": (True, {}, "Hello"),
    "previous_input_messages": ([{"role": "user", "content": "a"}], {}, "Hello"),
    "prompt": ({"id": "x"}, {}, "Hello"),
    **dict.fromkeys(("previous_response_id", "conversation"), ("x", {}, "Hello")),
}
CUSTOM = {"name": "add", "input_schema": {"type": "object", "properties": {}}}
COUNTED = {
    "messages": ([{"role": "user", "content": "another"}], {}, "Hello"),
    "system": ("Be brief.", {}, "Hello"),
    "tools": ([CUSTOM], {}, CALL),
    "tool_choice": ({"type": "none"}, {"tools": [CUSTOM]}, CALL),
    "thinking": ({"type": "disabled"}, {}, "Hello"),
    "output_config": ({"effort": "low"}, {}, "Hello"),
    "chat_template_kwargs": ({"extra": "x"}, {}, "Hello"),
}
MESSAGES = {
    **COUNTED,
    "max_tokens": (2, {}, "Hello"),
    "stream": (True, {}, "Hello"),
    "stop_sequences": (["l"], {}, "Hello"),
    "temperature": (0.5, {}, "Hello"),
    "top_p": (0.5, {}, "Hello"),
    "top_k": (3, {}, "Hello"),
    "metadata": ({"user_id": "b"}, {}, "Hello"),
    "service_tier": ("auto", {}, "Hello"),
    "cache_salt": ("x", {}, "Hello"),
    "output_format": ({"type": "json_schema", "schema": {"type": "object"}}, {}, "Hello"),
}
TOKENIZE = {
    "prompt": ("other", {}, ""),
    "messages": ([{"role": "user", "content": "hi"}], {"prompt": None}, ""),
    "tools": ([TOOL], {"prompt": None, "messages": [{"role": "user", "content": "hi"}]}, ""),
    "add_generation_prompt": (False, {"prompt": None, "messages": [{"role": "user", "content": "hi"}]}, ""),
    "continue_final_message": (True, {"prompt": None, "messages": BEGUN}, ""),
    "chat_template_kwargs": ({"extra": "x"}, {"prompt": None, "messages": [{"role": "user", "content": "hi"}]}, ""),
    "add_special_tokens": (False, {}, ""),
    "chat_template": ("x", {}, ""),
    "return_token_strs": (True, {}, ""),
}
SCORES = {
    "instruction": ("Judge.", {}, ""),
    "chat_template_kwargs": ({"extra": "x"}, {}, ""),
    "truncate_prompt_tokens": (3, {}, ""),
    "truncation_side": ("right", {"truncate_prompt_tokens": 1}, ""),
    "max_tokens_per_query": (1, {}, ""),
    "max_tokens_per_doc": (1, {}, ""),
    "use_activation": (False, {}, ""),
    "request_id": ("mine", {}, ""),
    "priority": (-3, {}, ""),
    "cache_salt": ("x", {}, ""),
    "user": ("x", {}, ""),
}
SCORE = {**SCORES, "text_1": ("other", {}, ""), "text_2": (["other"], {}, "")}
RERANK = {
    **SCORES,
    "query": ("other", {}, ""),
    "documents": (["other"], {}, ""),
    "top_n": (1, {}, ""),
    "return_documents": (False, {}, ""),
}
USER = [{"role": "user", "content": "hi"}]
# The only value that is accepted is what happens anyhow.
ONE_VALUE = {
    **{route: {"cache_control"} for route in ("/v1/messages", "/v1/messages/count_tokens")},
    **{route: {"padding"} for route in ("/v1/embeddings", "/classify", "/pooling")},
}
ROUTES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "/v1/chat/completions": (ChatRequest, CHAT, {"messages": USER, "max_tokens": 60}),
    "/v1/chat/completions/batch": (ChatBatchRequest, BATCH, {"messages": [USER, USER], "max_tokens": 60}),
    "/v1/completions": (CompletionRequest, COMPLETIONS, {"prompt": "hi", "max_tokens": 60}),
    "/v1/embeddings": (EmbeddingRequest, EMBEDDINGS, {"input": "hi"}),
    "/classify": (ClassifyRequest, POOLED, {"input": "hi"}),
    "/pooling": (PoolingRequest, {**EMBEDDINGS, "task": ("classify", {}, "")}, {"input": "hi"}),
    "/v2/embed": (CohereEmbedRequest, COHERE_EMBED, {"texts": ["hi"]}),
    "/v1/score": (ScoreRequest, SCORE, {"text_1": "hi", "text_2": ["you", "them"]}),
    "/v1/rerank": (RerankRequest, RERANK, {"query": "hi", "documents": ["you", "them"]}),
    "/v1/responses": (ResponsesRequest, RESPONSES, {"input": "hi"}),
    "/v1/messages": (MessagesRequest, MESSAGES, {"messages": USER, "max_tokens": 60}),
    "/v1/messages/count_tokens": (CountRequest, COUNTED, {"messages": USER}),
    "/tokenize": (TokenizeRequest, TOKENIZE, {"prompt": "hi"}),
    "/detokenize": (DetokenizeRequest, {"tokens": ([70], {}, "")}, {"tokens": [71]}),
}
CASES = [(route, name) for route, (_, table, _) in ROUTES.items() for name in table]


def test_every_route_that_reads_a_body_is_here():
    paths = get(make_state(), "/openapi.json").json()["paths"]
    assert {path for path, verbs in paths.items() if "requestBody" in verbs.get("post", {})} == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_each_field_has_a_case(route: str):
    schema, table, _ = ROUTES[route]
    assert set(table) | {"model"} | ONE_VALUE.get(route, set()) == set(schema.model_fields)


def outcome(route: str, body: dict[str, Any], said: str) -> Any:
    """What the client gets, without names drawn for each answer, and what was asked of the engine and the tokenizer."""

    def script(prompt: str, seed: int) -> str:
        return "A" if "Considering" in prompt else said

    state = make_state(script, template=SWITCH)
    if route == "/classify":
        classifying(state)
    asked: list[Any] = []
    run = state.workers.run

    async def noted(job: Any) -> list[int]:
        asked.append(job)
        return await run(job)

    state.workers.run = noted
    response = ask(state, route, body)
    engine = [
        (one.prompt_token_ids, one.sampling, one.stop_token_ids, one.max_tokens, one.priority, one.cache_salt, one.grammar,
         one.pooling, one.seed if "seed" in body else 0)
        for one in state.engine.requests
    ]  # fmt: skip
    if response.headers["content-type"].startswith("text/event-stream"):
        return "stream", response.text.count("usage"), engine
    if response.status_code == 400:
        return "refused", response.json()["error"]["param"]
    assert response.status_code == 200, response.text
    return unnamed(response.json()), engine, asked


def unnamed(value: Any) -> Any:
    if isinstance(value, dict):
        drawn = ("id", "created", "created_at", "call_id")
        return {key: unnamed(item) for key, item in value.items() if key not in drawn or str(item).endswith("-mine")}
    return [unnamed(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("route", "name"), CASES)
def test_each_field_has_an_effect(route: str, name: str):
    _, table, base = ROUTES[route]
    value, rest, said = table[name]
    body = {key: item for key, item in {**base, **rest}.items() if item is not None}
    if name == "max_completion_tokens" or (name == "max_tokens" and route != "/v1/messages"):
        body.pop("max_tokens", None)
    if name in ("messages", "inputs") and base.keys() & rest.keys():  # in the place of what the others have
        without: Any = ("refused", "prompt")
    else:
        without = outcome(route, body, said)
        assert without[0] != "refused"
    found = outcome(route, {**body, name: value}, said)
    assert found != without
    assert found[0] != "refused" or found[1] == name, "a field that is refused is named"


def test_a_name_decides_only_where_names_are_strict():
    body = {"prompt": "hi", "model": "other"}
    assert ask(make_state(), "/v1/completions", body).status_code == 200
    refused = ask(make_state(strict_model_name=True), "/v1/completions", body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_field_is_told_or_where_fields_are_strict_refused_by_name(route: str):
    body = {**ROUTES[route][2], "no_such_field": 1}
    state = classifying() if route == "/classify" else make_state()
    assert "no_such_field" in ask(state, route, body).json()["warnings"][0]
    refused = ask(make_state(strict_fields=True), route, body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "no_such_field")


def test_suffix_is_refused_by_a_model_that_cannot_fill_gaps():
    state = make_state()
    del state.text.tokenizer.control_tokens["<|fim_prefix|>"]
    assert ask(state, "/v1/completions", {"prompt": "a", "suffix": "b"}).json()["error"]["param"] == "suffix"


def test_suffix_is_put_where_the_model_expects_it():
    state = make_state()
    ask(state, "/v1/completions", {"prompt": "a", "suffix": "b"})
    tokens = state.text.tokenizer.control_tokens
    wanted = [tokens["<|fim_prefix|>"], ord("a"), tokens["<|fim_suffix|>"], ord("b"), tokens["<|fim_middle|>"]]
    assert state.engine.requests[0].prompt_token_ids == wanted
