"""Prometheus metrics under vLLM's names, so that existing dashboards work."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from fastqwen.client.engine import Sleeper
from fastqwen.engine.core import STEP_BOUNDS_TOKENS, EngineStats
from fastqwen.server.answer.state import ServerState
from fastqwen.version import __version__

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


def metrics_text(*states: ServerState) -> bytes:
    """Of one model, or of several, told apart by their names."""
    return generate_latest(_Joined(states))


MOST_STALE_S = 0.02  # less than a request takes, so that who asks behind it finds it counted


class MetricsPage:
    """What /metrics answers. Writing it costs milliseconds, so it is written at most so often that this takes a fifth of the
    processor: who asks sooner gets what the one before got."""

    def __init__(self, states: Callable[[], Iterable[ServerState]]) -> None:
        self._states = states
        self._text = b""
        self._good_until_s = -math.inf

    def text(self) -> bytes:
        if time.monotonic() >= self._good_until_s:
            begin_s = time.thread_time()
            self._text = metrics_text(*self._states())
            self._good_until_s = time.monotonic() + min(MOST_STALE_S, 4 * (time.thread_time() - begin_s))
        return self._text


class _Joined(Collector):
    def __init__(self, states: Sequence[ServerState]) -> None:
        self._states = states

    def collect(self) -> Iterator[Metric]:
        """Each family once, with the samples of all."""
        found: dict[str, Metric] = {}
        for state in self._states:
            for family in _Families(state).collect():
                known = found.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        yield from found.values()


class _Families:
    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._model_name = state.names[0]

    def collect(self) -> Iterator[Metric]:
        engine, metrics = self._state.engine, self._state.metrics
        stats = engine.stats()
        for field, (name, text) in ENGINE_GAUGES.items():
            yield self._gauge(f"vllm:{name}", text, [((), getattr(stats, field))])
        reasons = [(("capacity",), stats.num_waiting), (("deferred",), 0)]  # nothing here waits for anything but room
        waiting = "Sequences waiting, by what for"
        yield self._gauge("vllm:num_requests_waiting_by_reason", waiting, reasons, labels=["reason"])
        for field, (name, text) in ENGINE_COUNTERS.items():
            yield self._counter(name, text, [((), getattr(stats, field))])
        yield self._counter("prompt_tokens", "Prompt tokens processed", [((), metrics.prompt_tokens)])
        yield self._counter("generation_tokens", "Tokens generated", [((), metrics.generation_tokens)])
        restarts = "Times that the engine process was started again"
        yield self._counter("engine_restarts", restarts, [((), engine.num_restarts)])
        finished = [((reason,), count) for reason, count in metrics.finished.items()]
        yield self._counter("request_success", "Requests that ended", finished, labels=["finished_reason"])
        # vLLM's words for its two limits; here there is the one, on requests.
        rejected = [(("max_num_queued_reqs",), metrics.rejections), (("max_num_queued_tokens",), 0)]
        turned_away = "Requests that --max-concurrent-requests turned away"
        yield self._counter("admission_rejections", turned_away, rejected, labels=["reason"])
        yield self._step_tokens(stats)
        yield from self._of_the_engine(stats)
        for one in metrics.histograms:
            family = HistogramMetricFamily(f"vllm:{one.name}", one.text, labels=["model_name"])
            family.add_metric([self._model_name], *one.buckets())
            yield family
        lines = [] if engine.ready is None else engine.ready.comparison
        sides = [((one.what, side), getattr(one, side)) for one in lines for side in ("planned", "measured")]
        planned = "What was planned and what was measured at start"
        yield self._gauge("fastqwen:plan", planned, sides, labels=["figure", "side"])
        version = "1, with the version as a label"
        yield self._gauge("fastqwen:info", version, [((__version__,), 1)], labels=["version"])

    def _step_tokens(self, stats: EngineStats) -> Metric:
        family = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens in a step", labels=["model_name"])
        counts = list(accumulate(stats.steps_by_tokens or [0] * (len(STEP_BOUNDS_TOKENS) + 1)))
        bounds = [*(str(float(bound)) for bound in STEP_BOUNDS_TOKENS), "+Inf"]
        buckets = list(zip(bounds, map(float, counts), strict=True))
        family.add_metric([self._model_name], buckets, float(stats.num_step_tokens))
        return family

    def _of_the_engine(self, stats: EngineStats) -> Iterator[Metric]:
        engine, config = self._state.engine, self._state.engine_config
        cached = "Prompt tokens that were not computed again"
        yield self._counter("prompt_tokens_cached", cached, [((), stats.prefix_hits_tokens)])
        depth = engine.depth if isinstance(engine, Sleeper) else None
        said_of = {"awake": depth is None, "weights_offloaded": depth == 1, "discard_all": depth == 2}
        states = [((name,), float(holds)) for name, holds in said_of.items()]
        yield self._gauge("vllm:engine_sleep_state", "1 for the state it is in", states, labels=["sleep_state"])
        size_tokens = stats.num_blocks * self._state.block_size
        max_model_len = self._state.facts().max_model_len if engine.ready is not None else 0
        labels = {
            "block_size": self._state.block_size,
            "num_gpu_blocks": stats.num_blocks,
            "kv_cache_size_tokens": size_tokens,
            "kv_cache_max_concurrency": round(size_tokens / max_model_len, 2) if max_model_len else 0.0,
            "enable_prefix_caching": config.enable_prefix_caching,
            "gpu_memory_utilization": config.gpu_memory_utilization,
        }
        said = [(tuple(map(str, labels.values())), 1.0)]
        yield self._gauge("vllm:cache_config_info", "1, with the cache's sizes as labels", said, labels=[*labels])

    def _gauge(self, name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        return self._filled(GaugeMetricFamily(name, text, labels=["model_name", *labels]), samples)

    def _counter(self, name: str, text: str, samples: Samples, labels: Sequence[str] = ()) -> Metric:
        return self._filled(CounterMetricFamily(f"vllm:{name}", text, labels=["model_name", *labels]), samples)

    def _filled(self, family: GaugeMetricFamily | CounterMetricFamily, samples: Samples) -> Metric:
        for labels, value in samples:
            family.add_metric([self._model_name, *labels], value)
        return family
