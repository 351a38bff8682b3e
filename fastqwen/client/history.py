"""Which part of a conversation still fits: whole turns are dropped, the oldest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastqwen.errors import BadRequest

Turn = tuple[str, str]  # what the user asked, what the model answered
Messages = list[dict[str, Any]]
COUNTING_FAILED = "context_length_exceeded"


def to_messages(history: Sequence[Turn], *, system: str | None = None, query: str | None = None) -> Messages:
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages if query is None else [*messages, {"role": "user", "content": query}]


def cut_history(
    history: Sequence[Turn],
    query: str,
    *,
    system: str | None,
    count_tokens: Callable[[Messages, bool], int],
    window: int | None,
    room: int,
) -> list[Turn]:
    """The newest turns that fit. ``count_tokens(messages, with_generation_prompt)`` renders and counts.

    Qwen's own rule: a turn stays while system message, turn and all newer turns have less than ``window`` tokens; the
    query is not counted. Beside it the whole prompt may have at most ``room`` tokens.
    """

    def fits(num_turns: int) -> bool:
        kept = history[len(history) - num_turns :]
        try:
            if window is not None and count_tokens(to_messages(kept, system=system), False) >= window:
                return False
            return count_tokens(to_messages(kept, system=system, query=query), True) <= room
        except BadRequest as error:
            if error.code != COUNTING_FAILED:
                raise
            return False  # too long even to be counted

    fitting, failing = 0, 1
    while failing <= len(history) and fits(failing):  # small steps first: old turns may be huge
        fitting, failing = failing, min(2 * failing, len(history)) if failing < len(history) else failing + 1
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return list(history[len(history) - fitting :])
