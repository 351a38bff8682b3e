"""``python -m tests.reliability.load URL STREAMS TOKENS [ROUTE]``: streams at once, read without a client library.

ROUTE is completions or chat.
Prints one line of JSON: errors, time to first token, gaps between tokens, tokens per second.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


async def one_stream(
    host: str, port: int, path: str, body: dict[str, Any], gaps_s: list[float], firsts_s: list[float]
) -> int:
    """The number of events with text. Raises AssertionError for a stream that is not whole."""
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(data)}\r\n\r\n".encode()
    start_s = last_s = time.perf_counter()
    writer.write(head + data)
    count = 0
    whole = False
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            whole = True
            break
        if line.startswith(b"data: {") and b'"role":"assistant"' not in line:  # chat's first event has no text
            now_s = time.perf_counter()
            (gaps_s if count else firsts_s).append(now_s - (last_s if count else start_s))
            last_s = now_s
            count += 1
            assert b'"error"' not in line, line
    writer.close()
    assert whole, "the stream ended without [DONE]"
    return count


async def load(url: str, streams: int, tokens: int, route: str = "completions") -> dict[str, Any]:
    parts = urlsplit(url)
    gaps_s: list[float] = []
    firsts_s: list[float] = []
    start_s = time.perf_counter()

    async def one(index: int) -> int:
        body = {"max_tokens": tokens, "stream": True, "seed": index, "ignore_eos": True}
        if route == "chat":
            body["messages"] = [{"role": "user", "content": f"stream {index}"}]
        else:
            body["prompt"] = f"stream {index}"
        return await one_stream(str(parts.hostname), int(parts.port or 80), PATHS[route], body, gaps_s, firsts_s)

    found = await asyncio.gather(*(one(index) for index in range(streams)), return_exceptions=True)
    wall_s = time.perf_counter() - start_s
    counts = [one for one in found if isinstance(one, int)]
    return {
        "streams": streams,
        "errors": len(found) - len(counts),
        "first_error": next((repr(one) for one in found if not isinstance(one, int)), None),
        "tokens": sum(counts),
        "wall_s": round(wall_s, 2),
        "tokens_per_s": round(sum(counts) / wall_s),
        "ttft_p99_ms": percentile_ms(firsts_s, 0.99),
        "gap_p50_ms": percentile_ms(gaps_s, 0.5),
        "gap_p99_ms": percentile_ms(gaps_s, 0.99),
    }


def percentile_ms(values_s: list[float], share: float) -> float:
    return round(sorted(values_s)[int(len(values_s) * share)] * 1000, 1) if values_s else 0.0


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:5]))))
