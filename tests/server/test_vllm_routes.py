"""Routes that only vLLM has: several chats in one request, and one route for all."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.harness import ask, chat, classifying, make_state

BATCH = "/v1/chat/completions/batch"


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_each_conversation_of_a_batch_has_an_answer_in_its_place():
    def script(prompt: str, seed: int) -> str:
        return "one" if "first" in prompt else "two!"

    state = make_state(script)
    body = {"messages": [user("first"), user("second")], "return_token_ids": True, "logprobs": True, "user": "me"}
    found = ask(state, BATCH, body).json()
    assert [(one["index"], one["message"]["content"]) for one in found["choices"]] == [(0, "one"), (1, "two!")]
    alone = [ask(make_state(script), "/v1/chat/completions", {"messages": user(text)}) for text in ("first", "second")]
    usages = [one.json()["usage"] for one in alone]
    for name in ("prompt_tokens", "completion_tokens"):
        assert found["usage"][name] == sum(one[name] for one in usages)
    assert [
        b"first" in bytes(one for one in choice["prompt_token_ids"] if one < 256) for choice in found["choices"]
    ] == [
        True,
        False,
    ]
    assert found["object"] == "chat.completion" and found["warnings"] == ["user has no effect on this server"]


def test_a_form_holds_for_all_conversations_of_a_batch():
    body = {"messages": [user("a"), user("b")], "structured_outputs": {"choice": ["yes"]}, "enable_thinking": False}
    assert [one["message"]["content"] for one in ask(make_state(), BATCH, body).json()["choices"]] == ["yes", "yes"]


def test_nothing_of_a_batch_runs_where_one_conversation_is_wrong():
    state = make_state(max_model_len=64)
    refused = ask(state, BATCH, {"messages": [user("a"), user("x" * 100)]})
    assert refused.status_code == 400 and "conversation 1:" in refused.json()["error"]["message"]
    assert not state.engine.requests


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 2},
        {"stream": True},
        {"use_beam_search": True},
        {"tools": [{"type": "function", "function": {"name": "a"}}]},
        {"messages": user("a")},
        {"messages": []},
        {"messages": [[]]},
    ],
    ids=str,
)
def test_what_a_batch_cannot_have_is_named(wrong: dict[str, Any]):
    refused = ask(make_state(), BATCH, {"messages": [user("a")], **wrong})
    assert (refused.status_code, refused.json()["error"]["param"].split(".")[0]) == (400, next(iter(wrong)))


def test_a_large_batch_is_read_in_a_text_worker():
    listed = [user("x" * 900) for _ in range(50)]
    found = ask(make_state(max_model_len=1024), BATCH, {"messages": listed, "max_tokens": 1})
    assert found.status_code == 200, "each conversation fits, and it is none's business how many there are"
    assert len(found.json()["choices"]) == 50


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (chat(), "chat.completion"),
        ({"prompt": "hi"}, "text_completion"),
        ({"input": "hi"}, "embedding"),
        ({"text_1": "a", "text_2": ["b"]}, "score"),
        ({"queries": "a", "documents": ["b"]}, "score"),
    ],
    ids=str,
)
def test_a_body_says_what_is_asked_of_the_one_route(body: dict[str, Any], kind: str):
    found = ask(make_state(), "/invocations", body)
    assert found.status_code == 200, found.text
    told = found.json()
    assert kind in (told["object"], *(one.get("object") for one in told.get("data", [])))


def test_other_bodies_and_models_of_the_one_route():
    assert "results" in ask(make_state(), "/invocations", {"query": "a", "documents": ["b"]}).json()
    assert "embeddings" in ask(make_state(), "/invocations", {"texts": ["a"]}).json()
    assert "probs" in ask(classifying(), "/invocations", {"input": "a"}).json()["data"][0]
    streamed = ask(make_state(), "/invocations", {**chat(), "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    for body in ({}, {"model": "x"}):
        assert "messages, input" in ask(make_state(), "/invocations", body).json()["error"]["message"]
