"""What the OpenAPI document says of answers: every status that a route can give, and the shape of each.

One rule per kind of route, so that a new route is described the day it is added; tests/server/test_openapi.py holds the
server to it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "type": {"const": "error", "description": "On /v1/messages, where Anthropic's clients look for it."},
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field that is wrong."},
                "code": {"type": ["string", "integer", "null"]},
            },
        },
    },
    "additionalProperties": False,
}
EVENT: dict[str, Any] = {
    "type": "object",
    "description": "Of each event. The last one's data is [DONE] on OpenAI's older routes; a failure is an event of its own.",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
EVERYWHERE = {
    "400": "The request is not valid HTTP, or something in it is wrong; error.param names the field.",
    "401": "There are API keys, and the request has none of them.",
    "403": "The Host name is not one that this server answers to, or a page of another site asks.",
    "404": "There is no such route, or no such model.",
    "405": "The route is there, but not for this method.",
    "431": "Too many headers, or too large ones.",
    "500": "A bug, or the engine failed on this request.",
    "503": "The engine is not ready, or the server is shutting down; Retry-After says when to ask again.",
}
WITH_BODY = {
    "408": "The body did not arrive in time (--body-timeout).",
    "413": "The body is larger than --max-body-bytes.",
    "415": "The body's Content-Encoding is not known here; or a page asks, and what it sends is not said to be JSON.",
    "429": "Too many requests are running or waiting; Retry-After says when to ask again.",
}
STREAMING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
ANSWERS: dict[str, dict[str, Any] | None] = {  # what is not a JSON object
    "/metrics": {"text/plain": {"schema": {"type": "string"}}},
    "/health": None,
    "/ping": None,
}


def documented(kind: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI is told of a body that our own parser reads."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """Replace references by what they refer to; request bodies are not recursive."""
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rsplit("/", 1)[1]])
            return {key: resolve(item) for key, item in value.items()}
        return [resolve(item) for item in value] if isinstance(value, list) else value

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def install(app: FastAPI) -> None:
    """Replace FastAPI's document, which knows of no status but 200 and its own 422, which this server does not use."""
    made_by_fastapi = app.openapi
    app.openapi = lambda: _complete(made_by_fastapi())  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> dict[str, Any]:
    # An empty requirement first: a server without keys asks for none.
    security: list[dict[str, list[str]]] = [{}, {"key": []}]
    document["components"] = {
        "schemas": {"Error": ERROR},
        "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["security"] = security
            operation["responses"] = {"200": _success(path), **_failures(path, with_body=method == "post")}
    return document


def _success(path: str) -> dict[str, Any]:
    content = ANSWERS.get(path, {"application/json": {"schema": {"type": "object"}}})
    if path in STREAMING:
        content = {**(content or {}), "text/event-stream": {"schema": EVENT}}
    return {"description": "The answer.", **({} if content is None else {"content": content})}


def _failures(path: str, *, with_body: bool) -> dict[str, Any]:
    said = {**EVERYWHERE, **(WITH_BODY if with_body else {})}
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found = {status: {"description": text, "content": shape} for status, text in sorted(said.items())}
    if path == "/health/ready":
        found["503"] = {**_success(path), "description": "Not now; status and message say why."}
    return found
