"""Prometheus metrics under vLLM's names, so that existing dashboards work."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from fastqwen.engine.core import EngineStats
from fastqwen.plan import Line
from fastqwen.version import __version__

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 2.0)
TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128)

# What the engine counts, by EngineStats' field.
ENGINE_GAUGES = {
    "num_running": ("num_requests_running", "Sequences in the engine's batch"),
    "num_waiting": ("num_requests_waiting", "Sequences waiting for room"),
    "kv_usage": ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1"),
}
ENGINE_COUNTERS = {
    "num_preemptions": ("num_preemptions", "Sequences pushed out to be recomputed"),
    "prefix_queries_tokens": ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hits_tokens": ("prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "num_corrupted": ("corrupted_requests", "Requests ended because of NaN or infinity"),
    "num_steps": ("engine_steps", "Steps that the engine has computed"),
}


Samples = Sequence[tuple[tuple[str, ...], float]]  # more labels than the model's name, and the value


class Histogram:
    """Counts per bucket and nothing else, because one is fed with every token."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self.name, self.text = name, text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' cumulative form, and the sum."""
        total, found = 0, []
        for bound, count in zip([*map(str, map(float, self._bounds)), "+Inf"], self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found, self._sum


class Metrics:
    """A registry of its own, so that two servers in one process (tests) do not collide."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._registry = CollectorRegistry()
        self._stats = EngineStats()
        self.num_restarts = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = dict.fromkeys(("stop", "length", "tool_calls", "abort", "error"), 0)
        make = Histogram
        self.e2e_s = make("e2e_request_latency_seconds", "Time from request to its last token", LATENCY_S)
        self.ttft_s = make("time_to_first_token_seconds", "Time from request to its first token", LATENCY_S)
        self.decode_s = make("request_decode_time_seconds", "Time from the first token to the last", LATENCY_S)
        self.tpot_s = make("time_per_output_token_seconds", "Mean time per token after the first", TOKEN_S)
        self.request_tpot_s = make("request_time_per_output_token_seconds", "The same, per request", TOKEN_S)
        self.itl_s = make("inter_token_latency_seconds", "Time between two tokens of a request", TOKEN_S)
        self.request_prompt_tokens = make("request_prompt_tokens", "Prompt length", TOKENS)
        self.request_generation_tokens = make("request_generation_tokens", "Answer length", TOKENS)
        self.request_n = make("request_params_n", "Answers asked for", NUMBERS)
        self.comparison: list[Line] = []
        self._histograms = [one for one in vars(self).values() if isinstance(one, Histogram)]
        self._registry.register(self)

    def text(self, stats: EngineStats, num_restarts: int = 0) -> bytes:
        self._stats, self.num_restarts = stats, num_restarts
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Asked by prometheus_client."""
        for field, (name, text) in ENGINE_GAUGES.items():
            yield self._gauge(f"vllm:{name}", text, [((), getattr(self._stats, field))])
        for field, (name, text) in ENGINE_COUNTERS.items():
            yield self._counter(name, text, [((), getattr(self._stats, field))])
        yield self._counter("prompt_tokens", "Prompt tokens processed", [((), self.prompt_tokens)])
        yield self._counter("generation_tokens", "Tokens generated", [((), self.generation_tokens)])
        restarts = "Times that the engine process was started again"
        yield self._counter("engine_restarts", restarts, [((), self.num_restarts)])
        finished = [((reason,), count) for reason, count in self.finished.items()]
        yield self._counter("request_success", "Requests that ended", finished, labels=["finished_reason"])
        for one in self._histograms:
            family = HistogramMetricFamily(f"vllm:{one.name}", one.text, labels=["model_name"])
            family.add_metric([self._model_name], *one.buckets())
            yield family
        sides = [((one.what, side), getattr(one, side)) for one in self.comparison for side in ("planned", "measured")]
        planned = "What was planned and what was measured at start"
        yield self._gauge("fastqwen:plan", planned, sides, labels=["figure", "side"])
        version = "1, with the version as a label"
        yield self._gauge("fastqwen:info", version, [((__version__,), 1)], labels=["version"])

    def _gauge(self, name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        return self._filled(GaugeMetricFamily(name, text, labels=["model_name", *labels]), samples)

    def _counter(self, name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        return self._filled(CounterMetricFamily(f"vllm:{name}", text, labels=["model_name", *labels]), samples)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
        for labels, value in samples:
            family.add_metric([self._model_name, *labels], value)
        return family


class RequestClock:
    """Times of one request's answers."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, num_choices: int) -> None:
        self._metrics = metrics
        self._start_s = time.perf_counter()
        self._first_s = [0.0] * num_choices
        self._last_s = [0.0] * num_choices
        metrics.prompt_tokens += num_prompt_tokens
        metrics.request_prompt_tokens.observe(num_prompt_tokens)
        metrics.request_n.observe(num_choices)

    def saw(self, index: int, num_tokens: int, now_s: float) -> None:
        """``num_tokens`` were read at ``now_s`` of the clock that began with the request."""
        if self._first_s[index]:
            self._metrics.itl_s.observe(now_s - self._last_s[index])
        else:
            self._first_s[index] = now_s
            self._metrics.ttft_s.observe(now_s - self._start_s)
        self._last_s[index] = now_s
        self._metrics.generation_tokens += num_tokens

    def finished(self, index: int, reason: str, num_tokens: int) -> None:
        metrics, first_s, last_s = self._metrics, self._first_s[index], self._last_s[index]
        metrics.finished[reason] += 1
        metrics.request_generation_tokens.observe(num_tokens)
        if not first_s:
            return
        metrics.e2e_s.observe(last_s - self._start_s)
        metrics.decode_s.observe(last_s - first_s)
        if num_tokens > 1:
            per_token_s = (last_s - first_s) / (num_tokens - 1)
            metrics.tpot_s.observe(per_token_s)
            metrics.request_tpot_s.observe(per_token_s)
