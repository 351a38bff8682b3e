"""Whose request is begun next. Between two looks at the network a bounded number are, whatever many connections have sent.

Otherwise each of a thousand connections with requests to spare has one begun whenever the event loop goes round once, and
whoever comes with a single one waits for all of them, several times.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

AT_ONCE = {"probe": 4, "rested": 4, "busy": 1}  # begun in one round of the event loop
REST_S = 0.5

Begin = Callable[[], None]


class Turns:
    """One for all connections of a process. Each asks before it begins a request, and is called back if it has to wait.

    A connection that began one within ``REST_S`` is busy; of the others, those that ask how the server is go first.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Begin]] = {kind: deque() for kind in AT_ONCE}
        self._left = dict(AT_ONCE)  # in this round
        self._round: asyncio.Handle | None = None

    def take(self, loop: asyncio.AbstractEventLoop, last_s: float, *, probe: bool, begin: Begin) -> bool:
        """Whether a request may begin now; if not, ``begin`` is called when it may. ``last_s``: when its connection's last
        one began, on the loop's clock."""
        if self._round is None:
            self._round = loop.call_soon(self._go_round, loop)
        kind = "busy" if loop.time() - last_s < REST_S else "probe" if probe else "rested"
        if self._left[kind] and not self._waiting[kind]:
            self._left[kind] -= 1
            return True
        self._waiting[kind].append(begin)
        return False

    def _go_round(self, loop: asyncio.AbstractEventLoop) -> None:
        now: list[Begin] = []
        for kind, at_once in AT_ONCE.items():
            waiting = self._waiting[kind]
            begun = min(at_once, len(waiting))
            now += [waiting.popleft() for _ in range(begun)]
            self._left[kind] = at_once - begun
        self._round = loop.call_soon(self._go_round, loop) if now else None
        for begin in now:
            begin()
