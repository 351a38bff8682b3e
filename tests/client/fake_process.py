"""``python -m tests.client.fake_process ADDRESS LOG_FORMAT``: an engine process around the executor that computes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from fastqwen.ipc import wire
from fastqwen.ipc.engine_main import main
from tests.engine.fakes import READY, make_engine


def start(message: wire.Start, progress: Callable[[int, int], None]) -> Any:
    core, executor = make_engine(blocks=1024)
    executor.fail, executor.step_s = {"bad"}, 0.002
    progress(1, 1)
    return SimpleNamespace(
        core=core, compiler=None, plan=READY.plan, model=READY.model, comparison=READY.comparison, check=lambda: None,
        weights=None,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], start))
