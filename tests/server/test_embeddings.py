"""/v1/embeddings: OpenAI's shape, its limits, and what its client reads from a real engine in a process of its own."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from tests.models.embedding import END, make_embedder, reference
from tests.server.harness import VOCAB, ask, client_of, get, make_state
from tests.server.live import LiveServer

EMBEDDINGS = "/v1/embeddings"


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def test_the_shape_that_openai_gives():
    body = ask(make_state(), EMBEDDINGS, {"model": "mock", "input": ["abc", "de"]}).json()
    assert (body["object"], body["model"]) == ("list", "mock")
    assert [one["object"] for one in body["data"]] == ["embedding", "embedding"]
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 0}}
    assert "warnings" not in body
    assert all(math.isclose(np.linalg.norm(one["embedding"]), 1, rel_tol=1e-6) for one in body["data"])


def test_texts_and_token_ids_in_every_form_are_the_same():
    state = make_state()
    both = vectors(ask(state, EMBEDDINGS, {"input": ["ab", "c"]}))
    assert vectors(ask(state, EMBEDDINGS, {"input": "ab"})) == both[:1]
    assert vectors(ask(state, EMBEDDINGS, {"input": [97, 98]})) == both[:1]
    assert vectors(ask(state, EMBEDDINGS, {"input": [[97, 98], [99]]})) == both


def test_base64_is_the_same_numbers():
    [text] = vectors(ask(make_state(), EMBEDDINGS, {"input": "ab", "encoding_format": "base64"}))
    [floats] = vectors(ask(make_state(), EMBEDDINGS, {"input": "ab"}))
    assert np.frombuffer(base64.b64decode(text), dtype="<f4").tolist() == floats


def test_fewer_dimensions():
    [whole] = vectors(ask(make_state(), EMBEDDINGS, {"input": "ab"}))
    [part] = vectors(ask(make_state(), EMBEDDINGS, {"input": "ab", "dimensions": 3}))
    wanted = np.array(whole[:3]) / np.linalg.norm(whole[:3])
    np.testing.assert_allclose(part, wanted, atol=1e-6)


def test_user_is_answered_with_a_warning():
    assert ask(make_state(), EMBEDDINGS, {"input": "a", "user": "me"}).json()["warnings"] == [
        "user has no effect on this server"
    ]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "input", "required"),
        ({"input": ""}, "input", "empty"),
        ({"input": []}, "input", "empty"),
        ({"input": ["a", ""]}, "input.1", "empty"),
        ({"input": [[97], []]}, "input.1", "empty"),
        ({"input": ["a"] * 2049}, "input", "2048"),
        ({"input": [[97]] * 2049}, "input", "2048"),
        ({"input": ["a", 5]}, "input", ""),
        ({"input": {"text": "a"}}, "input", ""),
        ({"input": [VOCAB]}, "input", str(VOCAB)),
        ({"input": [-1]}, "input", "0"),
        ({"input": ["a", "b" * 4097]}, "input.1", "4096"),
        ({"input": [97] * 4097}, "input", "4096"),
        ({"input": "a" * 200_000}, "input", "131072"),
        ({"input": "a", "dimensions": 0}, "dimensions", "1"),
        ({"input": "a", "dimensions": 9}, "dimensions", "8"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "nothing"),
    ],
)
def test_what_cannot_be_is_refused_and_named(body: dict[str, Any], param: str, words: str):
    state = make_state()
    response = ask(state, EMBEDDINGS, body)
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert error["param"].split(".list")[0] == param and words in error["message"]
    assert not state.engine.requests, "nothing reaches the engine"


def test_the_largest_that_is_allowed():
    state = make_state()
    assert len(vectors(ask(state, EMBEDDINGS, {"input": ["a"] * 2048}))) == 2048
    assert len(vectors(ask(state, EMBEDDINGS, {"input": [97] * 4096}))) == 1


def test_a_beginning_in_common_is_counted_as_cached():
    state = make_state()
    ask(state, EMBEDDINGS, {"input": "x" * 40})
    usage = ask(state, EMBEDDINGS, {"input": "x" * 40}).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}
    salted = ask(state, EMBEDDINGS, {"input": "x" * 40, "cache_salt": "y"}).json()["usage"]
    assert salted["prompt_tokens_details"] == {"cached_tokens": 0}


def test_it_counts_in_the_metrics_and_against_the_limit():
    state = make_state(max_concurrent_requests=1)
    state.num_active = 1  # another request is running
    assert ask(state, EMBEDDINGS, {"input": "a"}).status_code == 429
    state = make_state()
    ask(state, EMBEDDINGS, {"input": ["abc", "de"]})
    text = get(state, "/metrics").text
    assert 'vllm:prompt_tokens_total{model_name="mock"} 5.0' in text
    assert 'vllm:request_success_total{finished_reason="stop",model_name="mock"} 2.0' in text


def test_a_dying_engine_is_an_error():
    async def run() -> None:
        state = make_state()
        state.engine.step_delay_s = 30.0
        async with client_of(state) as client:
            asking = asyncio.create_task(client.post(EMBEDDINGS, json={"input": ["a" * 2000] * 9}))
            while not state.engine.requests:
                await asyncio.sleep(0.01)
            state.engine.die()
            response = await asking
            assert response.status_code == 500 and "stopped" in response.json()["error"]["message"]
            assert state.num_active == 0

    asyncio.run(run())


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("embedder")
    return folder, make_embedder(folder, headless=True)


@pytest.fixture(scope="module")
def server(embedder: tuple[Path, Any]) -> Iterator[LiveServer]:
    with LiveServer(str(embedder[0]), "--dtype", "float32", "--served-model-name", "embedder") as found:
        yield found


def test_openais_client_gets_the_vectors_of_transformers(server: LiveServer, embedder: tuple[Path, Any]):
    texts = ["Gravity", "What is the capital of China?" * 9]
    found = server.client.embeddings.create(model="embedder", input=texts)  # asks for base64 and decodes it
    for text, one in zip(texts, found.data, strict=True):
        wanted = reference(embedder[1], [*text.encode(), END])
        torch.testing.assert_close(torch.tensor(one.embedding), wanted, rtol=0, atol=1e-4)
    assert found.usage.prompt_tokens == found.usage.total_tokens == sum(len(text) + 1 for text in texts)
    floats = server.client.embeddings.create(model="embedder", input=texts, encoding_format="float")
    assert [one.embedding for one in floats.data] == [one.embedding for one in found.data]
    short = server.client.embeddings.create(model="embedder", input=texts[0], dimensions=16)
    assert len(short.data[0].embedding) == 16


def test_many_at_once_are_the_same_as_one_by_one(server: LiveServer):
    texts = [chr(97 + index) * (1 + 7 * index) for index in range(20)]

    async def run() -> list[list[float]]:
        client = server.async_client
        alone = [client.embeddings.create(model="embedder", input=text) for text in texts]
        return [one.data[0].embedding for one in await asyncio.gather(*alone)]

    together = server.client.embeddings.create(model="embedder", input=texts)
    assert asyncio.run(run()) == [one.embedding for one in together.data]
    assert server.is_idle()


def test_a_checkpoint_without_a_head_says_so(server: LiveServer):
    with pytest.raises(openai.BadRequestError, match="no output head"):
        server.client.completions.create(model="embedder", prompt="a")


def test_a_batch_file_may_ask_for_vectors(server: LiveServer, tmp_path: Path):
    from fastqwen.terminal import batch

    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": EMBEDDINGS, "body": {"model": "embedder", "input": "Gravity"}}
    source.write_text(json.dumps(line) + "\n")
    assert batch.run(source, output, server.url, {}, concurrency=4, api_key=None) == 0
    assert len(json.loads(output.read_text())["response"]["body"]["data"][0]["embedding"]) == 64
