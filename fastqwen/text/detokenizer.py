"""Text that grows token by token: UTF-8 characters come out whole, and no piece of a stop string leaks."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from fastqwen.text.tokenizer import Tokenizer


class Detokenizer:
    """``push`` returns only text that is final. Text that may be the beginning of a stop string waits for the next."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._hidden = frozenset(tokenizer.control_tokens.values()) if skip_special_tokens else frozenset()
        self._begun = b""  # the first bytes of a character whose others are still to come
        self._held = ""  # decoded, but possibly the beginning of a stop string
        self._tokens_until_stop = min_tokens
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """The text that this token makes final. After ``stopped_by`` is set nothing more may be pushed."""
        assert self.stopped_by is None
        self._tokens_until_stop -= 1
        text = "" if token_id in self._hidden else self._decoded(self._tokenizer.token_bytes(token_id))
        return self._release(text) if self._stop else text

    def finish(self) -> str:
        """What is left at the end: held text, and U+FFFD if the last character is incomplete."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._decoded(b"", final=True))
        rest, self._held = self._held, ""
        return text + ("" if self.stopped_by is not None else rest)

    def _decoded(self, data: bytes, *, final: bool = False) -> str:
        """The whole characters. codecs' incremental decoder does the same at four times the cost."""
        data = self._begun + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._begun = data[used:]
        return text

    def _release(self, text: str) -> str:
        if not self._stop or not text:
            return text
        seen = self._held + text
        if self._tokens_until_stop >= 0:  # min_tokens: this token may not end the text
            self._held = ""
            return seen
        found = [(seen.find(stop), -len(stop), stop) for stop in self._stop if stop in seen]
        if found:
            start, _, stop = min(found)
            self.stopped_by, self._held = stop, ""
            return seen[: start + len(stop)] if self._include_stop else seen[:start]
        keep = max(_overlap(seen, stop) for stop in self._stop)
        self._held = seen[len(seen) - keep :] if keep else ""
        return seen[: len(seen) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are a beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
