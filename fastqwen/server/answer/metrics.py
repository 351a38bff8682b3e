"""What is counted of answers: numbers, lengths and times. operator/prometheus.py shows it."""

from __future__ import annotations

import time
from bisect import bisect_left
from itertools import accumulate

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 2.0)
TOKENS = (1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
NUMBERS = (1, 2, 4, 8, 16, 32, 64, 128)


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
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum


class Metrics:
    """Of all answers since the start."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.rejections = 0  # requests that a limit on how many may run or wait turned away
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
        self.queue_s = make("request_queue_time_seconds", "Time that a request waited for other requests", LATENCY_S)
        self.prefill_s = make("request_prefill_time_seconds", "Time from the first step to the first token", LATENCY_S)
        self.inference_s = make(
            "request_inference_time_seconds", "Time from the first step to the last token", LATENCY_S
        )
        self.request_max_tokens = make("request_params_max_tokens", "Longest answer that was asked for", TOKENS)
        self.request_longest = make("request_max_num_generation_tokens", "Length of a request's longest answer", TOKENS)
        self.request_n = make("request_params_n", "Answers asked for", NUMBERS)
        self.request_preemptions = make("request_num_preemptions", "Times that an answer was preempted", PREEMPTIONS)
        self.request_computed = make(
            "request_prefill_kv_computed_tokens", "Prompt tokens that were not in the prefix cache", TOKENS
        )
        self.histograms = [one for one in vars(self).values() if isinstance(one, Histogram)]


class RequestClock:
    """Times of one request's answers."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int, num_choices: int) -> None:
        self._metrics = metrics
        self._start_s = time.perf_counter()
        self._first_s = [0.0] * num_choices
        self._last_s = [0.0] * num_choices
        self._num_left, self._longest = num_choices, 0
        self._num_prompt_tokens = num_prompt_tokens
        self.waited_s = 0.0  # for other requests, as the engine tells with the first token
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
            if index == 0:
                waited_s = min(self.waited_s, now_s - self._start_s)
                self._metrics.queue_s.observe(waited_s)
                self._metrics.prefill_s.observe(now_s - self._start_s - waited_s)
        self._last_s[index] = now_s
        self._metrics.generation_tokens += num_tokens

    def timing(self) -> dict[str, float]:
        """Where the first answer's time went: before its first step, until its first token, from there to its last."""
        first_s = self._first_s[0] or time.perf_counter()
        waited_s = min(self.waited_s, first_s - self._start_s)
        return {
            "waited_s": round(waited_s, 4),
            "read_s": round(first_s - self._start_s - waited_s, 4),
            "wrote_s": round(max(0.0, self._last_s[0] - first_s), 4),
        }

    def told(self, num_tokens: int) -> dict[str, float]:
        """The first answer's times under vLLM's names, without those that it had not."""
        first_s, last_s = self._first_s[0], self._last_s[0]
        if not first_s:
            return {}
        begun_s = self._start_s + min(self.waited_s, first_s - self._start_s)
        found = {
            "queue_time_ms": begun_s - self._start_s,
            "time_to_first_token_ms": first_s - begun_s,
            "generation_time_ms": last_s - first_s,
        }
        if num_tokens > 1:
            found["mean_itl_ms"] = (last_s - first_s) / (num_tokens - 1)
        return {
            **{name: round(seconds * 1e3, 3) for name, seconds in found.items()},
            "tokens_per_second": round(num_tokens / max(last_s - begun_s, 1e-6), 3),
        }

    def finished(
        self, index: int, reason: str, num_tokens: int, *, num_cached_tokens: int = 0, num_preemptions: int = 0
    ) -> None:
        metrics, first_s, last_s = self._metrics, self._first_s[index], self._last_s[index]
        metrics.finished[reason] += 1
        metrics.request_generation_tokens.observe(num_tokens)
        metrics.request_preemptions.observe(num_preemptions)
        metrics.request_computed.observe(self._num_prompt_tokens - num_cached_tokens)
        self._num_left, self._longest = self._num_left - 1, max(self._longest, num_tokens)
        if not self._num_left:
            metrics.request_longest.observe(self._longest)
        if not first_s:
            return
        metrics.e2e_s.observe(last_s - self._start_s)
        metrics.decode_s.observe(last_s - first_s)
        metrics.inference_s.observe(last_s - self._start_s - min(self.waited_s, first_s - self._start_s))
        if num_tokens > 1:
            per_token_s = (last_s - first_s) / (num_tokens - 1)
            metrics.tpot_s.observe(per_token_s)
            metrics.request_tpot_s.observe(per_token_s)
