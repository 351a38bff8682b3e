"""Signs of life: each rank has a pipe into which a thread of its own writes twice a second.

A rank that ends closes its pipe, which is seen at once. One that is silent for long has stopped, or its device has. Time is
counted only while somebody looks, so that a whole machine that slept, or a program that had no work for hours, is no hang.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence

BEAT_S = 0.5
LONGEST_LOOK_S = 1.0  # of the time between two looks, what counts at most


def beat(pipe: int) -> None:
    """In a rank: write for as long as this process lives."""
    os.set_blocking(pipe, False)

    def write() -> None:
        while True:
            with contextlib.suppress(BlockingIOError):  # nobody looks just now
                os.write(pipe, b".")
            time.sleep(BEAT_S)

    threading.Thread(target=write, name="pulse", daemon=True).start()


class Pulses:
    """The other ends, one for each rank."""

    def __init__(self, pipes: Sequence[int], now: Callable[[], float] = time.monotonic) -> None:
        self.pipes = list(pipes)
        self.silent_s = [0.0] * len(pipes)
        self._now = now
        self._looked_s = now()
        for pipe in pipes:
            os.set_blocking(pipe, False)

    def look(self) -> int | None:
        """Which rank has ended, if one has."""
        now_s = self._now()
        passed_s, self._looked_s = min(now_s - self._looked_s, LONGEST_LOOK_S), now_s
        for index, pipe in enumerate(self.pipes):
            try:
                found = os.read(pipe, 2**16)
            except BlockingIOError:
                self.silent_s[index] += passed_s
                continue
            if not found:
                return index
            self.silent_s[index] = 0.0
        return None

    def close(self) -> None:
        for pipe in self.pipes:
            os.close(pipe)
