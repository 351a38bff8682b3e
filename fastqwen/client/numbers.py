"""An engine's numbers as a script reads them."""

from __future__ import annotations

from fastqwen.engine.core import EngineStats
from fastqwen.outputs import Counter, Gauge, Metric


def metrics_of(stats: EngineStats, labels: dict[str, str]) -> list[Metric]:
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
    found: list[Metric] = [Gauge(f"vllm:{name}", value, dict(labels)) for name, value in gauges.items()]
    return found + [Counter(f"vllm:{name}", value, dict(labels)) for name, value in counters.items()]
