"""A line now and then on standard error, while a benchmark works: how far it is, and its figure so far."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_AFTER_S, EVERY_S = 2.0, 5.0


class Progress:
    """``tick`` after each part of the work. ``unit`` names the parts; a benchmark shorter than two seconds says nothing."""

    def __init__(self, work: str, total: int, unit: str) -> None:
        self._work, self._total, self._unit = work, total, unit
        self._done = 0
        self._start_s = time.perf_counter()
        self._next_s = self._start_s + FIRST_AFTER_S

    def tick(self, count: int = 1) -> None:
        self._done += count
        now_s = time.perf_counter()
        if now_s < self._next_s:
            return
        self._next_s = now_s + EVERY_S
        spent_s = now_s - self._start_s
        print(
            f"{self._work}: {self._done} of {self._total} {self._unit}, {self._done / spent_s:.1f} a second so far",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def watched(work: str, line: Callable[[float], str]) -> Iterator[None]:
    """For work that is one call: ``line`` says how far it is, from the seconds that it took so far."""
    over = threading.Event()
    start_s = time.perf_counter()

    def watch() -> None:
        pause_s = FIRST_AFTER_S
        while not over.wait(pause_s):
            print(f"{work}: {line(time.perf_counter() - start_s)}", file=sys.stderr, flush=True)
            pause_s = EVERY_S

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def say(text: str) -> None:
    """What is done next, where it may take a while."""
    print(f"INFO:     {text}", file=sys.stderr, flush=True)
