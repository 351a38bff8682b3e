"""A large body, read in a text worker, is the same request as a small one that is read at once; what nobody reads is gone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastqwen.errors import BadRequest
from fastqwen.server.dialects.body import Body, parse, parse_checked
from fastqwen.server.dialects.checking import CHECKS, check
from fastqwen.server.dialects.embeddings import EmbeddingRequest
from fastqwen.server.dialects.messages import MessagesRequest
from fastqwen.server.dialects.responses_request import ResponsesRequest
from fastqwen.server.dialects.schema import ChatRequest, CompletionRequest
from fastqwen.server.dialects.scores import RerankRequest, ScoreRequest
from fastqwen.text.worker import Check
from tests.server.harness import ask, make_state

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function", "id": "1", "function": {"name": "f", "arguments": '{"a": [1, {"b": 2}]}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": 1e300}, "odd": 1}}
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
BODIES: list[tuple[type[Body], Any]] = [
    (ChatRequest, {"messages": [USER], "zzz": 1, "stream_options": {"include_usage": True, "odd": [1]}, "user": "me"}),
    (
        ChatRequest,
        {"messages": [{**USER, "name": "x", "odd": {"deep": [None, 1.5]}}], "max_tokens": 64.0, "stop": None},
    ),
    (ChatRequest, {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]}),
    (ChatRequest, {"messages": [USER], "tools": [{"type": "web_search", "odd": 1}], "tool_choice": "none"}),
    (
        ChatRequest,
        {"messages": [USER], "tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": [TOOL]},
    ),
    (
        ChatRequest,
        {
            "messages": [USER],
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [10**400]}}},
        },
    ),
    (ChatRequest, {"messages": [USER], "structured_outputs": {"json": {"maximum": 10**20}}, "logit_bias": {"5": 1}}),
    (ChatRequest, '{"messages":[{"role":"user","content":"a\\ud83d b \\ude00"}],"metadata":{"x":1e400}}'),
    (ChatRequest, "\ufeff" + json.dumps({"messages": [{"role": "user", "content": ["ä", {"text": "😀"}, URL]}, USER]})),
    (CompletionRequest, {"prompt": [[1, 2.0], [3]], "seed": 2**63, "echo": True, "suffix": None}),
    (EmbeddingRequest, {"input": ["a", "ü"], "dimensions": 8.0, "odd": None}),
    (ScoreRequest, {"text_1": "a", "data_2": ["b", "c"]}),
    (RerankRequest, {"query": "a", "documents": ["b", {"text": "c"}], "return_documents": True}),
    (MessagesRequest, {"model": "m", "max_tokens": 3, "messages": [USER], "system": [{"type": "text", "text": "a"}]}),
    (ResponsesRequest, {"input": [USER, {"type": "function_call_output", "call_id": "1", "output": "x"}], "text": {}}),
]


def read(kind: type[Body], body: Any, *, strict: bool = False, max_chars: int = 10_000) -> Body:
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    found = check(Check(f"{kind.__module__}:{kind.__name__}", strict, max_chars), data)
    return parse_checked(kind, data if found.body is None else found.body, found.warnings, strict_fields=strict)


def known(value: Any) -> Any:
    """Without what is not known, but where a template may look at it."""
    if isinstance(value, Body):
        return {name: known(getattr(value, name)) for name in type(value).model_fields}
    return [known(one) for one in value] if isinstance(value, list) else value


def known_set(body: Body) -> set[str]:
    """What was given; the responses' look around touches ``store``."""
    return body.model_fields_set & type(body).model_fields.keys() - {"store"}


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_a_body_that_a_worker_read_is_the_same_request(number: int):
    kind, body = BODIES[number]
    at_once = parse(kind, (body if isinstance(body, str) else json.dumps(body)).encode())
    found = read(kind, body)
    assert known(found) == known(at_once)
    assert known_set(found) == known_set(at_once)
    assert found.warnings.listed == at_once.warnings.listed


def test_what_no_one_reads_does_not_come_back():
    sent = json.dumps({"prompt": "a", "zzz": "x" * 10**6, "stream_options": {"y" * 10**6: 1}}).encode()
    found = check(Check(f"{CompletionRequest.__module__}:CompletionRequest", False, 100), sent)
    assert found.body is not None and len(found.body) < 100
    assert [warning.split()[0] for warning in found.warnings] == ["zzz", "stream_options." + "y" * (200 - 15)]


def test_strict_fields_are_refused_by_name_and_later_ones_as_well():
    with pytest.raises(BadRequest, match="unknown field 'zzz'"):
        read(CompletionRequest, {"prompt": "a", "zzz": 1}, strict=True)
    with pytest.raises(BadRequest, match="unknown field 'later'"):
        read(CompletionRequest, {"prompt": "a"}, strict=True).warnings.unknown("later")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 101}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": ["x" * 101]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "x" * 101}}]}]}, "messages"),
    ],
)
def test_a_text_that_cannot_fit_into_a_prompt_is_refused_where_it_is_read(body: Any, place: str):
    with pytest.raises(BadRequest, match="the prompt has 101 characters") as caught:
        read(ChatRequest, body, max_chars=100)
    assert caught.value.param == place and caught.value.code == "context_length_exceeded"


def test_what_stands_beside_the_texts_of_a_conversation_has_a_limit_as_well():
    for more in ({"odd": "x" * 401}, {"x" * 401: 1}, {"odd": ["x" * 90] * 5}):
        with pytest.raises(BadRequest, match="more than 400 cannot fit"):
            read(ChatRequest, {"messages": [{**USER, **more}]}, max_chars=100)
    assert read(ChatRequest, {"messages": [{**USER, "odd": "x" * 350, "audio": {"data": "x" * 900}}]}, max_chars=100)


def test_pictures_and_grammars_are_no_prompt():
    picture = {"role": "user", "content": [URL, {"type": "text", "text": "what is it?"}]}
    body = {"messages": [picture, USER], "guided_regex": "a" * 5000, "user": "b" * 5000}
    assert read(ChatRequest, body, max_chars=100).warnings.listed


def test_every_route_reads_large_bodies_so():
    padding = "x" * 50_000
    for path, body in {
        "/v1/chat/completions": {"messages": [USER]},
        "/v1/completions": {"prompt": "a"},
        "/v1/messages": {"model": "m", "max_tokens": 2, "messages": [USER]},
        "/v1/responses": {"input": "a"},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [65]},
    }.items():
        answer = ask(make_state(), path, {**body, "padding": padding})
        assert answer.status_code == 200, (path, answer.text)
        assert ask(make_state(), path, {**body, "padding": padding}).json().keys() == answer.json().keys()
    assert CHECKS.endswith("checking")
