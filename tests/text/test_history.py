"""Which turns stay, on a fake that counts letters."""

from __future__ import annotations

import random
from typing import Any

import pytest

from fastqwen.client.history import cut_history
from fastqwen.errors import BadRequest


class Counter:
    """A token is a letter; texts of more than 1000 letters cannot be counted."""

    def __init__(self) -> None:
        self.num_letters = 0

    def __call__(self, messages: list[dict[str, Any]], asks: bool) -> int:
        size = sum(len(message["content"]) for message in messages) + asks
        if any(len(message["content"]) > 1000 for message in messages):
            raise BadRequest("too long", "prompt", "context_length_exceeded")
        self.num_letters += size
        return size


def test_the_largest_tail_that_fits():
    """Against trying every number of turns."""
    random.seed(5)
    for _ in range(300):
        history = [("q" * random.randint(0, 9), "a" * random.randint(0, 9)) for _ in range(random.randint(0, 20))]
        window, room = random.randint(1, 150), random.randint(1, 150)
        system, query = "s" * random.randint(0, 9), "u" * random.randint(1, 9)
        tails = [history[start:] for start in range(len(history) + 1)]
        sizes = [sum(len(q) + len(a) for q, a in tail) for tail in tails]
        fitting = [
            tail
            for tail, size in zip(tails, sizes, strict=True)
            if not tail or (len(system) + size < window and len(system) + size + len(query) + 1 <= room)
        ]
        kept = cut_history(history, query, system=system, count_tokens=Counter(), window=window, room=room)
        assert kept == fitting[0]


def test_a_long_history_costs_little():
    history = [("q" * 5, "a" * 5)] * 5000
    counter = Counter()
    assert len(cut_history(history, "u", system=None, count_tokens=counter, window=101, room=10**6)) == 10
    assert counter.num_letters < 2000


def test_a_turn_that_cannot_even_be_counted_does_not_fit():
    history = [("q", "a" * 2000), ("q", "a")]
    options: dict[str, Any] = {"system": None, "count_tokens": Counter(), "window": None, "room": 10**6}
    assert cut_history(history, "u", **options) == [("q", "a")]

    def refuse(messages: list[dict[str, Any]], asks: bool) -> int:
        raise BadRequest("no such role", "messages")

    with pytest.raises(BadRequest, match="no such role"):
        cut_history(history, "u", **{**options, "count_tokens": refuse})
