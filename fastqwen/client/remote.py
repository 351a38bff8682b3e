"""An OpenAI-compatible server as a conversation's other side."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import httpx
import msgspec

from fastqwen.client.history import Messages
from fastqwen.errors import BadRequest, FastqwenError
from fastqwen.names import server_address
from fastqwen.text.answer import Parts

CONNECT_WITHIN_S = 10.0
ANSWER_WITHIN_S = 600.0


def is_address(model: str) -> bool:
    """Whether a user's word for a model is the address of a server that has it."""
    return server_address(model) is not None


class RemotePartner:
    """Raises BadRequest for what the server refuses, FastqwenError where it does not answer."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = (server_address(url) or url).rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None)  # as many chats at once as the caller has threads
        timeout = httpx.Timeout(CONNECT_WITHIN_S, read=ANSWER_WITHIN_S)
        try:
            self.http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, limits=limits)
        except httpx.InvalidURL as error:
            raise FastqwenError(f"{url} is not an address: {error}") from None
        try:
            models = self._json("GET", "/v1/models", None)["data"]
            model = models[0]
            self.name = str(model["id"])
            self.names = [str(one["id"]) for one in models]
        except (KeyError, IndexError, TypeError):
            raise FastqwenError(f"the server at {self.url} lists no model: is it an OpenAI-compatible one?") from None
        self.thinks: bool | None = model.get("thinks")
        self.max_model_len: int | None = model.get("max_model_len")
        self.generation_config: dict[str, Any] = {}

    def loading_share(self) -> float | None:
        """How much of the model is loaded while it cannot answer; None once it can, or where the server does not tell."""
        try:
            response = self.http.get("/health/ready")
            body = response.json() if response.status_code == 503 else {}
        except (httpx.HTTPError, ValueError):
            return None
        return float(body.get("progress") or 0) if body.get("status") in ("loading", "restarting") else None

    def answer(
        self, messages: Messages, options: dict[str, Any], template_options: dict[str, Any] | None = None
    ) -> Generator[Parts, None, None]:
        body = {"model": self.name, "messages": messages, "stream": True, **options, **_for_template(template_options)}
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise _error_of(response)
                for line in response.iter_lines():
                    for delta in deltas_of_line(line):
                        parts = Parts(delta.reasoning_content or delta.reasoning or "", delta.content or "")
                        if parts:
                            yield parts
        except httpx.HTTPError as error:
            raise self._silent(error) from None

    def count_tokens(
        self, messages: Messages, template_options: dict[str, Any] | None = None, *, add_generation_prompt: bool = True
    ) -> int:
        body = {"messages": messages, "add_generation_prompt": add_generation_prompt, **_for_template(template_options)}
        return int(self._json("POST", "/tokenize", body)["count"])

    def whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of an API's route, not streamed."""
        found: dict[str, Any] = self._json("POST", path, {"model": self.name, **body})
        return found

    def text_of(self, token_ids: list[int]) -> str:
        return str(self._json("POST", "/detokenize", {"tokens": token_ids})["prompt"])

    def close(self) -> None:
        self.http.close()

    def _json(self, method: str, path: str, body: Any) -> Any:
        try:
            response = self.http.request(method, path, json=body)
        except httpx.HTTPError as error:
            raise self._silent(error) from None
        if response.status_code != 200:
            raise _error_of(response)
        try:
            return response.json()
        except ValueError:
            raise FastqwenError(f"the server at {self.url} answers {path} with something else than JSON") from None

    def _silent(self, error: Exception) -> FastqwenError:
        return FastqwenError(f"the server at {self.url} does not answer: {error or type(error).__name__}")


def _for_template(options: dict[str, Any] | None) -> dict[str, Any]:
    return {"chat_template_kwargs": options} if options else {}


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: Delta | None = None


class _Chunk(msgspec.Struct):
    """The part of a chunk that is read here; other servers leave out or add what they like."""

    choices: list[_Choice] | None = None
    error: Any = None


_read_chunk = msgspec.json.Decoder(_Chunk).decode


def deltas_of_line(line: str) -> Iterator[Delta]:
    """What one line of a stream adds to the answer. Raises FastqwenError for an error event, and for what is no chunk."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    try:
        chunk = _read_chunk(line[6:])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise FastqwenError(f"the server sent an event that is no chat chunk: {error}") from None
    if chunk.error is not None:
        told = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
        raise FastqwenError(str(told))
    for choice in chunk.choices or ():
        if choice.delta is not None:
            yield choice.delta


def _error_of(response: httpx.Response) -> FastqwenError:
    try:
        error = response.json()["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        return FastqwenError(f"the server answered {response.status_code}")
    if response.status_code in (400, 413, 422):
        return BadRequest(message, error.get("param"), error.get("code"))
    return FastqwenError(message)
