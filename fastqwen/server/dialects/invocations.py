"""POST /invocations: the one route by which SageMaker asks, whatever it asks; which of the others is meant stands in the body."""

from __future__ import annotations

import msgspec

from fastqwen.errors import BadRequest
from fastqwen.model_config import ModelConfig

# Fields by which a kind of request is known, the first that is there decides.
FIELDS = {
    "prompt": "/v1/completions",
    "query": "/v1/rerank",
    "queries": "/v1/score",
    "text_1": "/v1/score",
    "data_1": "/v1/score",
    "texts": "/v2/embed",
    "inputs": "/v2/embed",
}


def meant(body: bytes | bytearray, model: ModelConfig) -> str:
    """The route's path. Raises BadRequest."""
    try:
        names = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).keys()
    except msgspec.MsgspecError as error:
        raise BadRequest(f"the request body cannot be read: {error}") from None
    pooled = "/classify" if model.classifier is not None else "/v1/embeddings"
    if "messages" in names:
        return "/v1/chat/completions" if model.has_head and model.classifier is None else pooled
    if "input" in names:
        return pooled
    for field, path in FIELDS.items():
        if field in names:
            return path
    raise BadRequest(
        f"the body has none of the fields by which /invocations knows what is asked: messages, input, {', '.join(FIELDS)}"
    )
