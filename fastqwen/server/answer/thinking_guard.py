"""Thinking that takes too long or goes in circles is ended instead of running on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastqwen.text.answer import THINK_END

# Qwen's models were trained to answer after this sentence.
EARLY_STOP = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly now.\n"
    f"{THINK_END}\n\n"
)

WINDOW_TOKENS = 12  # what counts as having been said before
LOOP_TOKENS = 192  # a cycle is a loop once it has repeated for so many tokens ...
LOOP_TIMES = 3  # ... and so many times


@dataclass(frozen=True)
class ThinkingOptions:
    template_options: dict[str, Any] = field(default_factory=dict)
    budget_tokens: int | None = None
    recover_loops: bool = True
    warnings: list[str] = field(default_factory=list)


class ThinkingGuard:
    """One answer's thinking, token by token."""

    def __init__(self, options: ThinkingOptions) -> None:
        self._budget = options.budget_tokens
        self._recover_loops = options.recover_loops
        self._tokens: list[int] = []
        self._last_seen: dict[tuple[int, ...], int] = {}
        self._period = 0
        self._repeated = 0

    def saw(self, token_ids: list[int]) -> str | None:
        """Why the thinking must end now, if it must."""
        for token_id in token_ids:
            self._tokens.append(token_id)
            if self._recover_loops and self._loops():
                return f"the thinking repeated itself every {self._period} tokens and was ended"
        if self._budget is not None and len(self._tokens) >= self._budget:
            return f"the thinking reached its budget of {self._budget} tokens and was ended"
        return None

    def _loops(self) -> bool:
        tokens, end = self._tokens, len(self._tokens)
        if self._period and tokens[-1] == tokens[-1 - self._period]:
            self._repeated += 1
        else:
            window = tuple(tokens[-WINDOW_TOKENS:])
            before = self._last_seen.get(window)
            self._period, self._repeated = (0, 0) if before is None else (end - before, 1)
        self._last_seen[tuple(tokens[-WINDOW_TOKENS:])] = end
        return bool(self._period) and self._repeated >= max(LOOP_TOKENS, LOOP_TIMES * self._period)
