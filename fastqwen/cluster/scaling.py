"""How many replicas a group of workers should have: pure, with the clock in the caller's hand.

One more when requests have waited in its engines at every look of the last few seconds; one less when for much longer what runs
would have fit into one less. A step at a time, and up sooner than down: a new replica takes a while to load, and one that is
drained takes the prefixes in its cache along.
"""

from __future__ import annotations

from dataclasses import dataclass

UP_AFTER_S = 5.0
DOWN_AFTER_S = 120.0
BUSY_SHARE = 0.5  # of the KV caches, above which no replica is let go


@dataclass(frozen=True)
class Load:
    """Of a group's ready replicas together."""

    num_ready: int
    num_loading: int
    num_waiting: int
    num_running: int
    kv_usage: float  # their mean


class Scaler:
    def __init__(self, min_replicas: int, max_replicas: int) -> None:
        assert 1 <= min_replicas <= max_replicas
        self._min, self._max = min_replicas, max_replicas
        self.wanted = min_replicas
        self._waiting_since_s: float | None = None
        self._idle_since_s: float | None = None

    def look(self, load: Load, now_s: float) -> int:
        """How many replicas there are to be."""
        if load.num_ready == 0 or load.num_loading:  # what is on its way changes the picture: wait for it
            self._waiting_since_s = self._idle_since_s = None
            return self.wanted
        self._waiting_since_s = _since(self._waiting_since_s, load.num_waiting > 0, now_s)
        share_with_one_less = load.kv_usage * load.num_ready / max(1, load.num_ready - 1)
        is_idle = not load.num_waiting and share_with_one_less < BUSY_SHARE
        self._idle_since_s = _since(self._idle_since_s, is_idle, now_s)
        if self._waiting_since_s is not None and now_s - self._waiting_since_s >= UP_AFTER_S:
            self._move(min(self._max, self.wanted + 1))
        elif self._idle_since_s is not None and now_s - self._idle_since_s >= DOWN_AFTER_S:
            self._move(max(self._min, self.wanted - 1))
        return self.wanted

    def _move(self, wanted: int) -> None:
        self.wanted = wanted
        self._waiting_since_s = self._idle_since_s = None


def _since(before_s: float | None, holds: bool, now_s: float) -> float | None:
    """Since when it has held without a break."""
    if not holds:
        return None
    return now_s if before_s is None else before_s
