"""Who belongs to the cluster: what the controller remembers. No sockets, no clock of its own.

Nothing is kept on disk. Workers say all of it once a second, so a controller that was started again knows them a second later.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastqwen.cluster.wire import LOST_AFTER_S, Member


class Registry:
    def __init__(self, lost_after_s: float = LOST_AFTER_S) -> None:
        self._lost_after_s = lost_after_s
        self._members: dict[str, Member] = {}
        self._heard_s: dict[str, float] = {}
        self._drained: set[str] = set()

    def beat(self, member: Member, now_s: float) -> bool:
        """Whether it is new."""
        is_new = member.key not in self._members
        self._members[member.key] = member
        self._heard_s[member.key] = now_s
        return is_new

    def bye(self, key: str) -> Member | None:
        self._drained.discard(key)
        self._heard_s.pop(key, None)
        return self._members.pop(key, None)

    def lost(self, now_s: float) -> list[Member]:
        """Those that fell silent, which are forgotten."""
        silent = [key for key, heard_s in self._heard_s.items() if now_s - heard_s > self._lost_after_s]
        return [member for member in map(self.bye, silent) if member is not None]

    def listed(self, now_s: float) -> tuple[list[Member], list[float]]:
        """The members by their names and addresses, and for how long each has been silent."""
        found = sorted(self._members.values(), key=lambda one: (one.names, one.address))
        return found, [now_s - self._heard_s[one.key] for one in found]

    def drain(self, which: str) -> list[Member]:
        """By key, address, or a model's name. They are told with the answer to their next beat."""
        found = [one for one in self._members.values() if which in (one.key, one.address, *one.names)]
        self._drained.update(one.key for one in found)
        return found

    def is_drained(self, key: str) -> bool:
        return key in self._drained


def by_model(members: Iterable[Member]) -> dict[str, list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in members:
        for name in member.names:
            found.setdefault(name, []).append(member)
    return found
