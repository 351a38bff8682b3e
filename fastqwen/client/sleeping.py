"""An engine of this process that can give its memory back for a while, and a prefix cache that can be forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from fastqwen.client.engine import Ready
from fastqwen.client.model import LoadedModel
from fastqwen.engine.core import EngineCore, EngineStats
from fastqwen.errors import BadRequest

MODES = ("abort", "wait", "keep")


class _Engine(Protocol):
    def stats(self) -> EngineStats: ...


E = TypeVar("E", bound=_Engine)


class SleepingEngine(Generic[E]):
    """``make`` puts an engine around a core; ``end`` is told one that nobody will use any more."""

    def __init__(
        self,
        loaded: LoadedModel,
        make: Callable[[EngineCore, Ready], E],
        end: Callable[[E], None] = lambda engine: None,
    ) -> None:
        self._loaded, self._make, self._end = loaded, make, end
        self._engine: E | None = make(loaded.core, loaded.ready)
        self._level: int | None = None  # how deep it sleeps
        self._num_resets = 0

    @property
    def engine(self) -> E:
        """Raises BadRequest while it sleeps."""
        if self._engine is None or self._level is not None:
            raise BadRequest("the model sleeps: call wake_up() first")
        return self._engine

    @property
    def is_sleeping(self) -> bool:
        return self._level is not None

    def stats(self) -> EngineStats:
        return EngineStats() if self._engine is None else self._engine.stats()

    @property
    def salt(self) -> str:
        """Prompts of another salt share nothing."""
        return f"reset {self._num_resets}" if self._num_resets else ""

    def reset_prefix_cache(self) -> bool:
        self._num_resets += 1
        return True

    def sleep(self, level: int, mode: str, *, busy: bool) -> None:
        """At ``level`` 1 the weights wait in host memory, which must have room for them; at 2, and where several processes
        compute, they are read from their files again; at 0 nothing is given back. Raises BadRequest where it is ``busy``,
        whatever ``mode`` says."""
        if level not in (0, 1, 2):
            raise BadRequest(f"level is {level}, but must be 0, 1 or 2", "level")
        if mode not in MODES:
            raise BadRequest(f"mode is {mode!r}, but must be one of {', '.join(MODES)}", "mode")
        if self._level is not None and level <= self._level:
            return
        if self._engine is None:  # deeper than level 1
            self._loaded.drop_kept()
        elif busy:
            raise BadRequest("requests are running: wait for them before sleep()", "level")
        elif level:
            self.reset_prefix_cache()
            self._end(self._engine)
            self._engine = None
            self._loaded.stop(keep=level == 1)
        self._level = level

    def wake_up(self) -> bool:
        """Load again what ``sleep`` gave back; whether all of it is awake."""
        if self._engine is None:
            ready, core = self._loaded.start()
            self._engine = self._make(core, ready)
        self._level = None
        return True
