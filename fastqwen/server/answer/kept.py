"""Log-probabilities that wait for the end of their answers: a few bytes of a request ask for millions of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fastqwen.errors import BadRequest, Overloaded

T = TypeVar("T")

MOST_OF_A_PROMPT = 500_000  # entries, alternatives among them: some 100 MB
MOST_OF_ALL = 4_000_000
ASIDE_FROM = 2000  # entries: spelling so many takes some 10 ms


class KeptLogprobs:
    def __init__(self) -> None:
        self.num_kept = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="logprobs")

    def keep(self, num_new: int, num_own: int, *, unbounded: bool = False) -> None:
        """``num_own``: of the same prompt's answers, with these; ``unbounded``: an operator lets requests ask for all there are.
        Raises BadRequest or Overloaded where it is too much."""
        most = MOST_OF_ALL if unbounded else MOST_OF_A_PROMPT
        if num_own > most:
            raise BadRequest(
                f"the answers have more than {most} log-probabilities: ask for fewer alternatives (top_logprobs, "
                "logprobs, prompt_logprobs), answers (n) or tokens (max_tokens)",
                "logprobs",
            )
        if self.num_kept + num_new > MOST_OF_ALL:
            raise Overloaded(
                f"the answers that are being computed have {MOST_OF_ALL} log-probabilities, no more are kept: try again later"
            )
        self.num_kept += num_new

    def release(self, num_own: int) -> None:
        self.num_kept -= num_own

    async def written(self, write: Callable[[], T], num_entries: int) -> T:
        """What ``write`` gives, computed beside the event loop where it takes long."""
        if num_entries < ASIDE_FROM:
            return write()
        return await asyncio.get_running_loop().run_in_executor(self._writer, write)
