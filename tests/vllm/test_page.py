"""docs/from_vllm.md says what the tables say, and the tables know what vLLM's requests hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastqwen.server.dialects.schema import CHANGES_THE_ANSWER, ChatRequest, CompletionRequest, EmbeddingRequest
from tests.server.harness import ask, make_state
from tests.server.live import ROOT, environment

# Fields of vLLM 0.33's requests. Those that are marked have no effect on a text model of one process, which is said.
FIELDS: dict[str, list[str]] = {
    name: (Path(__file__).parent / f"{name}_fields.txt").read_text().split()
    for name in ("chat", "completion", "embedding")
}
SCHEMAS: dict[str, Any] = {"chat": ChatRequest, "completion": CompletionRequest, "embedding": EmbeddingRequest}
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    "completion": ("/v1/completions", {"prompt": "hi"}),
    "embedding": ("/v1/embeddings", {"input": "hi"}),
}


def test_the_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/from_vllm.py", "--check"], cwd=ROOT, env=environment(), timeout=120, check=False
    )
    assert done.returncode == 0, "run python scripts/from_vllm.py"


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_acts_or_is_refused_or_told(name: str):
    known = set(SCHEMAS[name].model_fields)
    path, body = BODIES[name]
    for field in FIELDS[name]:
        said, marked = field.removesuffix("*"), field.endswith("*")
        if said in known or said in CHANGES_THE_ANSWER:
            assert not marked, f"{said} acts or is refused"
            continue
        assert marked, f"{said} of vLLM's is not known here"
        assert ask(make_state(), path, {**body, said: None}).json().get("warnings") is None
        found = ask(make_state(), path, {**body, said: {"a": 1}})
        assert found.status_code == 200 and any(said in one for one in found.json()["warnings"])
