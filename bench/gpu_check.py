"""One call on a GPU machine: are the kernels right, how fast is each, how fast is the engine.

python bench/gpu_check.py OUT.json [kernels] [random] [MODEL ... decode|steps|prefill|long|offline|profile [b1 b8 ...]]
    [sampled] [penalties] [logprobs] [kv_cache_dtype=int8] [quantization=int4] ...

Prints a short table last and writes everything to OUT.json. Dummy weights, the work defined in docs/performance.md, greedy;
``sampled`` and its like time the decoding steps once more with such requests.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastqwen.benchmark.latency import host_ms
from fastqwen.benchmark.report import commit
from fastqwen.benchmark.work import decode_step
from fastqwen.benchmark.work import prefill as prefill_work
from fastqwen.config import EngineConfig
from fastqwen.engine.core import EngineCore
from fastqwen.records import EngineRequest, SamplingParams
from fastqwen.runner.start import Engine, start_engine

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "tests" / "configs"
READ_BYTES_PER_S = 4.3e12  # the floor's bandwidth, as measured for reading and copying on one H200
RESULTS: dict[str, Any] = {}
QWEN = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}  # as Qwen's generation_config.json has it
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": QWEN,
    "penalties": {**QWEN, "presence_penalty": 1.5},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
}


def note(name: str, **values: Any) -> None:
    RESULTS.setdefault(name, {}).update(values)
    print(
        name,
        " ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
        ),
        flush=True,
    )


def start(model: str, **wishes: Any) -> Engine:
    began_s = time.perf_counter()
    config = EngineConfig(
        model=model, load_format="dummy", enable_prefix_caching=False, **{"prompts_first": True, **wishes}
    )
    engine = start_engine(config, CONFIGS / model)
    note(f"{model} start", seconds=time.perf_counter() - began_s, kv_blocks=engine.plan.num_blocks)
    return engine


def add(
    core: EngineCore, count: int, lengths: list[int], outputs: list[int], vocab: int, tag: str, kind: str = "greedy"
) -> None:
    generator = random.Random(0)
    for index in range(count):
        core.add(
            EngineRequest(
                request_id=f"{tag}-{index}",
                prompt_token_ids=[generator.randrange(vocab) for _ in range(lengths[index])],
                sampling=SamplingParams(**KINDS[kind]),
                stop_token_ids=[],
                max_tokens=outputs[index],
                seed=index,
            )
        )


def run(core: EngineCore) -> tuple[float, int]:
    """(seconds, tokens generated) until the engine is empty."""
    torch.cuda.synchronize()
    began_s, tokens = time.perf_counter(), 0
    while core.has_work:
        for delta in core.step():
            tokens += len(delta.token_ids)
    torch.cuda.synchronize()
    return time.perf_counter() - began_s, tokens


def each_step(core: EngineCore) -> Iterator[object]:
    while core.has_work:
        yield core.step()


def floor_ms(engine: Engine, batch: int, context: int) -> float:
    """The weights and the cache that a step must read; of experts, as many as so many tokens choose on average."""
    cache = engine.plan.kv_cache_dtype
    needs = decode_step(
        engine.model, engine.plan.dtype, batch=batch, context_tokens=context,
        kv_cache_dtype="auto" if cache == engine.plan.dtype else cache,
    )  # fmt: skip
    return needs.read_bytes / READ_BYTES_PER_S * 1e3


def decode(engine: Engine, model: str, batch: int, context: int, kind: str = "greedy", steps: int = 128) -> None:
    """Of the steps in which every sequence gets a token: those in which prompts are read come before, and do not count. The
    median of several runs. (Until November 2026 the time for 1 token was taken from that for 129: with many prompts a
    difference of two large numbers, which went up and down by 15 %.)"""
    core, vocab = engine.core, engine.model.vocab_size
    add(core, batch, [context] * batch, [4] * batch, vocab, "warm", kind)
    run(core)
    lead = batch * context // 8192 + batch // 2  # tokens that the first sequences have before the last ones begin
    found = []
    for _ in range(3):
        add(core, batch, [context] * batch, [lead + steps] * batch, vocab, "decode", kind)
        found.append(_full_steps_ms(core, batch))
    step_ms = statistics.median(found)
    note(
        f"{model} decode b{batch} c{context}" + (f" {kind}" if kind != "greedy" else ""),
        ms=step_ms,
        spread=max(found) / min(found),
        share_of_floor=floor_ms(engine, batch, context + (lead + steps) // 2) / step_ms,
    )


def _full_steps_ms(core: EngineCore, batch: int) -> float:
    times = []
    while core.has_work:
        if sum(len(delta.token_ids) for delta in core.step()) == batch:
            times.append(time.perf_counter())
    return (times[-1] - times[0]) / (len(times) - 1) * 1e3


def offline(engine: Engine, model: str) -> None:
    generator = random.Random(0)
    lengths = [generator.randint(100, 1024) for _ in range(256)]
    outputs = [generator.randint(100, 1024) for _ in range(256)]
    add(engine.core, 256, lengths, outputs, engine.model.vocab_size, "offline")
    seconds, tokens = run(engine.core)
    note(f"{model} offline256", tok_s=tokens / seconds, seconds=seconds)


def prefill(engine: Engine, model: str) -> None:
    core, vocab = engine.core, engine.model.vocab_size
    add(core, 2, [4096] * 2, [1] * 2, vocab, "warm")
    run(core)
    add(core, 32, [4096] * 32, [1] * 32, vocab, "prefill")
    seconds, _ = run(core)
    note(f"{model} prefill 32x4096", tok_s=32 * 4096 / seconds)


def long_prompts(engine: Engine, model: str) -> None:
    """Milliseconds to the last first token, and the share of what their operations need at 790 TFLOP/s."""
    core, vocab = engine.core, engine.model.vocab_size
    add(core, 1, [8192], [1], vocab, "warm")
    run(core)
    for count, length in ((1, 32768), (8, 16384)):
        add(core, count, [length] * count, [1] * count, vocab, "long")
        seconds, _ = run(core)
        needs = prefill_work(engine.model, engine.plan.dtype, batch=count, tokens=length)
        note(f"{model} prompts {count}x{length}", ms=seconds * 1e3, share_of_790=needs.operations / 790e12 / seconds)


def host_share(engine: Engine, model: str, batch: int) -> None:
    add(engine.core, batch, [128] * batch, [200] * batch, engine.model.vocab_size, "host")
    note(f"{model} host b{batch}", ms=host_ms(each_step(engine.core), torch.cuda.synchronize))


def random_requests(model: str, count: int = 1000) -> None:
    """Requests of any length, many with a common beginning, in a cache far too small for them, some of them aborted:
    each must end exactly once, and then nothing may be left behind."""
    config = EngineConfig(
        model=model, load_format="dummy", kv_cache_memory_bytes=2**30, max_model_len=2048, max_num_seqs=64
    )
    engine = start_engine(config, CONFIGS / model)
    core, generator, vocab = engine.core, random.Random(1), engine.model.vocab_size
    beginnings = [[generator.randrange(vocab) for _ in range(700)] for _ in range(4)]
    ended: dict[str, int] = {}
    waiting = [str(index) for index in range(count)]
    while waiting or core.has_work:
        for _ in range(min(len(waiting), generator.randrange(4))):
            own = [generator.randrange(vocab) for _ in range(generator.randrange(1, 600))]
            core.add(
                EngineRequest(
                    request_id=waiting.pop(),
                    prompt_token_ids=generator.choice(beginnings)[: generator.randrange(701)] + own,
                    sampling=SamplingParams(temperature=generator.choice((0.0, 1.0)), top_p=0.9),
                    stop_token_ids=[],
                    max_tokens=generator.randrange(1, 300),
                    seed=generator.randrange(2**31),
                )
            )
        if generator.random() < 0.2:
            core.abort(str(generator.randrange(count)))
        for delta in core.step():
            if delta.finish_reason:
                ended[delta.request_id] = ended.get(delta.request_id, 0) + 1
    core.step()  # an idle step audits
    core.scheduler.audit()
    assert len(ended) == count and set(ended.values()) == {1}
    note(
        f"{model} random requests",
        ended=len(ended),
        preemptions=core.scheduler.num_preemptions,
        prefix_hits_tokens=core.scheduler.num_prefix_hits,
    )


def profile(engine: Engine, model: str, batch: int, context: int, kind: str) -> None:
    """Device time by kernel of ten decode steps."""
    core = engine.core
    add(core, batch, [context] * batch, [40] * batch, engine.model.vocab_size, "profile", kind)
    for _ in range(10):
        core.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(10):
            core.step()
        torch.cuda.synchronize()
    while core.has_work:
        core.step()
    _note_kernels(f"{model} profile b{batch} {kind}", found, 10)


def profile_prefill(engine: Engine, model: str) -> None:
    """Device time by kernel of two steps of 8192 prompt tokens."""
    add(engine.core, 4, [4096] * 4, [1] * 4, engine.model.vocab_size, "profile")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run(engine.core)
    _note_kernels(f"{model} profile prefill", found, 2)


# (running streams with 600 tokens each, prompts, tokens of each)
STEPS = ((0, 1, 128), (0, 1, 512), (16, 1, 512), (64, 3, 512), (0, 4, 512), (192, 3, 512), (192, 16, 512), (0, 8, 1024),
         (8, 8, 1024), (0, 2, 4096))  # fmt: skip


def steps(engine: Engine, model: str, profiled: bool) -> None:
    """Single steps, launched again and again: what the device and what the host needs for each."""
    core, vocab, runner = engine.core, engine.model.vocab_size, engine.core._executor
    for running, count, length in STEPS:
        name = f"{model} step {running} + {count}x{length}"
        add(core, running, [600] * running, [1000] * running, vocab, "running")
        while running and (core.scheduler.num_waiting or not core.num_steps or _has_prompts(core)):
            core.step()
        while core._in_flight:
            batch, handle = core._in_flight.popleft()
            core.scheduler.commit(batch, handle.result())
        add(core, count, [length] * count, [1000] * count, vocab, "prompt")
        batch = core.scheduler.schedule()
        output = runner.submit(batch).result()
        _time_step(runner, batch, name, sum(row.num_tokens for row in batch.rows))
        if profiled:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                for _ in range(3):
                    runner._launch(batch.rows)
                torch.cuda.synchronize()
            _note_kernels(f"{name} profile", found, 3)
        core.scheduler.commit(batch, output)
        for tag, number in (("running", running), ("prompt", count)):
            for index in range(number):
                core.abort(f"{tag}-{index}")
        while core.has_work:
            core.step()


def _has_prompts(core: EngineCore) -> bool:
    return any(one.num_known - one.num_computed > 1 for one in core.scheduler._running)


@torch.inference_mode()
def _time_step(runner: Any, batch: Any, name: str, tokens: int) -> None:
    for _ in range(2):
        runner._launch(batch.rows)
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    number, began_s = 10, time.perf_counter()
    begin.record()
    for _ in range(number):
        runner._launch(batch.rows)
    end.record()
    host_s = time.perf_counter() - began_s
    torch.cuda.synchronize()
    ms = begin.elapsed_time(end) / number
    note(name, tokens=tokens, ms=ms, host_ms=host_s / number * 1e3, tok_s=tokens / ms * 1e3)


def _note_kernels(name: str, found: torch.profiler.profile, steps: int) -> None:
    """Microseconds and calls a step of each kernel, the largest first."""
    rows = sorted(found.key_averages(), key=lambda event: -event.device_time_total)[:18]
    for event in rows:
        print(f"   {event.device_time_total / steps:10.1f} us {event.count / steps:7.1f} calls  {event.key[:90]}")
    RESULTS[name] = {event.key[:90]: [round(event.device_time_total / steps, 1), event.count / steps] for event in rows}
    print(name, "total us", round(sum(event.device_time_total for event in found.key_averages()) / steps), flush=True)


def benchmarks(words: list[str]) -> None:
    models = [word for word in words if (CONFIGS / word).is_dir()]
    wishes = dict(word.split("=", 1) for word in words if "=" in word)
    for model in models:
        engine = start(model, **wishes)
        batches = [int(word[1:]) for word in words if word[0] == "b" and word[1:].isdigit()] or [1, 8, 64, 256]
        try:
            if "decode" in words:
                kinds = [kind for kind in KINDS if kind == "greedy" or kind in words]
                for batch, kind in itertools.product(batches, kinds):
                    decode(engine, model, batch, 128 if batch == 1 else 1024, kind)
                    if "profile" in words:
                        profile(engine, model, batch, 128 if batch == 1 else 1024, kind)
                host_share(engine, model, 1)
            if "steps" in words:
                steps(engine, model, "profile" in words)
            if "prefill" in words:
                prefill(engine, model)
                if "profile" in words:
                    profile_prefill(engine, model)
            if "long" in words:
                long_prompts(engine, model)
            if "offline" in words:
                offline(engine, model)
        finally:
            del engine
            gc.unfreeze()
            gc.collect()
            torch.cuda.empty_cache()


def kernels() -> None:
    tests = [f"tests/kernels/test_{name}.py" for name in ("triton", "triton_step", "cuda_runner")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", *tests],
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout[-3000:], done.stderr[-1500:])
    note("kernel tests", status=done.returncode, last=done.stdout.strip().splitlines()[-1] if done.stdout else "")


def main() -> None:
    out, words = Path(sys.argv[1]), sys.argv[2:]
    note("machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__, commit=commit())
    try:
        if "kernels" in words:
            kernels()
        if "random" in words:
            random_requests("qwen3-0.6b")
        benchmarks(words)
    finally:
        out.write_text(json.dumps({"command": sys.argv, **RESULTS}, indent=1))
    print(json.dumps(RESULTS))


if __name__ == "__main__":
    main()
