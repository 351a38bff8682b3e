"""What a worker says of the machine that it is on."""

from __future__ import annotations

import os

import msgspec

from fastqwen.plan import host_memory


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """``num_cpus`` are those that this process may use; ``load`` is the system's mean of the last minute."""

    num_cpus: int = 0
    load: float = 0.0
    memory_bytes: int = 0
    memory_free_bytes: int = 0


def this_machine() -> Machine:
    return Machine(
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        load=round(os.getloadavg()[0], 2),
        memory_bytes=host_memory.total_bytes(),
        memory_free_bytes=host_memory.free_bytes(),
    )
