"""``python -m tests.cluster.mock_worker MODEL_FOLDER JSON``: the real worker with the mock engine behind it."""

from __future__ import annotations

import json
import sys
from typing import Any

from fastqwen.cluster.config import WorkerConfig
from fastqwen.cluster.worker import work
from fastqwen.config import EngineConfig
from fastqwen.errors import FastqwenError


def run(folder: str, options: dict[str, Any]) -> int:
    engine = EngineConfig(model=folder, **options.pop("engine", {}))
    command = (sys.executable, "-m", "tests.reliability.mock_engine")
    try:
        return work(engine, WorkerConfig(**options), engine_command=command)
    except FastqwenError as error:
        print(f"fastqwen: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], json.loads(sys.argv[2])))
