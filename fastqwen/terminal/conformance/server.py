"""A server to be checked, and what a check may say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from fastqwen.client.remote import RemotePartner

TIMEOUT_S = 120.0
PROMPT = [{"role": "user", "content": "Count from one to ten in words, separated by commas."}]


class Broken(Exception):
    """The server does not keep this promise; the text says how."""


class Missing(Exception):
    """The server refuses clearly, which is no fault but less than others offer."""


@dataclass(frozen=True)
class Result:
    name: str
    status: str  # ok, broken or missing
    detail: str


class Server:
    def __init__(self, url: str, api_key: str | None) -> None:
        partner = RemotePartner(url, api_key or "none")
        self.model, self.http = partner.name, partner.http
        self.http.timeout = TIMEOUT_S

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json={"model": self.model, **body})

    def chat(self, **more: Any) -> dict[str, Any]:
        """The first choice. Raises Missing where the server refuses, Broken for anything else but 200."""
        response = self.post(**{"messages": PROMPT, "temperature": 0, "max_tokens": 40, **more})
        if response.status_code in (400, 404, 422, 501):
            raise Missing(message_of(response))
        if response.status_code != 200:
            raise Broken(f"status {response.status_code}: {message_of(response)}")
        choice: dict[str, Any] = response.json()["choices"][0]
        return {**choice, "usage": response.json().get("usage")}

    def said(self, **more: Any) -> str:
        return self.chat(**more)["message"].get("content") or ""

    def streamed(self, **more: Any) -> str:
        chunks = self.stream(**more)
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])

    def stream(self, **more: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must end with [DONE]."""
        body = {"model": self.model, "messages": PROMPT, "temperature": 0, "max_tokens": 40, "stream": True, **more}
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise Missing(message_of(response))
            data = [line[5:].strip() for line in response.iter_lines() if line.startswith("data:")]
        if not data or data[-1] != "[DONE]":
            raise Broken("the stream does not end with [DONE]")
        return [json.loads(one) for one in data[:-1]]


def message_of(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Broken(otherwise)
