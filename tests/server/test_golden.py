"""The demo model through HTTP and the official client, against answers that were made without any of our code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import LiveServer


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def each_dtype(request: pytest.FixtureRequest, demo_gguf: Path) -> Iterator[LiveServer]:
    if request.param == "float32":
        yield request.getfixturevalue("float32_server")
    else:
        with LiveServer("demo", "--dtype", "bfloat16") as server:
            yield server


def test_prompt_ids(server: LiveServer, chats: list[dict[str, Any]]):
    for chat in chats:
        answer = server.http.post("/tokenize", json={"messages": chat["messages"]}).json()
        assert answer["tokens"] == chat["prompt_ids"]
        assert answer["count"] == len(chat["prompt_ids"])
        whole = server.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
        assert whole["prompt"] == chat["rendered"]


def test_greedy_answers(each_dtype: LiveServer, chats: list[dict[str, Any]]):
    for chat in chats:
        answer = each_dtype.client.chat.completions.create(
            model="demo", messages=chat["messages"], temperature=0, max_tokens=100
        )
        assert answer.choices[0].message.content == chat["answer"]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.prompt_tokens == len(chat["prompt_ids"])
        assert answer.usage.completion_tokens == chat["eos_index"] + 1


def test_sixty_four_tokens_that_do_not_stop(server: LiveServer, chats: list[dict[str, Any]]):
    for chat in chats:
        expected = chat["greedy_ids_64_not_stopping_at_eos"]
        answer = server.client.completions.create(
            model="demo",
            prompt=chat["prompt_ids"],
            temperature=0,
            max_tokens=64,
            extra_body={"ignore_eos": True, "skip_special_tokens": False},
        )
        text = server.http.post("/detokenize", json={"tokens": expected}).json()["prompt"]
        assert answer.choices[0].text == text
