"""What clients and agents send as they are: fields, kinds, forms of HTTP; and errors that they can read."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx

from fastqwen.terminal.conformance.server import PROMPT, Missing, Server, demand, message_of
from fastqwen.terminal.conformance.tools import TOOL


def errors_in_shape(server: Server) -> str:
    bodies: list[dict[str, Any]] = [{"messages": []}, {"messages": PROMPT, "temperature": -1}, {"max_tokens": "x"}]
    for body in bodies:
        response = server.post(**body)
        demand(400 <= response.status_code < 500, f"{body} was answered with {response.status_code}")
        error = response.json().get("error")
        demand(isinstance(error, dict) and bool(error.get("message")), "errors have no error.message")
    return "400 with a message"


def no_silent_fields(server: Server) -> str:
    """A field that means nothing must be refused or answered with a warning, or a typing error is never noticed."""
    response = server.post(messages=PROMPT, max_tokens=2, max_tokenz=5)
    if response.status_code == 200 and not response.json().get("warnings"):
        raise Missing("an unknown field is ignored without a word")
    demand(response.status_code < 500, f"an unknown field was answered with {response.status_code}")
    return str(response.status_code)


def nulls_and_defaults(server: Server) -> str:
    """What SDKs send for fields that nobody set."""
    cases: list[dict[str, Any]] = [
        {"stream": None, "tools": None, "stop": None, "seed": None},
        {"modalities": ["text"], "n": 1, "presence_penalty": 0, "logit_bias": {}, "stop": []},
        {"max_tokens": 4.0, "top_p": 1},
    ]
    for fields in cases:
        response = server.post(**{"messages": PROMPT, "max_tokens": 4, **fields})
        demand(
            response.status_code == 200, f"{fields} was answered with {response.status_code}: {message_of(response)}"
        )
    return "null and default values"


def open_vocabulary(server: Server) -> str:
    """One field, tool or key that a server does not know should not refuse everything that an agent asks."""
    hosted = {"type": "web_search"}
    cases: list[dict[str, Any]] = [
        {"verbosity": "low"},
        {"tools": [TOOL, hosted]},
        {"messages": [{**PROMPT[0], "id": 5}]},
    ]
    for fields in cases:
        response = server.post(**{"messages": PROMPT, "max_tokens": 4, **fields})
        if response.status_code in (400, 422):
            raise Missing(f"{next(iter(fields))}: {message_of(response)}")
        demand(response.status_code == 200, f"{fields} was answered with {response.status_code}")
    return "unknown fields, tools and keys"


def agents_first_request(server: Server) -> str:
    """The forms in which Claude Code and Codex begin, on the routes that they use."""
    marked = {"cache_control": {"type": "ephemeral"}}
    claude = {
        "max_tokens": 4, "system": [{"type": "text", "text": "Be brief.", **marked}], "thinking": {"type": "adaptive"},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi", **marked}]},
                     {"role": "system", "content": "It is May."}],
        "tools": [{"name": "f", "input_schema": {"type": "object"}, "eager_input_streaming": True}],
        "context_management": {"edits": []}, "output_config": {"effort": "high"}, "metadata": {"user_id": "u"},
    }  # fmt: skip
    codex = {
        "input": [{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
                  {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False},
                  {"type": "namespace", "name": "n", "tools": []}, {"type": "web_search"}],
        "store": False, "include": ["reasoning.encrypted_content"], "client_metadata": {"a": "b"}, "max_output_tokens": 16,
    }  # fmt: skip
    for path, body in (("/v1/messages?beta=true", claude), ("/v1/responses", codex)):
        response = server.post(path, **body)
        if response.status_code != 200:
            raise Missing(f"{path} was answered with {response.status_code}: {message_of(response)}")
    return "/v1/messages and /v1/responses"


def http_forms(server: Server) -> str:
    head = server.http.head("/v1/models").status_code
    demand(head == 200, f"HEAD /v1/models was answered with {head}")
    slash = server.http.get("/v1/models/", follow_redirects=True)
    demand(slash.status_code == 404 or slash.json().get("object") == "list", "/v1/models/ is not the list of models")
    return "HEAD, trailing slash"


def compressed_body(server: Server) -> str:
    body = gzip.compress(json.dumps({"model": server.model, "messages": PROMPT, "max_tokens": 4}).encode())
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    response = server.http.post("/v1/chat/completions", content=body, headers=headers)
    if response.status_code in (400, 415, 422):
        raise Missing(f"a body in gzip was answered with {response.status_code}")
    demand(response.status_code == 200, f"a body in gzip was answered with {response.status_code}")
    return "gzip"


def preflight(server: Server) -> str:
    """A browser asks without a key whether it may send one, and names the headers that it would send."""
    asked = "authorization,content-type,x-stainless-os"
    headers = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": asked,
    }
    response = httpx.options(server.http.base_url.join("/v1/chat/completions"), headers=headers)
    if "access-control-allow-origin" not in response.headers:
        raise Missing("pages of other origins may not ask")
    allowed = response.headers.get("access-control-allow-headers", "").lower()
    missing = [one for one in asked.split(",") if one not in allowed and "*" not in allowed]
    demand(response.status_code in (200, 204) and not missing, f"{response.status_code}, not allowed: {missing}")
    return "allowed"
