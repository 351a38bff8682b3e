"""``bench serve``: closed loops of streaming clients against a server, a running one or one that is started here."""

from __future__ import annotations

import json
import random
import time
from contextlib import closing
from typing import Any

from fastqwen.benchmark.http_load import Stream, Target, closed_loop
from fastqwen.benchmark.machine import Machine
from fastqwen.benchmark.progress import Progress
from fastqwen.benchmark.report import describe, finish, percent, shares, table
from fastqwen.benchmark.work import decode_step, random_ids
from fastqwen.client.own_server import own_server
from fastqwen.client.remote import RemotePartner, is_address
from fastqwen.config import EngineConfig
from fastqwen.errors import FastqwenError
from fastqwen.model_config import ModelConfig
from fastqwen.server.http.listen import run_loop

SAFE_VOCAB = 200  # every tokenizer has that many ids
REQUESTS_PER_STREAM = 4


def run(
    where: str,
    engine_options: dict[str, Any],
    *,
    levels: list[int],
    num_requests: int | None,
    input_len: int,
    output_len: int,
    api_key: str | None,
) -> None:
    load = Load(input_len, output_len, num_requests, api_key)
    if is_address(where):
        _report(load, where, None, None, [load.level(where, level, SAFE_VOCAB) for level in levels])
        return
    from fastqwen.benchmark.latency import machine_for

    config = EngineConfig(model=where, **engine_options)
    machine, model = machine_for(config)
    print(describe(machine), flush=True)
    with own_server(config) as url:
        results = [load.level(url, level, model.vocab_size) for level in levels]
    _report(load, where, machine, model, results)


class Load:
    """The same random work at every level of concurrency, with other prompts each time."""

    def __init__(self, input_len: int, output_len: int, num_requests: int | None, api_key: str | None) -> None:
        self.input_len, self.output_len = input_len, output_len
        self._num_requests = num_requests
        self._model = ""
        self._api_key = api_key
        self._random = random.Random(0)  # noqa: S311 not a secret

    def level(self, url: str, concurrency: int, vocab_size: int) -> dict[str, Any]:
        target = Target(url, {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {})
        with closing(RemotePartner(url, self._api_key)) as server:
            self._model = server.name
        count = self._num_requests or max(8, REQUESTS_PER_STREAM * concurrency)
        run_loop(closed_loop(target, [self._body(vocab_size, 2)], 1))
        bodies = [self._body(vocab_size, self.output_len) for _ in range(count)]
        progress = Progress(f"{concurrency} streams", count * self.output_len, "tokens")
        start_s = time.perf_counter()
        streams = run_loop(closed_loop(target, bodies, concurrency, lambda one: progress.tick(one.num_tokens)))
        return summary(streams, concurrency, time.perf_counter() - start_s)

    def _body(self, vocab_size: int, output_len: int) -> bytes:
        """Written as JSON here, before the clock starts."""
        body = {
            "model": self._model,
            "prompt": random_ids(self._random, self.input_len, vocab_size),
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body).encode()


def summary(streams: list[Stream], concurrency: int, seconds: float) -> dict[str, Any]:
    good = [stream for stream in streams if stream.error is None]
    errors = [stream.error for stream in streams if stream.error is not None]
    if not good:
        raise FastqwenError(f"no request succeeded, the first error was: {errors[0]}")
    gaps = [gap for stream in good for gap in stream.gaps_s]
    first = [stream.ttft_s for stream in good]
    return {
        "concurrency": concurrency,
        "requests": len(streams),
        "errors": len(errors),
        "first_error": errors[0] if errors else None,
        "seconds": seconds,
        "output_tokens_per_s": sum(stream.num_tokens for stream in good) / seconds,
        "ttft_p50_ms": quantile(first, 0.5) * 1e3,
        "ttft_p99_ms": quantile(first, 0.99) * 1e3,
        "itl_p50_ms": quantile(gaps, 0.5) * 1e3,
        "itl_p99_ms": quantile(gaps, 0.99) * 1e3,
    }


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -(-len(ranked) * round(share * 1000) // 1000) - 1)] if ranked else 0.0


def _report(
    load: Load, where: str, machine: Machine | None, model: ModelConfig | None, results: list[dict[str, Any]]
) -> None:
    headers = ["streams", "requests", "output tok/s", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "errors"]
    if machine is not None and model is not None:
        headers += ["of bandwidth", "of FLOP rate"]
        for one in results:
            context = load.input_len + load.output_len / 2
            needs = decode_step(model, machine.dtype, batch=one["concurrency"], context_tokens=context)
            one |= shares(needs, one["concurrency"] / one["output_tokens_per_s"], machine)
    rows = []
    for one in results:
        row = [
            str(one["concurrency"]),
            str(one["requests"]),
            f"{one['output_tokens_per_s']:.1f}",
            f"{one['ttft_p50_ms']:.0f} / {one['ttft_p99_ms']:.0f}",
            f"{one['itl_p50_ms']:.1f} / {one['itl_p99_ms']:.1f}",
            str(one["errors"]),
        ]
        if machine is not None:
            row += [percent(one["bandwidth_share"]), percent(one["flop_share"])]
        rows.append(row)
    print(table(headers, rows), flush=True)
    finish(
        "serve",
        machine,
        {"target": where, "input_len": load.input_len, "output_len": load.output_len, "results": results},
    )
