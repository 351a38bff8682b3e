"""``bench serve``: closed loops of streaming clients against a server, a running one or one that is started here."""

from __future__ import annotations

import json
import random
import time
from contextlib import closing
from typing import Any

from fastqwen.benchmark.http_load import Stream, Talk, Target, closed_loop, talk_loop
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
    turns: int,
    system_len: int,
    api_key: str | None,
) -> None:
    load = Load(input_len, output_len, num_requests, api_key, turns=turns, system_len=system_len)
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
    """The same random work at every level of concurrency, with other prompts each time.

    With ``turns`` requests are turns of conversations: each has all in front of it in its prompt, answers included, and
    before that a system prompt of ``system_len`` tokens, which all conversations share.
    """

    def __init__(
        self,
        input_len: int,
        output_len: int,
        num_requests: int | None,
        api_key: str | None,
        *,
        turns: int,
        system_len: int,
    ) -> None:
        self.input_len, self.output_len = input_len, output_len
        self.turns, self.system_len = turns, system_len
        self._num_requests = num_requests
        self._model = ""
        self._api_key = api_key
        self._random = random.Random(0)  # noqa: S311 not a secret

    @property
    def context_tokens(self) -> float:
        """What an answer's token sees, on average."""
        before = (self.turns - 1) / 2 * (self.input_len + self.output_len)
        return self.system_len + before + self.input_len + self.output_len / 2

    def level(self, url: str, concurrency: int, vocab_size: int) -> dict[str, Any]:
        target = Target(url, {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {})
        with closing(RemotePartner(url, self._api_key)) as server:
            self._model = server.name
        run_loop(closed_loop(target, [self._body(random_ids(self._random, self.input_len, vocab_size), 2)], 1))
        count = -(-(self._num_requests or max(8, REQUESTS_PER_STREAM * concurrency)) // self.turns)
        system = random_ids(self._random, self.system_len, vocab_size)
        talks = [self._talk(system, vocab_size) for _ in range(max(count, concurrency if self.turns > 1 else 1))]
        progress = Progress(f"{concurrency} streams", len(talks) * self.turns * self.output_len, "tokens")
        start_s = time.perf_counter()
        streams = run_loop(
            talk_loop(target, talks, concurrency, lambda one: progress.tick(one.num_tokens), keeps_lines=self.turns > 1)
        )
        return summary(streams, concurrency, time.perf_counter() - start_s)

    def _talk(self, system: list[int], vocab_size: int) -> Talk:
        """What its user says is drawn here, and the first request written, before the clock starts."""
        says = [random_ids(self._random, self.input_len, vocab_size) for _ in range(self.turns)]
        return self._turns(system + says[0], says[1:], self._body(system + says[0], self.output_len))

    def _turns(self, known: list[int], says: list[list[int]], first: bytes) -> Talk:
        answer = yield first
        for one in says:
            if answer.error is not None:
                return
            known = known + answer.token_ids + one
            answer = yield self._body(known, self.output_len)

    def _body(self, prompt: list[int], output_len: int) -> bytes:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return json.dumps(body | ({"return_token_ids": True} if self.turns > 1 else {})).encode()


def summary(streams: list[Stream], concurrency: int, seconds: float) -> dict[str, Any]:
    good = [stream for stream in streams if stream.error is None]
    errors = [stream.error for stream in streams if stream.error is not None]
    if not good:
        raise FastqwenError(f"no request succeeded, the first error was: {errors[0]}")
    gaps = [gap for stream in good for gap in stream.gaps_s]
    first = [stream.ttft_s for stream in good]
    prompt_tokens = sum(stream.num_prompt_tokens for stream in good)
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
        "normalized_latency_p90_ms": quantile([stream.normalized_latency_s for stream in good], 0.9) * 1e3,
        "prefix_hits": sum(stream.num_cached_tokens for stream in good) / prompt_tokens if prompt_tokens else None,
    }


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -(-len(ranked) * round(share * 1000) // 1000) - 1)] if ranked else 0.0


def _report(
    load: Load, where: str, machine: Machine | None, model: ModelConfig | None, results: list[dict[str, Any]]
) -> None:
    headers = [
        "streams", "requests", "output tok/s", "TTFT p50 / p99 ms", "ITL p50 / p99 ms", "ms a token p90", "prefix hits",
        "errors",
    ]  # fmt: skip
    if machine is not None and model is not None:
        headers += ["of bandwidth", "of FLOP rate"]
        for one in results:
            needs = decode_step(model, machine.dtype, batch=one["concurrency"], context_tokens=load.context_tokens)
            one |= shares(needs, one["concurrency"] / one["output_tokens_per_s"], machine)
    rows = []
    for one in results:
        row = [
            str(one["concurrency"]),
            str(one["requests"]),
            f"{one['output_tokens_per_s']:.1f}",
            f"{one['ttft_p50_ms']:.0f} / {one['ttft_p99_ms']:.0f}",
            f"{one['itl_p50_ms']:.1f} / {one['itl_p99_ms']:.1f}",
            f"{one['normalized_latency_p90_ms']:.1f}",
            "-" if one["prefix_hits"] is None else percent(one["prefix_hits"]),
            str(one["errors"]),
        ]
        if machine is not None:
            row += [percent(one["bandwidth_share"]), percent(one["flop_share"])]
        rows.append(row)
    print(table(headers, rows), flush=True)
    finish(
        "serve",
        machine,
        {
            "target": where,
            "input_len": load.input_len,
            "output_len": load.output_len,
            "turns": load.turns,
            "system_len": load.system_len,
            "results": results,
        },
    )
