"""Where grammars are followed: native threads beside Python's, so that neither a grammar nor a thread of low rank that is
kept waiting for a processor holds Python's lock while the model's thread wants it."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import llguidance
import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.int32]  # a bit for each token that may come, from each word's lowest on
Mask = tuple[Bits, str | None]  # of the tokens that the grammar knows, and what is wrong
Row = tuple[llguidance.LLMatcher, Sequence[int]]  # and the tokens that it has not seen yet
BITS_OF_A_WORD = 32


class Lane:
    """Native threads, and the Python thread that waits for them."""

    def __init__(self, name: str, niceness: int = 0, num_threads: int = 1) -> None:
        self._niceness, self._num_threads = niceness, num_threads
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._native: Native | None = None  # begun with the first grammar: most engines see none

    def submit(self, count: int, work: Callable[[Native], list[Mask]]) -> list[Future[Mask]]:
        """``work`` gives so many masks, in the order of these futures."""
        jobs: list[Future[Mask]] = [Future() for _ in range(count)]
        self._waiter.submit(self._run, jobs, work)
        return jobs

    def _run(self, jobs: list[Future[Mask]], work: Callable[[Native], list[Mask]]) -> None:
        wanted = [job.set_running_or_notify_cancel() for job in jobs]
        if not any(wanted):
            return
        try:
            if self._native is None:
                self._native = Native(self._niceness, self._num_threads)
            masks = work(self._native)
        except BaseException as error:  # whoever waits for a mask is told, as by an executor's own futures
            for job in itertools.compress(jobs, wanted):
                job.set_exception(error)
            return
        for job, mask in itertools.compress(zip(jobs, masks, strict=True), wanted):
            job.set_result(mask)


class Native:
    """llguidance's executor with threads of its own. For a single matcher it would compute in the thread that asks, and
    keep Python's lock, so each has a companion: a matcher in error, which costs nothing."""

    def __init__(self, niceness: int, num_threads: int) -> None:
        self._clocks: list[int] = []
        self._companion: llguidance.LLMatcher | None = None
        starter = threading.Thread(target=self._start, args=(niceness, num_threads))
        starter.start()
        starter.join()

    def _start(self, niceness: int, num_threads: int) -> None:
        """In a thread that ends soon: what it starts inherits its rank, which no one may raise again."""
        if sys.platform != "linux":
            self._executor = llguidance.LLExecutor(num_threads)
            return
        with contextlib.suppress(OSError):
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + niceness)
        before = set(os.listdir("/proc/self/task"))
        self._executor = llguidance.LLExecutor(num_threads)
        begun = set(os.listdir("/proc/self/task")) - before
        if len(begun) == num_threads:  # else another thread began just now: wall time will do
            self._clocks = [~int(one) << 3 | 6 for one in begun]  # Linux's clocks of the processor time of one thread

    def time_s(self) -> float:
        return sum(map(time.clock_gettime, self._clocks)) if self._clocks else time.monotonic()

    def follow(self, rows: Sequence[Row], tokenizer: llguidance.LLTokenizer) -> list[Mask]:
        """What may come next in each row. A matcher in error stays so, and allows nothing."""
        if self._companion is None:
            self._companion = llguidance.LLMatcher(tokenizer, "start: nothing", log_level=0)
        companion = self._companion
        for tokens in itertools.zip_longest(*(token_ids for _, token_ids in rows)):
            taken = [(row[0], token) for row, token in zip(rows, tokens, strict=True) if token is not None]
            self._executor.consume_token_par([*taken, (companion, 0)])
        num_words = -(-tokenizer.vocab_size // BITS_OF_A_WORD)
        words = np.zeros((len(rows) + 1, num_words), dtype=np.uint32)
        asked = [(matcher, index) for index, (matcher, _) in enumerate(rows) if not matcher.is_error()]
        if asked:
            self._executor.unsafe_compute_mask_ptr(
                [*asked, (companion, len(rows))], words.ctypes.data, num_words * BITS_OF_A_WORD // 8, len(words)
            )
        return [
            (words[index].view(np.int32), matcher.get_error() if matcher.is_error() else None)
            for index, (matcher, _) in enumerate(rows)
        ]
