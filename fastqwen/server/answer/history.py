"""An hour of figures, so that the operators' page has a past when it is opened."""

from __future__ import annotations

from collections import deque
from typing import Any

EVERY_S = 5
KEPT_S = 3600


class History:
    """One sample each EVERY_S; the oldest ones leave."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int, int, int, int]] = deque(maxlen=KEPT_S // EVERY_S + 1)

    def note(self, now_s: float, *, generated: int, read: int, running: int, waiting: int) -> None:
        """``generated`` and ``read`` are the totals of tokens since the start."""
        self._samples.append((now_s, generated, read, running, waiting))

    def as_json(self) -> dict[str, Any]:
        """Rates are tokens per second between a sample and the one before it, so there is one value less than samples."""
        pairs = list(zip(self._samples, list(self._samples)[1:], strict=False))
        return {
            "every_s": EVERY_S,
            "generated": [round((new[1] - old[1]) / max(0.001, new[0] - old[0]), 1) for old, new in pairs],
            "read": [round((new[2] - old[2]) / max(0.001, new[0] - old[0]), 1) for old, new in pairs],
            "running": [new[3] for _, new in pairs],
            "waiting": [new[4] for _, new in pairs],
        }
