"""POST /v1/embeddings, and /v2/embed in Cohere's shape (https://docs.cohere.com/reference/embed)"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fastqwen.errors import BadRequest
from fastqwen.records import ALL
from fastqwen.server.answer.state import ServerState
from fastqwen.server.dialects.body import Body, Priority, Whole
from fastqwen.server.dialects.openai import noted
from fastqwen.server.dialects.pooling import MAX_INPUTS, Pooled, VectorFields, listing
from fastqwen.text.task_prompts import kind_of

TO_SIGNED = 128


class EmbeddingRequest(VectorFields):
    """Token ids are used as they are; texts are closed as the tokenizer's post-processor says."""


async def embed(state: ServerState, body: EmbeddingRequest) -> dict[str, Any]:
    work = Pooled(state, body, "embd", "embed")
    await work.prepare()
    data = [
        {"object": "embedding", "index": index, "embedding": body.written(numbers)}
        for index, numbers in enumerate(await work.run())
    ]
    return listing(work, data)


class CohereContent(Body):
    type: str
    text: str | None = None


class CohereInput(Body):
    content: list[CohereContent]


class CohereEmbedRequest(Body):
    model: str | None = None
    input_type: str | None = None
    texts: Annotated[list[str], Field(max_length=MAX_INPUTS)] | None = None
    images: list[str] | None = None
    inputs: Annotated[list[CohereInput], Field(max_length=MAX_INPUTS)] | None = None
    output_dimension: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    embedding_types: list[Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]] | None = None
    truncate: Literal["NONE", "START", "END"] = "END"
    max_tokens: Annotated[Whole, Field(ge=1, lt=2**31)] | None = None
    priority: Priority = 0


async def cohere_embed(state: ServerState, body: CohereEmbedRequest) -> dict[str, Any]:
    """Every text in each of the asked types."""
    texts, types = _texts(body), body.embedding_types or ["float"]
    _check_types([*types], body.output_dimension or state.facts().model.hidden_size)
    prefix = _task_prompt(state, body)
    cut = None if body.truncate == "NONE" else body.max_tokens or ALL
    fields = VectorFields(
        model=body.model,
        input=[prefix + text for text in texts],
        truncate_prompt_tokens=cut,
        truncation_side="left" if body.truncate == "START" else "right",
        priority=body.priority,
        dimensions=body.output_dimension,
    )
    work = Pooled(state, fields, "embd", "embed")
    await work.prepare()
    vectors = await work.run()
    return {
        "id": work.id,
        "embeddings": {kind: [_typed(vector, kind) for vector in vectors] for kind in types},
        "texts": texts,
        "meta": {
            "api_version": {"version": "2"},
            "billed_units": {"input_tokens": work.num_prompt_tokens, "image_tokens": 0},
        },
        "response_type": "embeddings_by_type",
        **noted(state, body.warnings),
    }


def _task_prompt(state: ServerState, body: CohereEmbedRequest) -> str:
    """What the model's makers put before texts of this kind. Raises BadRequest for a kind that they do not know."""
    if body.input_type is None:
        return ""
    prompts = state.text.task_prompts
    if not prompts:
        body.warnings.tell(
            "input_type has no effect: this model comes with no prompts for kinds of texts; write its instruction into the text"
        )
        return ""
    kind = kind_of(prompts, body.input_type)
    if kind is None:
        raise BadRequest(
            f"input_type is {body.input_type[:60]!r}, but this model knows {', '.join(sorted(prompts))}", "input_type"
        )
    return prompts[kind]


def _check_types(types: list[str], dimensions: int) -> None:
    """Raises BadRequest."""
    for kind in types:
        if kind in ("int8", "uint8"):
            wrong = "needs a model's own scales: ask for float, base64, binary or ubinary"
        elif kind in ("binary", "ubinary") and dimensions % 8:
            wrong = f"needs a multiple of 8 dimensions, not {dimensions}"
        else:
            continue
        raise BadRequest(f"embedding_types: {kind} {wrong}", "embedding_types")


def _texts(body: CohereEmbedRequest) -> list[str]:
    """Raises BadRequest."""
    if body.images:
        raise BadRequest("images: this model reads text only", "images")
    given = [name for name in ("texts", "inputs") if getattr(body, name)]
    if len(given) != 1:
        raise BadRequest("give exactly one of texts and inputs, and at least one text in it", "texts")
    if any(part.type != "text" for one in body.inputs or [] for part in one.content):
        raise BadRequest("inputs: this model reads text only", "inputs")
    if body.texts:
        return body.texts
    return ["".join(part.text or "" for part in one.content) for one in body.inputs or []]


def _typed(vector: NDArray[Any], kind: str) -> Any:
    """Bits of signs, the first one the highest of a byte; or all of a number."""
    if kind == "float":
        return vector.tolist()
    if kind == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    bits = np.packbits(vector >= 0).astype(int)
    packed: list[int] = (bits - TO_SIGNED if kind == "binary" else bits).tolist()
    return packed
