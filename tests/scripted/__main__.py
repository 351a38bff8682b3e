"""See the package. Runs until a signal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fastqwen.config import EngineConfig
from fastqwen.server.config import ServerConfig
from fastqwen.server.run import serve

TUPLES = ("api_keys", "allowed_origins", "allowed_hosts")


def main(folder: str, options_json: str = "{}") -> int:
    options = json.loads(options_json)
    engine = EngineConfig(model=folder, **options.pop("engine", {}))
    options.update({name: tuple(options[name]) for name in TUPLES if name in options})
    root = str(Path(__file__).parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return serve(engine, ServerConfig(**options), engine_command=(sys.executable, "-m", "tests.scripted.engine"))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
