"""How much memory this process may really have: the machine's, a container's, and what `ulimit` leaves."""

from __future__ import annotations

import os
from pathlib import Path

UNLIMITED = 2**60  # version 1 of cgroups writes a number near 2^63 for no limit


def total_bytes(root: Path = Path("/")) -> int:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in _groups(root)), *(limit for limit, _ in _own_limits(root))])


def free_bytes(root: Path = Path("/")) -> int:
    """What neither others nor this process hold, within all limits."""
    total = total_bytes(root)
    lines = _lines(root / "proc/meminfo")
    available = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")] or [total // 2]
    left = [max(0, limit - used) for limit, used in (*_groups(root), *_own_limits(root))]
    return min([*available, *left])


def _groups(root: Path) -> list[tuple[int, int]]:
    """Limit and use of each control group that this process is in, from its own up to the machine's."""
    groups = []
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            # Above memory.high a process is not killed, but slowed down until it is of no use.
            top, limits = root / "sys/fs/cgroup", ["memory.max", "memory.high"]
            names = ("memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            limits = ["memory.limit_in_bytes"]
            names = ("memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.lstrip("/")
        for one in (folder, *folder.parents):
            limit = min((found for name in limits if (found := _number(one / name)) is not None), default=UNLIMITED)
            if limit < UNLIMITED:
                # Pages of files that were read are given back when memory is asked for.
                cached = [
                    int(line.split()[1]) for line in _lines(one / "memory.stat") if line.startswith(f"{names[1]} ")
                ]
                groups.append((limit, max(0, (_number(one / names[0]) or 0) - sum(cached))))
            if one == top:
                break
    return groups


def _own_limits(root: Path) -> list[tuple[int, int]]:
    """What `ulimit -v` and `ulimit -d` set, with what this process has of it."""
    import resource  # Windows has none, and is told so by name

    found = []
    held = {
        line.split(":")[0]: int(line.split()[1]) * 1024
        for line in _lines(root / "proc/self/status")
        if line.endswith(" kB")
    }
    for kind, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            found.append((limit, held.get(name, 0)))
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """None for a file that is not there, or says `max`."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None
