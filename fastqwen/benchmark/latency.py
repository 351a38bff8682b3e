"""``bench latency``: milliseconds a step while decoding, and tokens a second while reading prompts."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from fastqwen.benchmark.machine import Machine, measure, synchronize
from fastqwen.benchmark.progress import Progress, say
from fastqwen.benchmark.report import describe, finish, percent, shares, table
from fastqwen.benchmark.work import decode_step, prefill, random_ids
from fastqwen.client.engine import BlockingStream
from fastqwen.client.local_engine import LocalEngine
from fastqwen.client.model import LoadedModel
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig
from fastqwen.hub import find_checkpoint
from fastqwen.model_config import ModelConfig
from fastqwen.plan import choose_dtype
from fastqwen.plot import save_plot
from fastqwen.records import EngineRequest, Sampling, SamplingParams, StructuredOutputs
from fastqwen.runner.device import choose_device, device_facts

GREEDY = Sampling(temperature=0.0)
QWEN = Sampling(temperature=0.6, top_p=0.95, top_k=20)  # as Qwen's generation_config.json has it
PRESENCE_PENALTY = 1.5  # what Qwen's model cards advise against endless repetitions


def sampling_of(*, sampled: bool, penalties: bool, logprobs: int | None) -> Sampling:
    found = QWEN if sampled or penalties else GREEDY
    penalty = PRESENCE_PENALTY if penalties else 0.0
    return msgspec.structs.replace(found, presence_penalty=penalty, logprobs=logprobs)


def run(
    config: EngineConfig,
    *,
    batch_sizes: list[int],
    input_lens: list[int],
    output_len: int,
    prompts: tuple[int, int],
    iters: int,
    sampling: Sampling = GREEDY,
    json_schema: dict[str, Any] | None = None,
    plot: Path | None = None,
) -> None:
    bench = Bench(config, sampling, json_schema)
    print(describe(bench.machine), flush=True)
    decoded = [bench.decode(batch, length, output_len, iters) for length in input_lens for batch in batch_sizes]
    results = [*decoded, bench.prefill(*prompts, iters)]
    rows = [
        [str(one["work"]), f"{one['ms']:.2f}", f"{one['tokens_per_s']:.1f}", percent(one["bandwidth_share"]),
         percent(one["flop_share"]), "-" if one.get("host_ms") is None else f"{one['host_ms']:.2f}"]
        for one in results
    ]  # fmt: skip
    headers = ["work", "ms", "tokens/s", "of bandwidth", "of FLOP rate", "host ms"]
    if json_schema is not None:
        headers.append("ms of rows without it")
        rows = [
            [*row, "-" if one.get("free_ms") is None else f"{one['free_ms']:.2f}"]
            for row, one in zip(rows, results, strict=True)
        ]
    print(table(headers, rows), flush=True)
    finish("latency", bench.machine, {"model": config.model, "load_s": round(bench.load_s, 2), "results": results})
    if plot is not None:  # last: a disk that is full must not cost the figures
        from fastqwen.benchmark.curves import plot_decode

        shown = decoded[: len(batch_sizes)]  # of the first length
        save_plot(plot_decode(config.model, bench.machine, shown, input_len=input_lens[0], output_len=output_len), plot)


def machine_for(config: EngineConfig) -> tuple[Machine, ModelConfig]:
    """The machine, measured before the model takes its memory, and what the model says of itself."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    _, model = find_checkpoint(config)
    device = choose_device(config)
    say("Measuring this machine's memory and arithmetic, a few seconds ...")
    return measure(device, choose_dtype(config.dtype, model, device_facts(device))[0]), model


def gpus_of(config: EngineConfig) -> int:
    """Each reads its part of what a step needs; processes on a CPU share its memory."""
    return config.tensor_parallel_size if choose_device(config).type == "cuda" else 1


class Run(NamedTuple):
    """Seconds until all sequences had their tokens, and until those without a grammar had."""

    all_s: float
    free_s: float


