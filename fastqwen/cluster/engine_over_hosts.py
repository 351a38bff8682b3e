"""The engine's process where ranks are on several hosts.

``python -m fastqwen.cluster.engine_over_hosts PLACES ADDRESS LOG_FORMAT``
"""

from __future__ import annotations

import sys
from functools import partial

from fastqwen.ipc import engine_main

COMMAND = (sys.executable, "-P", "-m", "fastqwen.cluster.engine_over_hosts")
RANK_COMMAND = (sys.executable, "-P", "-m", "fastqwen.cluster.rank_over_hosts")


def main(places: str, address: str, log_format: str) -> int:
    start = partial(engine_main.start_real_engine, log_format=log_format, rank_command=(*RANK_COMMAND, places, "0"))
    return engine_main.main(address, log_format, start)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
