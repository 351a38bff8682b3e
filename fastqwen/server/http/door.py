"""What stands in front of the routes needs to know only this much of what is behind them."""

from __future__ import annotations

from typing import Protocol

from fastqwen.server.config import FrontConfig


class Door(Protocol):
    num_active: int
    draining: bool

    @property
    def config(self) -> FrontConfig: ...

    def admit(self) -> None:
        """Raises Overloaded or EngineGone where a new request cannot be taken."""

    def note_error(self, message: str) -> None: ...
