"""Where grammars are followed: native threads beside Python's, so that neither a grammar nor a thread of low rank that is
kept waiting for a processor holds Python's lock while the model's thread wants it."""

from __future__ import annotations

import contextlib
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
BITS_OF_A_WORD = 32


class Lane:
    """One native thread, and the Python thread that waits for it."""

    def __init__(self, name: str, niceness: int = 0) -> None:
        self._niceness = niceness
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._native: Native | None = None  # begun with the first grammar: most engines see none

    def submit(self, work: Callable[[Native], Mask]) -> Future[Mask]:
        return self._waiter.submit(self._run, work)

    def _run(self, work: Callable[[Native], Mask]) -> Mask:
        if self._native is None:
            self._native = Native(self._niceness)
        return work(self._native)


class Native:
    """llguidance's executor with one thread of its own. For a single matcher it would compute in the thread that asks, and
    keep Python's lock, so each has a companion: a matcher in error, which costs nothing."""

    def __init__(self, niceness: int) -> None:
        self._clock: int | None = None
        self._companion: llguidance.LLMatcher | None = None
        starter = threading.Thread(target=self._start, args=(niceness,))
        starter.start()
        starter.join()

    def _start(self, niceness: int) -> None:
        """In a thread that ends soon: what it starts inherits its rank, which no one may raise again."""
        if sys.platform != "linux":
            self._executor = llguidance.LLExecutor(1)
            return
        with contextlib.suppress(OSError):
            own = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) + niceness)
        before = set(os.listdir("/proc/self/task"))
        self._executor = llguidance.LLExecutor(1)
        begun = set(os.listdir("/proc/self/task")) - before
        if len(begun) == 1:  # else another thread began just now: wall time will do
            self._clock = ~int(begun.pop()) << 3 | 6  # Linux's clock of the processor time of one thread

    def time_s(self) -> float:
        return time.monotonic() if self._clock is None else time.clock_gettime(self._clock)

    def follow(
        self, matcher: llguidance.LLMatcher, token_ids: Sequence[int], tokenizer: llguidance.LLTokenizer
    ) -> Mask:
        """What may come after these tokens. A matcher in error stays so, and allows nothing."""
        if self._companion is None:
            self._companion = llguidance.LLMatcher(tokenizer, "start: nothing", log_level=0)
        companion = self._companion
        num_words = -(-tokenizer.vocab_size // BITS_OF_A_WORD)
        for token_id in token_ids:
            self._executor.consume_token_par([(matcher, token_id), (companion, 0)])
        words = np.zeros((2, num_words), dtype=np.uint32)
        if not matcher.is_error():
            self._executor.unsafe_compute_mask_ptr(
                [(matcher, 0), (companion, 1)], words.ctypes.data, num_words * BITS_OF_A_WORD // 8, 2
            )
        error = matcher.get_error() if matcher.is_error() else None
        return words[0].view(np.int32), error
