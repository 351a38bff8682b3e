"""Log-probabilities by the million, for which a short request is enough: bounded, and spelled beside the event loop."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from fastqwen.client.assemble import Assembler
from fastqwen.records import RequestDelta, SamplingParams, TokenLogprobs
from fastqwen.server.answer import kept
from fastqwen.server.dialects import openai
from tests.server.harness import END, VOCAB, ByteTokenizer, client_of, make_state

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


def test_collections_of_garbage_pass_by_what_is_kept():
    """Each that looks through all of it would hold up every stream: for half a second once there are half a million."""
    assembler = Assembler(0, SamplingParams(logprobs=20), ByteTokenizer(), [END])
    one = TokenLogprobs(97, -0.1, 1, list(range(97, 117)), [-0.1] * 20)
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        assembler.feed(RequestDelta(request_id="x", token_ids=[97], logprobs=[one]))
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert assembler.output.logprobs is not None and len(assembler.output.logprobs[-1]) == 20


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
    for whole in (-1, VOCAB):  # the operator bounds a request no further than all requests
        [[all_of_them], _] = answers(path, body, max_logprobs=whole)
        assert all_of_them.status_code == (200 if limit == "MOST_OF_A_PROMPT" else 400)
