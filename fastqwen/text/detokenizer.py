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
        stops_after: str = "",
    ) -> None:
        """``stops_after``: only behind this text does a stop string count."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._hidden = frozenset(tokenizer.control_tokens.values()) if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._awaited = stops_after
        self._passed = ""  # what may be the beginning of the awaited text
        self._held = ""  # decoded, but possibly the beginning of a stop string
        self._tokens_until_stop = min_tokens
        self.stopped_by: str | None = None

    def push(self, token_id: int) -> str:
        """The text that this token makes final. After ``stopped_by`` is set nothing more may be pushed."""
        assert self.stopped_by is None
        data = b"" if token_id in self._hidden else self._tokenizer.token_bytes(token_id)
        self._tokens_until_stop -= 1
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """What is left at the end: held text, and U+FFFD if the last character is incomplete."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + ("" if self.stopped_by is not None else rest)

    def _release(self, text: str) -> str:
        if not self._stop or not text:
            return text
        if self._awaited:
            return self._until_awaited(text)
        seen = self._held + text
        if self._tokens_until_stop >= 0:  # min_tokens: this token may not end the text
            self._held = ""
            return seen
        found = [(seen.find(stop), -len(stop), stop) for stop in self._stop if stop in seen]
        if found:
            start, _, stop = min(found)
            self.stopped_by, self._held = stop, ""
            return seen[: start + len(stop)] if self._include_stop else seen[:start]
        keep = max(overlap(seen, stop) for stop in self._stop)
        self._held = seen[len(seen) - keep :] if keep else ""
        return seen[: len(seen) - keep]

    def _until_awaited(self, text: str) -> str:
        seen = self._passed + text
        before, found, behind = seen.partition(self._awaited)
        if not found:
            self._passed = seen[-len(self._awaited) + 1 :] if len(self._awaited) > 1 else ""
            return text
        free = (before + found)[len(self._passed) :]
        self._awaited = self._passed = ""
        return free + self._release(behind)


def overlap(text: str, stop: str) -> int:
    """How many of the text's last characters are a beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
