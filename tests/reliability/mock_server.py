"""``python -m tests.reliability.mock_server MODEL_FOLDER JSON``: the real server with the mock engine behind it."""

from __future__ import annotations

import json
import sys
from typing import Any

from fastqwen.config import EngineConfig
from fastqwen.errors import FastqwenError
from fastqwen.server.config import ServerConfig
from fastqwen.server.run import serve


def run(folder: str, options: dict[str, Any]) -> int:
    engine = EngineConfig(model=folder, **options.pop("engine", {}))
    options["api_keys"] = tuple(options.get("api_keys", ()))
    try:
        return serve(
            engine, ServerConfig(**options), engine_command=(sys.executable, "-m", "tests.reliability.mock_engine")
        )
    except FastqwenError as error:
        print(f"fastqwen: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], json.loads(sys.argv[2])))
