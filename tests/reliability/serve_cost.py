"""``python -m tests.reliability.serve_cost STREAMS REQUESTS [STEP_S]``: what the work of ``bench serve`` costs each process.

Prompts of 512 random ids, 128 output tokens, a closed loop, as in docs/performance.md; the engine is the mock one, whose
steps take STEP_S. Processor time a token of the benchmark's client, the API process and the mock engine, requests' own
costs included, after a round that warms up; one line of JSON.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from fastqwen.benchmark.http_load import Target, closed_loop
from fastqwen.benchmark.serve import summary
from fastqwen.server.http.listen import run_loop
from tests.reliability.mock_model import make_model
from tests.reliability.server import serving

PROMPT_TOKENS, OUTPUT_TOKENS, VOCAB = 512, 128, 200


def bodies(count: int) -> list[bytes]:
    wishes = {"max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    return [
        json.dumps(
            {
                "prompt": random.choices(range(VOCAB), k=PROMPT_TOKENS),
                "stream_options": {"include_usage": True},
                **wishes,
            }
        ).encode()
        for _ in range(count)
    ]


def used_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def serve_cost(streams: int, requests: int, step_s: float) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(make_model(Path(folder)), step_s=step_s, access_log=False, blocks=60_000) as server,
    ):
        target = Target(server.url, {})
        run_loop(closed_loop(target, bodies(requests), streams))
        work = bodies(requests)
        processes = {"client": psutil.Process(), "api": psutil.Process(server.process.pid), "engine": server.engine}
        before = {name: used_s(process) for name, process in processes.items()}
        start_s = time.perf_counter()
        found = run_loop(closed_loop(target, work, streams))
        result = summary(found, streams, time.perf_counter() - start_s)
        tokens = sum(one.num_tokens for one in found)
        for name, process in processes.items():
            result[f"{name}_us_a_token"] = round((used_s(process) - before[name]) / tokens * 1e6, 2)
        return result


if __name__ == "__main__":
    step_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0125
    print(json.dumps(serve_cost(int(sys.argv[1]), int(sys.argv[2]), step_s)))