class Bench:
    """An engine of its own, without a prefix cache: every token is computed. With ``json_schema`` every second sequence of
    a decoding batch is held to it."""

    def __init__(self, config: EngineConfig, sampling: Sampling, json_schema: dict[str, Any] | None = None) -> None:
        self._sampling = sampling
        self.machine, _ = machine_for(config)
        start_s = time.perf_counter()
        loaded = LoadedModel(config)
        self.load_s = time.perf_counter() - start_s
        wish = None if json_schema is None else StructuredOutputs(json=json_schema)
        self._grammar = loaded.grammar(SamplingParams(structured_outputs=wish))
        self._engine = LocalEngine(loaded.core, loaded.ready)
        self._model, self._plan = loaded.ready.model, loaded.ready.plan
        self._device = choose_device(config)
        self._num_gpus = gpus_of(config)
        self._kv_cache_dtype = config.kv_cache_dtype
        self._random = random.Random(config.seed or 0)  # noqa: S311 not a secret
        self._ids = itertools.count()

    def decode(self, batch: int, input_len: int, output_len: int, iters: int) -> dict[str, Any]:
        """(time for 1 + n tokens - time for 1 token) / n, the median of several."""
        self._fits(batch, input_len + output_len + 1)
        work = f"decode, {batch} at {input_len}+{output_len} tokens"
        progress = Progress(work, 2 + iters * (2 + output_len), "steps")
        self._run(batch, input_len, 2, progress)
        times = []
        for _ in range(iters):
            first, whole = (self._run(batch, input_len, count, progress) for count in (1, 1 + output_len))
            times.append(Run(*((after - before) / output_len for before, after in zip(first, whole, strict=True))))
        step_s = statistics.median(one.all_s for one in times)
        context = input_len + output_len / 2
        needs = decode_step(
            self._model, self._plan.dtype, batch=batch, context_tokens=context,
            num_gpus=self._num_gpus, kv_cache_dtype=self._kv_cache_dtype,
        )  # fmt: skip
        return {
            "work": work,
            "batch": batch,
            "ms": step_s * 1e3,
            "tokens_per_s": batch / step_s,
            "free_ms": None if self._grammar is None else statistics.median(one.free_s for one in times) * 1e3,
            "host_ms": self._host_ms(batch, input_len, output_len),
            **shares(needs, step_s, self.machine),
        }

    def _host_ms(self, batch: int, input_len: int, output_len: int) -> float | None:
        """None where the host computes the step itself."""
        if self._device.type != "cuda":
            return None
        with self._begin(batch, input_len, 1 + output_len) as stream:
            return host_ms(stream, lambda: synchronize(self._device))

    def prefill(self, batch: int, tokens: int, iters: int) -> dict[str, Any]:
        self._fits(min(batch, self._plan.max_num_seqs), tokens + 1)
        work = f"prefill, {batch} x {tokens} tokens"
        progress = Progress(work, (1 + iters * batch) * tokens, "tokens")
        times = []
        for count in (1, *[batch] * iters):  # the first one only warms up
            times.append(self._run(count, tokens, 1).all_s)
            progress.tick(count * tokens)
        prefill_s = statistics.median(times[1:])
        needs = prefill(self._model, self._plan.dtype, batch=batch, tokens=tokens, num_gpus=self._num_gpus)
        return {
            "work": work,
            "batch": batch,
            "ms": prefill_s * 1e3,
            "tokens_per_s": batch * tokens / prefill_s,
            **shares(needs, prefill_s, self.machine),
        }

    def _fits(self, batch: int, tokens: int) -> None:
        plan = self._plan
        room = plan.num_blocks * plan.block_size
        if tokens > plan.max_model_len or batch > plan.max_num_seqs or batch * tokens > room:
            raise BadConfig(
                f"{batch} sequences of {tokens} tokens do not run at once here: at most {plan.max_num_seqs} sequences, "
                f"{plan.max_model_len} tokens each and {room} in all; see --max-num-seqs and --kv-cache-memory-bytes"
            )

    def _run(self, batch: int, input_len: int, output_len: int, progress: Progress | None = None) -> Run:
        requests = self._requests(batch, input_len, output_len)
        free = {request.request_id for request in requests if request.grammar is None}
        with self._engine.stream(requests) as stream:
            synchronize(self._device)
            start_s = end_s = free_s = time.perf_counter()
            for deltas in stream:
                end_s = time.perf_counter()
                if any(delta.request_id in free for delta in deltas):
                    free_s = end_s
                if progress is not None:
                    progress.tick()
        return Run(end_s - start_s, free_s - start_s)

    def _begin(self, batch: int, input_len: int, output_len: int) -> BlockingStream:
        return self._engine.stream(self._requests(batch, input_len, output_len))

    def _requests(self, batch: int, input_len: int, output_len: int) -> list[EngineRequest]:
        return [
            EngineRequest(
                request_id=str(next(self._ids)),
                prompt_token_ids=random_ids(self._random, input_len, self._model.vocab_size),
                sampling=self._sampling,
                stop_token_ids=[],
                max_tokens=output_len,
                seed=0,
                grammar=self._grammar if index % 2 else None,
            )
            for index in range(batch)
        ]


def host_ms(steps: Iterator[object], synchronize: Callable[[], None]) -> float:
    """Milliseconds of the host's work in a step, the median of ``steps``, an iterator that computes one each time.

    Each step is begun when the device has nothing left to do, so nothing in it waits for the device. As long as this is less
    than a whole step takes, the host, which is a step ahead, costs nothing.
    """
    spent_s: list[float] = []
    while True:
        synchronize()
        start_s = time.perf_counter()
        if next(steps, None) is None:
            return statistics.median(spent_s) * 1e3
        spent_s.append(time.perf_counter() - start_s)
