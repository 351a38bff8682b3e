"""How far the loading of a model is."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class LoadingBar:
    """Appears on a terminal when loading takes longer than a second, at every start anew."""

    def __init__(self) -> None:
        self._bar: Any = None

    def update(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, desc="Loading layers", unit="layer", leave=False, delay=1.0, disable=None)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
