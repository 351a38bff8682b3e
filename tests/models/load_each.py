"""``python -m tests.models.load_each < PATHS``: ``fastqwen generate PATH hello`` for each line, each in a process of its own.

The processes are forked from one that has imported everything, so that hundreds take seconds. One line of JSON for each:
exit status (negative: the signal), seconds, peak of the memory, and what it said.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

import torch

import fastqwen.llm
import fastqwen.runner.start  # noqa: F401 what the command would import
from fastqwen.cli.main import main


def attempt(path: str) -> dict[str, object]:
    with tempfile.TemporaryFile("w+") as said:
        start_s = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _run(path, said.fileno())
        _, status, usage = os.wait4(pid, 0)
        said.seek(0)
        return {
            "path": path,
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - start_s,
            "rss_bytes": usage.ru_maxrss * 1024,
            "said": said.read(),
        }


def _run(path: str, said: int) -> None:
    """The child: does not return."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    sys.argv = ["fastqwen", "generate", path, "hello", "--max-tokens", "1"]
    status = 70
    try:
        main()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(attempt(line.strip())), flush=True)
