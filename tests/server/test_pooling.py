"""/classify, /pooling, /v2/embed and what /v1/embeddings shares with them: shapes, fields, refusals; a head in a process."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from tests.models.classifier import logits_of, make_classifier
from tests.models.embedding import END, make_embedder, reference
from tests.server.harness import ask, classifying, make_state
from tests.server.live import LiveServer

MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}


def numbers(text: str, kind: str = "<f4") -> list[float]:
    found: list[float] = np.frombuffer(base64.b64decode(text), dtype=kind).tolist()
    return found


def posted(server: LiveServer, path: str, body: dict[str, Any]) -> Any:
    response = httpx.post(server.url + path, json=body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_vector_as_the_model_makes_it_and_its_number_types():
    state = make_state()
    [unit] = [one["data"] for one in ask(state, "/pooling", {"input": "ab"}).json()["data"]]
    assert np.linalg.norm(unit) == pytest.approx(1)
    for off in ({"use_activation": False}, {"normalize": False}):
        raw = ask(state, "/v1/embeddings", {"input": "ab", **off}).json()["data"][0]["embedding"]
        assert np.array(raw) / np.linalg.norm(raw) == pytest.approx(np.array(unit), abs=1e-6)
    big = {"input": "ab", "encoding_format": "base64", "endianness": "big", "embed_dtype": "float16"}
    text = ask(state, "/v1/embeddings", big).json()["data"][0]["embedding"]
    assert numbers(text, ">f2") == pytest.approx(unit, abs=1e-3)


def test_a_conversation_is_pooled_as_its_template_writes_it():
    state = make_state()
    found = ask(state, "/v1/embeddings", MESSAGES)
    assert found.status_code == 200 and len(found.json()["data"]) == 1
    told = bytes(one for one in state.engine.requests[-1].prompt_token_ids if one < 256).decode()
    assert "hi" in told and "assistant" not in told, "no answer is begun unless that is asked for"
    ask(state, "/pooling", {**MESSAGES, "add_generation_prompt": True})
    told = bytes(one for one in state.engine.requests[-1].prompt_token_ids if one < 256).decode()
    assert "assistant" in told
    both = ask(state, "/v1/embeddings", {**MESSAGES, "input": "a"})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "input")


def test_either_end_of_a_text_is_cut():
    state = make_state()
    for side, left in (("left", b"cd"), ("right", b"ab"), (None, b"cd")):
        body = {"input": "abcd", "truncate_prompt_tokens": 2, **({} if side is None else {"truncation_side": side})}
        assert ask(state, "/v1/embeddings", body).status_code == 200
        assert state.engine.requests[-1].prompt_token_ids == [*left]


def test_coheres_shape():
    state = make_state()
    types = ["float", "base64", "binary", "ubinary"]
    found = ask(
        state, "/v2/embed", {"texts": ["ab", "c"], "embedding_types": types, "input_type": "search_query"}
    ).json()
    assert found["response_type"] == "embeddings_by_type" and found["texts"] == ["ab", "c"]
    assert found["meta"] == {"api_version": {"version": "2"}, "billed_units": {"input_tokens": 3, "image_tokens": 0}}
    floats = found["embeddings"]["float"]
    assert numbers(found["embeddings"]["base64"][0]) == pytest.approx(floats[0])
    bits = [int("".join("1" if one >= 0 else "0" for one in vector), 2) for vector in floats]
    assert found["embeddings"]["ubinary"] == [[one] for one in bits]
    assert found["embeddings"]["binary"] == [[one - 128] for one in bits]
    [part] = ask(state, "/v2/embed", {"texts": ["ab"], "output_dimension": 3}).json()["embeddings"]["float"]
    assert len(part) == 3 and np.linalg.norm(part) == pytest.approx(1)
    inputs = [{"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    again = ask(state, "/v2/embed", {"inputs": inputs}).json()["embeddings"]["float"][0]
    assert again == pytest.approx(floats[0])
    for truncate, left in (("START", b"cd"), ("END", b"ab")):
        ask(state, "/v2/embed", {"texts": ["abcd"], "truncate": truncate, "max_tokens": 2})
        assert state.engine.requests[-1].prompt_token_ids == [*left]


def test_a_text_of_a_kind_gets_what_the_models_makers_put_before_it():
    """Cohere's names for the two kinds of a search stand for the model's own."""
    state = make_state()
    state.text = replace(state.text, task_prompts={"query": "Q:", "document": "", "other": "O:"})
    for kind, told in (("query", b"Q:ab"), ("search_query", b"Q:ab"), ("search_document", b"ab"), ("other", b"O:ab")):
        found = ask(state, "/v2/embed", {"texts": ["ab"], "input_type": kind}).json()
        assert state.engine.requests[-1].prompt_token_ids == [*told]
        assert found["texts"] == ["ab"] and not found.get("warnings")
    refused = ask(state, "/v2/embed", {"texts": ["ab"], "input_type": "clustering"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input_type")
    assert "document, other, query" in refused.json()["error"]["message"]


def test_each_label_has_a_number():
    state = classifying()
    for path in ("/classify", "/v1/classify"):
        found = ask(state, path, {"input": ["ab", "c"]}).json()
        assert [one["index"] for one in found["data"]] == [0, 1] and found["object"] == "list"
        for one in found["data"]:
            assert sum(one["probs"]) == pytest.approx(1) and one["num_classes"] == 8
            assert one["label"] == f"L{one['probs'].index(max(one['probs']))}"
    assert found["usage"]["prompt_tokens"] == 3
    raw = ask(state, "/classify", {"input": "ab", "use_activation": False}).json()["data"][0]["probs"]
    assert sum(raw) != pytest.approx(1)
    pooled = ask(state, "/pooling", {"input": "ab", "task": "classify", "use_activation": False}).json()["data"][0]
    assert pooled["data"] == raw and pooled["object"] == "pooling"


def test_a_line_for_each_token(monkeypatch: pytest.MonkeyPatch):
    state = make_state()
    found = ask(state, "/pooling", {"input": ["abc", "d"], "task": "token_embed"}).json()
    lines = [one["data"] for one in found["data"]]
    assert [len(one) for one in lines] == [3, 1] and {len(line) for one in lines for line in one} == {8}
    assert [np.linalg.norm(line) for line in lines[0]] == pytest.approx([1, 1, 1])
    last = ask(state, "/pooling", {"input": "abc"}).json()["data"][0]["data"]
    assert lines[0][-1] == pytest.approx(last)
    short = {"input": "abc", "task": "token_embed", "dimensions": 2, "encoding_format": "base64"}
    assert len(numbers(ask(state, "/pooling", short).json()["data"][0]["data"])) == 3 * 2
    [labels] = ask(classifying(), "/pooling", {"input": "ab", "task": "token_classify"}).json()["data"]
    assert [sum(one) for one in labels["data"]] == pytest.approx([1, 1], abs=1e-6)
    monkeypatch.setattr("fastqwen.server.dialects.pooling.MAX_TOKEN_NUMBERS", 24)
    assert ask(state, "/pooling", {"input": "abc", "task": "token_embed"}).status_code == 200
    refused = ask(state, "/pooling", {"input": ["ab", "cd"], "task": "token_embed"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input.1")
    assert ask(state, "/pooling", {**short, "input": ["ab", "cd"]}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/classify", {"input": "a"}, "task"), ("/pooling", {"input": "a", "task": "classify"}, "task"),
        ("/pooling", {"input": "a", "task": "token_classify"}, "task"), ("/pooling", {}, "input"),
        ("/pooling", {"input": "a", "task": "plugin"}, "task"),
        ("/v1/embeddings", {"input": "a", "late_chunking_params": {"chunk_size": 5}}, "late_chunking_params"),
        ("/pooling", {"input": "a", "padding": "max_length"}, "padding"), ("/v2/embed", {}, "texts"),
        ("/v2/embed", {"texts": []}, "texts"), ("/v2/embed", {"images": ["data:"]}, "images"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["int8"]}, "embedding_types"),
        ("/v2/embed", {"texts": ["a"], "embedding_types": ["binary"], "output_dimension": 3}, "embedding_types"),
        ("/v2/embed", {"texts": ["a"], "inputs": [{"content": []}]}, "texts"),
        ("/v2/embed", {"texts": ["a"], "output_dimension": 99}, "dimensions"),
        ("/v1/embeddings", {"input": "a", "chat_template": "x"}, "chat_template"),
    ],
)  # fmt: skip
def test_what_cannot_be_had_is_said(path: str, body: dict[str, Any], param: str):
    refused = ask(make_state(), path, body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat/completions", "/v1/completions", "/v1/score"])
def test_a_classifier_does_nothing_else(path: str):
    body = {"input": "a", **MESSAGES, "prompt": "a", "text_1": "a", "text_2": "b"}
    kept = {"/v1/embeddings": ["input"], "/v1/score": ["text_1", "text_2"], "/v1/completions": ["prompt"]}
    refused = ask(classifying(), path, {name: body[name] for name in kept.get(path, ["messages"])})
    assert (refused.status_code == 400 and "label" in refused.text) or "classif" in refused.text, refused.text


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveServer, Any]]:
    folder = tmp_path_factory.mktemp("judge")
    model = make_classifier(folder, "Qwen2Config", num_labels=1)
    with LiveServer(str(folder), "--dtype", "float32", "--served-model-name", "judge") as server:
        yield server, model


def test_a_head_in_a_process_of_its_own(served: tuple[LiveServer, Any]):
    server, model = served
    [one] = posted(server, "/classify", {"input": "Gravity"})["data"]
    wanted = logits_of(model, [*b"Gravity"])
    assert one["probs"] == pytest.approx(wanted.sigmoid().tolist(), abs=1e-5) and one["label"] == "LABEL_0"
    found = posted(server, "/rerank", {"query": "capital?", "documents": ["Beijing", "Rome"]})["results"]
    for result in found:
        ids = f"capital?{result['document']['text']}".encode()
        assert result["relevance_score"] == pytest.approx(float(logits_of(model, [*ids]).sigmoid()), abs=1e-5)
    raw = posted(server, "/score", {"text_1": "a", "text_2": "b", "use_activation": False})["data"][0]["score"]
    assert raw == pytest.approx(float(logits_of(model, [*b"ab"])), abs=1e-4)


def test_an_instruction_stands_in_front_of_a_query(tmp_path: Path):
    """As Qwen3-Embedding's model card has it: Instruct and Query for queries, documents as they are; fewer dimensions."""
    base = make_embedder(tmp_path, headless=True)
    query = "Instruct: Given a web search query, retrieve passages\nQuery:What is gravity?"
    with LiveServer(str(tmp_path), "--dtype", "float32") as server:
        found = posted(server, "/v1/embeddings", {"input": [query, "A force."], "dimensions": 32})["data"]
        for text, one in zip([query, "A force."], found, strict=True):
            wanted = reference(base, [*text.encode(), END], 32)
            torch.testing.assert_close(torch.tensor(one["embedding"]), wanted, rtol=0, atol=1e-4)
        score = posted(server, "/v1/score", {"text_1": query, "text_2": "A force."})["data"][0]["score"]
        whole = [reference(base, [*text.encode(), END]) for text in (query, "A force.")]
        assert score == pytest.approx(float(whole[0] @ whole[1]), abs=1e-4)


def test_an_operator_says_what_is_pooled_where_a_request_does_not():
    state = make_state(engine={"pooling_task": "token_embed"})
    [each] = ask(state, "/pooling", {"input": "abc"}).json()["data"]
    [whole] = ask(state, "/pooling", {"input": "abc", "task": "embed"}).json()["data"]
    assert len(each["data"]) == 3 and isinstance(each["data"][0], list) and isinstance(whole["data"][0], float)
