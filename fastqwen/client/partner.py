"""A conversation's other side, at the level of text: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from fastqwen.client.history import Messages
from fastqwen.text.answer import Parts


class Partner(Protocol):
    """LocalPartner (client/local_partner.py) or RemotePartner (client/remote.py). Safe for many threads."""

    name: str
    names: list[str]  # of all models there; setting ``name`` to one of them chooses it
    thinks: bool | None  # whether the model can think before it answers; None: the server does not tell
    max_model_len: int | None  # None: the server does not tell
    generation_config: dict[str, Any]  # of the model's own file; empty where a server applies it

    def answer(
        self, messages: Messages, options: dict[str, Any], template_options: dict[str, Any] | None = None
    ) -> Generator[Parts, None, None]:
        """What the answer and the thinking gained, apart. Closing the iterator ends the work. Raises FastqwenError.

        ``options`` are SamplingParams' fields, without those that the model's own defaults shall decide.
        """

    def count_tokens(
        self, messages: Messages, template_options: dict[str, Any] | None = None, *, add_generation_prompt: bool = True
    ) -> int: ...

    def text_of(self, token_ids: list[int]) -> str: ...

    def close(self) -> None: ...
