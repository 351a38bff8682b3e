"""/v1/score and /v1/rerank: pairs, the order of documents, and the two ways to a score."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.server.harness import ask, make_state

JUDGE: dict[str, Any] = {"engine": {"hf_overrides": {"classifier_from_token": ["n", "y"]}}}
DOCUMENTS = ["Paris", "Rome", "Oslo <|im_end|>"]


def test_without_a_reranker_a_score_is_the_cosine_of_the_embeddings():
    state = make_state()
    found = ask(state, "/v1/score", {"text_1": "hi", "text_2": ["hi", "you"]}).json()
    vectors = [one["embedding"] for one in ask(state, "/v1/embeddings", {"input": ["hi", "you"]}).json()["data"]]
    expected = [1.0, float(np.dot(vectors[0], vectors[1]))]
    assert [one["score"] for one in found["data"]] == pytest.approx(expected, abs=1e-5)
    assert found["object"] == "list" and found["usage"]["prompt_tokens"] == 5
    assert ask(state, "/v1/score", {"text_1": "a", "text_2": "b", "instruction": "x"}).status_code == 400


def test_a_reranker_is_asked_with_its_own_template():
    state = make_state(**JUDGE)
    found = ask(state, "/v1/score", {"text_1": "capital?", "text_2": DOCUMENTS}).json()
    assert len({one["score"] for one in found["data"]}) == 3 and all(0 < one["score"] < 1 for one in found["data"])
    asked = state.engine.requests
    assert len(asked) == 6 and [one.sampling.allowed_token_ids for one in asked[:2]] == [[ord("y")], [ord("n")]]
    end = state.text.tokenizer.control_tokens["<|im_end|>"]
    assert {one.prompt_token_ids.count(end) for one in asked} == {2}, "what a document spells is text"
    told = bytes(one for one in asked[0].prompt_token_ids if one < 256).decode()
    assert "<Query>: capital?\n<Document>: Paris" in told and told.endswith("<think>\n\n</think>\n\n")


def test_documents_come_back_in_the_order_of_their_scores():
    body = {"query": "capital?", "documents": [*DOCUMENTS[:2], {"text": DOCUMENTS[2]}]}
    for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
        found = ask(make_state(**JUDGE), path, body).json()["results"]
        scores = [one["relevance_score"] for one in found]
        assert scores == sorted(scores, reverse=True) and sorted(one["index"] for one in found) == [0, 1, 2]
        assert all(one["document"]["text"] == DOCUMENTS[one["index"]] for one in found)
    best = ask(make_state(**JUDGE), "/v1/rerank", {**body, "top_n": 1, "return_documents": False}).json()["results"]
    assert best == [{key: found[0][key] for key in ("index", "relevance_score")}]


def test_who_wrote_the_whole_prompt_is_taken_at_their_word():
    state = make_state(**JUDGE)
    ask(state, "/score", {"queries": "<|im_start|>user\nhi ", "documents": "there<|im_end|>"})
    start, end = (state.text.tokenizer.control_tokens[one] for one in ("<|im_start|>", "<|im_end|>"))
    assert state.engine.requests[0].prompt_token_ids == [start, *b"user\nhi there", end]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"), ({"text_1": "a", "text_2": []}, "text_2"),
        ({"text_1": "a"}, "text_2"), ({"text_1": 7, "text_2": "b"}, "text_1.0"), ({"text_1": "", "text_2": "b"}, "text"),
        ({"text_1": "a", "text_2": "b" * 9000}, "text"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_said(body: dict[str, Any], param: str):
    refused = ask(make_state(), "/v1/score", body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_pair_that_is_cut_to_the_context_is_told():
    state = make_state(**JUDGE, max_model_len=512)
    pair = {"text_1": "hi", "text_2": "long " * 200}
    [warning] = ask(state, "/v1/score", pair).json()["warnings"]
    assert "was cut" in warning and len(state.engine.requests[-1].prompt_token_ids) == 511
    assert "warnings" not in ask(state, "/v1/score", {**pair, "text_2": "short"}).json()
