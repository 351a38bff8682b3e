"""Log-probabilities by the million, for which a short request is enough: bounded, and spelled beside the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fastqwen.server.answer import kept
from fastqwen.server.dialects import openai
from tests.server.harness import client_of, make_state

CHAT = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 3, "n": 2, "max_tokens": 20}
TEXT = {"prompt": "hi", "logprobs": 3, "prompt_logprobs": 2, "n": 2, "max_tokens": 20}
ASKED = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]


def answers(path: str, *bodies: dict[str, Any], **options: Any) -> tuple[list[Any], int]:
    """And how many are kept afterwards."""
    state = make_state(**options)

    async def run() -> list[Any]:
        async with client_of(state) as client:
            return [await client.post(path, json=body) for body in bodies]

    return asyncio.run(run()), state.kept.num_kept


@pytest.mark.parametrize(("path", "body"), ASKED)
def test_a_large_answer_is_the_same_as_a_small_one(path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    [[usual], _] = answers(path, body)
    monkeypatch.setattr(kept, "ASIDE_FROM", 1)
    monkeypatch.setattr(openai, "ASIDE_FROM", 1)
    [[aside], left] = answers(path, body)
    assert usual.status_code == 200 and usual.json()["choices"] == aside.json()["choices"] and left == 0
    assert len(usual.json()["choices"]) == 2 and usual.json()["choices"][1]["logprobs"]


@pytest.mark.parametrize(("path", "body"), ASKED)
@pytest.mark.parametrize(("limit", "status"), [("MOST_OF_A_PROMPT", 400), ("MOST_OF_ALL", 429)])
def test_more_than_are_kept_end_the_request(
    path: str, body: dict[str, Any], limit: str, status: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kept, limit, 10)
    [[refused, streamed], left] = answers(path, body, {**body, "stream": True})
    assert refused.status_code == status and "log-probabilities" in refused.json()["error"]["message"]
    assert "log-probabilities" in streamed.text and left == 0
    [[few], _] = answers(path, {**body, "logprobs": None, "top_logprobs": None, "prompt_logprobs": None})
    assert few.status_code == 200, "without them nothing is kept"
    [[all_of_them], _] = answers(
        path, body, max_logprobs=-1
    )  # the operator bounds a request no further than all requests
    assert all_of_them.status_code == (200 if limit == "MOST_OF_A_PROMPT" else 400)
