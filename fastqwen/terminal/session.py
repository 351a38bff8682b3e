"""A conversation's two possible partners: a model in this process, or a server."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from typing import Any, Protocol

from fastqwen.errors import FastqwenError

Messages = list[dict[str, Any]]


class Partner(Protocol):
    name: str

    def answer(self, messages: Messages, options: dict[str, Any]) -> Generator[str, None, None]:
        """Pieces of text. Closing the iterator stops the work. Raises FastqwenError."""

    def count_tokens(self, messages: Messages) -> tuple[int, int]:
        """Tokens of the conversation, and how many the model can hold."""


class LocalModel:
    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        from fastqwen.llm import LLM

        self.name = model
        self._llm = LLM(model, **engine)

    def answer(self, messages: Messages, options: dict[str, Any]) -> Generator[str, None, None]:
        import msgspec

        params = self._llm.get_default_sampling_params()
        params = msgspec.structs.replace(params, **{"max_tokens": None, **options})
        yield from self._llm.stream_chat(messages, params)

    def count_tokens(self, messages: Messages) -> tuple[int, int]:
        return len(self._llm.chat_token_ids(messages)), self._llm.limits.max_model_len


class RemoteModel:
    """Any OpenAI-compatible server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        import httpx

        base = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10.0, read=600.0))
        self._url = base
        models = self._get("/v1/models")["data"]
        self.name = models[0]["id"]
        self._max_model_len = models[0].get("max_model_len") or 0

    def answer(self, messages: Messages, options: dict[str, Any]) -> Generator[str, None, None]:
        import httpx

        body = {"model": self.name, "messages": messages, "stream": True, **options}
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise FastqwenError(_message_of(response))
                for line in response.iter_lines():
                    yield from _text_of(line)
        except httpx.HTTPError as error:
            raise FastqwenError(f"the server at {self._url} does not answer: {error}") from None

    def count_tokens(self, messages: Messages) -> tuple[int, int]:
        found = self._post("/tokenize", {"messages": messages})
        return found["count"], found.get("max_model_len") or self._max_model_len

    def _get(self, path: str) -> Any:
        return self._json("GET", path, None)

    def _post(self, path: str, body: Any) -> Any:
        return self._json("POST", path, body)

    def _json(self, method: str, path: str, body: Any) -> Any:
        import httpx

        try:
            response = self._client.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise FastqwenError(f"the server at {self._url} does not answer: {error}") from None
        if response.status_code != 200:
            raise FastqwenError(_message_of(response))
        return response.json()


def _text_of(line: str) -> Iterator[str]:
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    value = json.loads(line[6:])
    if "error" in value:
        raise FastqwenError(value["error"]["message"])
    for choice in value.get("choices", []):
        text = choice.get("delta", {}).get("content")
        if text:
            yield text


def _message_of(response: Any) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"the server answered {response.status_code}"
