"""A conversation's two possible partners: a model in this process, or a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from typing import Any, Protocol

from fastqwen.client.remote import RemoteServer

Messages = list[dict[str, Any]]
POLL_S = 0.5
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


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
        self._server = RemoteServer(url, api_key)
        self.name = self._server.model
        self._wait_until_loaded()

    def _wait_until_loaded(self) -> None:
        waited = False
        while (share := self._server.loading_share()) is not None:
            waited = True
            print(f"\r{self.name} is loading: {share:.0%} ", end="", file=sys.stderr, flush=True)
            time.sleep(POLL_S)
        if waited:
            print("\r\x1b[K" if sys.stderr.isatty() else "", end="\n", file=sys.stderr)

    def answer(self, messages: Messages, options: dict[str, Any]) -> Generator[str, None, None]:
        """Thoughts that the server sends apart are shown dimly on a terminal; they are no part of the answer."""
        thinking = False

        def show(thought: str) -> None:
            nonlocal thinking
            if sys.stderr.isatty():
                print(thought if thinking else f"{DIM}{thought}", end="", file=sys.stderr, flush=True)
                thinking = True

        try:
            for piece in self._server.chat(messages, options, on_thought=show):
                if thinking:
                    print(f"{PLAIN}\n", file=sys.stderr, flush=True)
                    thinking = False
                yield piece
        finally:
            if thinking:
                print(PLAIN, file=sys.stderr, flush=True)

    def count_tokens(self, messages: Messages) -> tuple[int, int]:
        return self._server.count_tokens(messages), self._server.max_model_len or 0
