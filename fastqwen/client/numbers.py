"""An engine's numbers as a script reads them."""

from __future__ import annotations

from itertools import accumulate

from fastqwen.engine.core import STEP_BOUNDS_TOKENS, EngineStats
from fastqwen.outputs import Counter, Gauge, Histogram, Metric


def metrics_of(stats: EngineStats, labels: dict[str, str]) -> list[Metric | Histogram]:
    """Under vLLM's names."""
    gauges = {
        "num_requests_running": stats.num_running,
        "num_requests_waiting": stats.num_waiting,
        "kv_cache_usage_perc": stats.kv_usage,
    }
    counters = {
        "num_preemptions": stats.num_preemptions,
        "prefix_cache_queries": stats.prefix_queries_tokens,
        "prefix_cache_hits": stats.prefix_hits_tokens,
        "corrupted_requests": stats.num_corrupted,
    }
    found: list[Metric | Histogram] = [Gauge(f"vllm:{name}", value, dict(labels)) for name, value in gauges.items()]
    found += [Counter(f"vllm:{name}", value, dict(labels)) for name, value in counters.items()]
    counts = accumulate(stats.steps_by_tokens)
    buckets = dict(zip([*map(str, map(float, STEP_BOUNDS_TOKENS)), "+Inf"], counts, strict=False))
    name = "vllm:iteration_tokens_total"
    return [*found, Histogram(name, stats.num_steps, stats.num_step_tokens, buckets, dict(labels))]
