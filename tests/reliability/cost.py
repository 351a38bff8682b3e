"""``python -m tests.reliability.cost STREAMS TOKENS [STEP_S] [ROUTE]``: processor time of the API process per streamed token.

Processor time, not the clock's, so that the figure holds on a machine that does other things as well. The first half of the
streams' life warms up; one line of JSON. ROUTE is completions or chat.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from tests.reliability.mock_model import make_model
from tests.reliability.server import ROOT, serving


def cost(streams: int, tokens: int, step_s: float, route: str = "completions") -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(make_model(Path(folder)), step_s=step_s, access_log=False, blocks=60_000) as server,
    ):
        process = psutil.Process(server.process.pid)
        command = [sys.executable, "-m", "tests.reliability.load", server.url, str(streams), str(tokens), route]
        before = process.cpu_times()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        after = process.cpu_times()
        found: dict[str, Any] = json.loads(done.stdout)
        used_s = after.user + after.system - before.user - before.system
        return {
            **found,
            "api_cpu_s": round(used_s, 2),
            "api_cpu_us_per_token": round(used_s / found["tokens"] * 1e6, 2),
            "system_share": round((after.system - before.system) / used_s, 2),
            "api_rss_mb": round(process.memory_info().rss / 1e6),
        }


if __name__ == "__main__":
    streams, tokens = int(sys.argv[1]), int(sys.argv[2])
    step_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0125
    print(json.dumps(cost(streams, tokens, step_s, *sys.argv[4:5])))
