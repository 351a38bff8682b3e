"""docs/from_vllm.md says what the tables say, and the tables know what vLLM's requests hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastqwen.server.dialects.body import CHANGES_THE_ANSWER
from fastqwen.server.dialects.classify import ClassifyRequest
from fastqwen.server.dialects.embeddings import CohereEmbedRequest, EmbeddingRequest
from fastqwen.server.dialects.messages import CountRequest, MessagesRequest
from fastqwen.server.dialects.pooling import PoolingRequest
from fastqwen.server.dialects.responses_request import ResponsesRequest
from fastqwen.server.dialects.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from fastqwen.server.dialects.scores import RerankRequest, ScoreRequest
from tests.server.harness import ask, classifying, make_state
from tests.server.live import ROOT, environment

USER = [{"role": "user", "content": "hi"}]
# Of each kind of request: where it goes, the least that it holds, and what reads it.
REQUESTS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "chat": ("/v1/chat/completions", {"messages": USER}, ChatRequest),
    "completion": ("/v1/completions", {"prompt": "hi"}, CompletionRequest),
    "responses": ("/v1/responses", {"input": "hi"}, ResponsesRequest),
    "messages": ("/v1/messages", {"messages": USER, "max_tokens": 4}, MessagesRequest),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": USER}, CountRequest),
    "embedding": ("/v1/embeddings", {"input": "hi"}, EmbeddingRequest),
    "classify": ("/classify", {"input": "hi"}, ClassifyRequest),
    "pooling": ("/pooling", {"input": "hi"}, PoolingRequest),
    "score": ("/v1/score", {"text_1": "a", "text_2": "b"}, ScoreRequest),
    "rerank": ("/v1/rerank", {"query": "a", "documents": ["b"]}, RerankRequest),
    "cohere_embed": ("/v2/embed", {"texts": ["hi"]}, CohereEmbedRequest),
    "tokenize": ("/tokenize", {"prompt": "hi"}, TokenizeRequest),
    "detokenize": ("/detokenize", {"tokens": [97]}, DetokenizeRequest),
}


def _fields() -> dict[str, list[str]]:
    """fields.txt holds those of vLLM's requests, and says where they were read."""
    found: dict[str, list[str]] = {}
    for word in " ".join((Path(__file__).parent / "fields.txt").read_text().splitlines()[2:]).split():
        if word.endswith(":"):
            listed = found.setdefault(word.removesuffix(":"), [])
        else:
            listed.append(word)
    return found


FIELDS = _fields()


def test_the_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/from_vllm.py", "--check"], cwd=ROOT, env=environment(), timeout=120, check=False
    )
    assert done.returncode == 0, "run python scripts/from_vllm.py"


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_acts_or_is_refused_or_told(name: str):
    path, body, kind = REQUESTS[name]
    known = set(kind.model_fields)
    for field in FIELDS[name]:
        said, marked = field.removesuffix("*"), field.endswith("*")
        if said in known or said in CHANGES_THE_ANSWER:
            assert not marked, f"{said} acts or is refused"
            continue
        assert marked, f"{said} of vLLM's is not known here"
        make = classifying if name == "classify" else make_state
        assert ask(make(), path, {**body, said: None}).json().get("warnings") is None
        found = ask(make(), path, {**body, said: {"a": 1}})
        assert found.status_code == 200 and any(said in one for one in found.json()["warnings"])
