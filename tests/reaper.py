"""Ends what a test run leaves behind: a process that reads its input until that ends, of which the run holds the other end.

However the run ends, by itself or by SIGKILL, the kernel closes that end. Then every process that inherited the run's mark in
its environment is killed: servers, their engines, and what those started, in whatever session or group.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "FASTQWEN_TEST_RUN"
PATIENCE_S = 10  # for processes that are just starting others


def watch(folder: str) -> subprocess.Popen[bytes]:
    """When this process ends, end what it starts from now on, and remove ``folder``, which is its mark.

    The result must be kept: its pipe tells that this process lives.
    """
    os.environ[MARK] = folder
    command = [sys.executable, "-P", __file__, folder]
    # A session of its own: Ctrl-C and a signal to the run's group are not for it.
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, cwd="/")


def marked(mark: bytes) -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        pid = int(path.parent.name)
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if pid != os.getpid() and mark in path.read_bytes().split(b"\0"):
                yield pid


def reap(folder: str) -> None:
    start_s = time.monotonic()
    while (found := list(marked(f"{MARK}={folder}".encode()))) and time.monotonic() - start_s < PATIENCE_S:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    sys.stdin.read()
    reap(sys.argv[1])
    shutil.rmtree(sys.argv[1], ignore_errors=True)
