"""Prometheus metrics under vLLM's names, so that existing dashboards work."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastqwen.engine.core import EngineStats

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 2.0)
TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Metrics:
    """A registry of its own, so that two servers in one process (tests) do not collide."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._label = {"model_name": model_name}
        self.success = self._counter("request_success", "Requests that ended", ["finished_reason"])
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.e2e_s = self._histogram("e2e_request_latency_seconds", "Time from request to its last token", LATENCY_S)
        self.ttft_s = self._histogram("time_to_first_token_seconds", "Time from request to its first token", LATENCY_S)
        self.tpot_s = self._histogram("time_per_output_token_seconds", "Mean time per token after the first", TOKEN_S)
        self.itl_s = self._histogram("inter_token_latency_seconds", "Time between two tokens of a request", TOKEN_S)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt length", TOKENS)
        self.request_generation_tokens = self._histogram("request_generation_tokens", "Answer length", TOKENS)
        self._running = self._gauge("num_requests_running", "Sequences in the engine's batch")
        self._waiting = self._gauge("num_requests_waiting", "Sequences waiting for room")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1")
        self._preemptions = self._gauge("num_preemptions_total", "Sequences pushed out to be recomputed")
        self._queries = self._gauge("prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache")
        self._hits = self._gauge("prefix_cache_hits_total", "Prompt tokens found in the prefix cache")
        self._corrupted = self._gauge("corrupted_requests_total", "Requests ended because of NaN or infinity")

    def text(self, stats: EngineStats) -> bytes:
        self._running.labels(**self._label).set(stats.num_running)
        self._waiting.labels(**self._label).set(stats.num_waiting)
        self._kv_usage.labels(**self._label).set(stats.kv_usage)
        self._preemptions.labels(**self._label).set(stats.num_preemptions)
        self._queries.labels(**self._label).set(stats.prefix_queries_tokens)
        self._hits.labels(**self._label).set(stats.prefix_hits_tokens)
        self._corrupted.labels(**self._label).set(stats.num_corrupted)
        return generate_latest(self.registry)

    def finished(self, reason: str) -> None:
        self.success.labels(**self._label, finished_reason=reason).inc()

    def count(self, counter: Counter, amount: int) -> None:
        counter.labels(**self._label).inc(amount)

    def observe(self, histogram: Histogram, value: float) -> None:
        histogram.labels(**self._label).observe(value)

    def _counter(self, name: str, text: str, more: list[str] | None = None) -> Counter:
        return Counter(f"vllm:{name}", text, ["model_name", *(more or [])], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, ["model_name"], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
