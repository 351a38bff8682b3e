"""A process that another one starts ends with it, however that one ends.

``python -m fastqwen.lifeline MODULE ARGUMENTS`` runs a module so from its first line on: importing torch takes seconds.
"""

from __future__ import annotations

import ctypes
import logging
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
LOOK_EVERY_S = 0.5
PARENT_VARIABLE = "FASTQWEN_PARENT_PID"

log = logging.getLogger("fastqwen.engine")


def named_parent() -> int:
    """Whoever started this process and said so; without a word, whoever is its parent now."""
    return int(os.environ.get(PARENT_VARIABLE, "") or os.getppid())


def end_with_parent() -> None:
    """Call first of all. On Linux the kernel kills this process when its parent ends; where the parent has ended already,
    this one ends here. Its parent must have started it from a thread that lives as long as itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != named_parent():
        sys.exit("the process that started this one is gone")


def end_with_starter() -> None:
    """As ``end_with_parent``, in a command that a supervisor may have started, and a person as well."""
    if PARENT_VARIABLE in os.environ:
        end_with_parent()


def watch_parent(tidy: Callable[[], None]) -> None:
    """Call first of all. A thread ends this process soon after its parent, and calls ``tidy`` before."""
    parent = named_parent()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY_S)
        log.info("the process that started this one is gone, so it ends as well")
        tidy()
        os._exit(0)

    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
