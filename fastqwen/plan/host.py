"""This machine's own memory, and how fast it is. Imports nothing heavy."""

from __future__ import annotations

import os
import time

from fastqwen.plan.facts import MIB, DeviceFacts
from fastqwen.plan.host_memory import free_bytes, total_bytes

COPY_BYTES = 32 * MIB  # of each thread; more than its share of a cache
COPY_REPEATS = 3
MOST_THREADS = 16


def host_facts() -> DeviceFacts:
    return DeviceFacts(kind="cpu", name="CPU", total_bytes=total_bytes(), free_bytes=free_bytes())


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
