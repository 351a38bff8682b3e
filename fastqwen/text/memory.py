"""How much memory reading somebody's text may take, where the system says how much is used (Linux); elsewhere time is the limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def used_bytes() -> int | None:
    """Of this process's address space."""
    try:
        import resource

        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return None


@contextmanager
def memory_limit(extra_bytes: int) -> Iterator[None]:
    """What is allocated inside beyond that raises MemoryError."""
    used = used_bytes()
    if used is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + extra_bytes
    lower = all(one == resource.RLIM_INFINITY or limit < one for one in (soft, hard))
    if lower:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        if lower:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def limit_memory(extra_bytes: int) -> None:
    """The same until the process ends."""
    used = used_bytes()
    if used is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (used + extra_bytes, used + extra_bytes))
