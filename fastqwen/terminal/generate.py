"""``fastqwen generate`` for a running server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

from fastqwen.client.remote import RemotePartner
from fastqwen.errors import FastqwenError

AT_ONCE = 16


def answers_of_server(
    url: str, prompts: list[str], options: dict[str, Any], *, raw: bool, api_key: str | None
) -> Iterator[tuple[str, str | None]]:
    """Text and finish_reason for each prompt, in order, as they come. ``raw`` continues the prompt as it is.

    Raises FastqwenError where the server refuses one or does not answer.
    """
    with closing(RemotePartner(url, api_key)) as server, ThreadPoolExecutor(AT_ONCE) as pool:
        yield from pool.map(lambda prompt: _answer(server, prompt, options, raw=raw), prompts)


def _answer(server: RemotePartner, prompt: str, options: dict[str, Any], *, raw: bool) -> tuple[str, str | None]:
    try:
        if raw:
            choice = server.whole("/v1/completions", {"prompt": prompt, **options})["choices"][0]
            return choice["text"], choice.get("finish_reason")
        messages = [{"role": "user", "content": prompt}]
        choice = server.whole("/v1/chat/completions", {"messages": messages, **options})["choices"][0]
        return choice["message"]["content"] or "", choice.get("finish_reason")
    except (KeyError, IndexError, TypeError):
        raise FastqwenError(f"the server at {server.url} answers with something else than OpenAI's API has") from None
