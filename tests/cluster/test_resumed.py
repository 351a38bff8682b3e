"""An answer that another engine began has the same tokens and bits as one that was never interrupted."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from fastqwen import LLM
from fastqwen.client.prepare import prepare
from fastqwen.records import EngineRequest, RequestDelta
from tests.test_determinism import engines, requests

EVERY = 3  # of the requests: all kinds of sampling are among them


@pytest.fixture(scope="module", params=["qwen2-yarn", "qwen3"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return engines(request.param, tmp_path_factory.mktemp(request.param))()


def prepared(llm: LLM) -> list[EngineRequest]:
    facts = llm.engine.ready.facts([])
    found: list[EngineRequest] = []
    for index, (ids, params) in enumerate(requests()[::EVERY]):
        found += prepare(f"r{index}", ids, params, facts, seeds=random.Random(0))
    return found


def computed(llm: LLM, asked: list[EngineRequest]) -> dict[str, list[RequestDelta]]:
    found: dict[str, list[RequestDelta]] = {one.request_id: [] for one in asked}
    with llm.engine.stream(asked) as stream:
        for deltas in stream:
            for delta in deltas:
                found[delta.request_id].append(delta)
    return found


def said(deltas: list[RequestDelta]) -> list[tuple[int, Any]]:
    """Tokens with the bits of their log-probabilities."""
    tokens = [token for delta in deltas for token in delta.token_ids]
    return list(zip(tokens, [one for delta in deltas for one in delta.logprobs or []], strict=True))


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_the_rest_is_what_it_would_have_been(llm: LLM, cut: int):
    asked = prepared(llm)
    whole = computed(llm, asked)
    begun = {name: said(deltas)[:cut] for name, deltas in whole.items() if len(said(deltas)) > cut}
    assert len(begun) > len(asked) // 2
    resumed = [
        msgspec.structs.replace(one, said_token_ids=[token for token, _ in begun[one.request_id]])
        for one in asked
        if one.request_id in begun
    ]
    rest = computed(llm, resumed)
    for name, first in begun.items():
        assert first + said(rest[name]) == said(whole[name])
        assert rest[name][-1].finish_reason == whole[name][-1].finish_reason
