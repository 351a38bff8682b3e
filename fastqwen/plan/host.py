"""This machine's own memory: how much of it is really ours, and how fast it is. Imports nothing heavy."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fastqwen.plan.facts import MIB, DeviceFacts

CGROUPS = Path("/sys/fs/cgroup")
COPY_BYTES = 32 * MIB  # of each thread; more than its share of a cache
COPY_REPEATS = 3
MOST_THREADS = 16


def host_facts() -> DeviceFacts:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = _free_host_bytes(total)
    for limit, used in (*_group_limits(), *_process_limits()):
        total, free = min(total, limit), min(free, max(0, limit - used))
    return DeviceFacts(kind="cpu", name="CPU", total_bytes=total, free_bytes=free)


def _free_host_bytes(total: int) -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return total // 2


def _group_limits() -> list[tuple[int, int]]:
    """Limit and use in bytes of each control group that this process is in: a container's, a service's, a batch job's. Pages
    of files that the kernel can drop are not in use."""
    found = []
    for folder, limit_name, used_name in _groups():
        try:
            limit = int((folder / limit_name).read_text())
            used = int((folder / used_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # "max", or no such file at this level
            continue
        found.append((limit, used - int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))))
    return found


def _process_limits() -> list[tuple[int, int]]:
    """What the shell or a batch system allows a process (ulimit -v, ulimit -d); nothing of it is used yet by what comes."""
    import resource  # Windows has none, and is told so by name

    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return [(limit, 0) for limit in limits if limit != resource.RLIM_INFINITY]


def _groups() -> list[tuple[Path, str, str]]:
    """Folders of the control groups of this process, its own first, and the names of their files (version 2 and 1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = CGROUPS / "memory" if controllers else CGROUPS
        own = Path(path.lstrip("/"))
        found += [(top / part, *names) for part in (own, *own.parents)]
    return found


def measure_bandwidth() -> float:
    """GB/s with which all cores together copy memory, reading and writing counted. Takes about a tenth of a second."""
    import ctypes  # --help need not wait for these
    from concurrent.futures import ThreadPoolExecutor

    threads = min(MOST_THREADS, os.cpu_count() or 1)
    pairs = [(ctypes.create_string_buffer(COPY_BYTES), ctypes.create_string_buffer(COPY_BYTES)) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(COPY_REPEATS):
            start_s = time.perf_counter()
            list(pool.map(lambda pair: ctypes.memmove(pair[0], pair[1], COPY_BYTES), pairs))
            best = max(best, 2 * threads * COPY_BYTES / (time.perf_counter() - start_s))
    return best / 1e9
