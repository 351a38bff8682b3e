"""``bench throughput``: many random prompts in one call of LLM.generate."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

from fastqwen.benchmark.latency import gpus_of, machine_for
from fastqwen.benchmark.progress import say, watched
from fastqwen.benchmark.report import describe, finish, percent, shares, table
from fastqwen.benchmark.work import Needs, Span, decode_step, prefill, random_ids
from fastqwen.config import EngineConfig
from fastqwen.llm import LLM
from fastqwen.model_config import ModelConfig
from fastqwen.outputs import RequestOutput
from fastqwen.records import SamplingParams


def run(config: EngineConfig, *, num_prompts: int, input_len: Span, output_len: Span) -> None:
    machine, _ = machine_for(config)
    print(describe(machine), flush=True)
    say("loading the model")
    llm = LLM(**{name: getattr(config, name) for name in config.__struct_fields__})
    generator = random.Random(config.seed or 0)  # noqa: S311 not a secret
    vocab = llm.model.vocab_size
    prompts: list[Any] = [random_ids(generator, input_len.draw(generator), vocab) for _ in range(num_prompts)]
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=output_len.draw(generator))
        for _ in prompts
    ]
    llm.generate(prompts[:1], SamplingParams(max_tokens=2), use_tqdm=False)
    steps = llm.stats().num_steps

    def so_far(seconds: float) -> str:
        now = llm.stats()
        done = num_prompts - now.num_running - now.num_waiting
        rate = (now.num_steps - steps) / seconds
        return f"{done} of {num_prompts} prompts are done, {now.num_running} run; {rate:.1f} steps a second so far"

    start_s = time.perf_counter()
    with watched(f"{num_prompts} prompts", so_far):
        outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start_s
    results = _results(outputs, seconds, llm.stats().num_steps - steps)
    needs = _needs(config, llm.model, machine.dtype, outputs, int(results["steps"]))
    results |= shares(needs, seconds, machine)
    rows = [
        [
            f"{num_prompts} prompts",
            f"{seconds:.1f}",
            f"{results['output_tokens_per_s']:.1f}",
            f"{results['total_tokens_per_s']:.1f}",
            percent(results["bandwidth_share"]),
            percent(results["flop_share"]),
        ]
    ]
    headers = ["work", "seconds", "output tok/s", "all tok/s", "of bandwidth", "of FLOP rate"]
    print(table(headers, rows), flush=True)
    finish("throughput", machine, {"model": config.model, "results": [results]})


def _results(outputs: list[RequestOutput], seconds: float, steps: int) -> dict[str, float]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "prompts": len(outputs),
        "prompt_tokens": prompt,
        "output_tokens": generated,
        "steps": steps,
        "seconds": seconds,
        "output_tokens_per_s": generated / seconds,
        "total_tokens_per_s": (prompt + generated) / seconds,
    }


def _needs(config: EngineConfig, model: ModelConfig, dtype: str, outputs: list[RequestOutput], steps: int) -> Needs:
    """Weights once a step as it happened; each token's operations, and its own past from the cache."""
    num_gpus = gpus_of(config)
    step = partial(decode_step, model, dtype, num_gpus=num_gpus, kv_cache_dtype=config.kv_cache_dtype)
    lengths = [(len(output.prompt_token_ids), len(output.outputs[0].token_ids)) for output in outputs]
    mean_batch = max(1, round(sum(generated for _, generated in lengths) / steps))
    weights = step(batch=mean_batch, context_tokens=0).read_bytes
    past, operations = 0.0, 0.0
    for prompt, generated in lengths:
        token = step(batch=1, context_tokens=prompt + generated / 2)
        alone = step(batch=1, context_tokens=0)
        past += (generated - 1) * (token.read_bytes - alone.read_bytes)
        operations += (generated - 1) * token.operations
        operations += prefill(model, dtype, batch=1, tokens=prompt, num_gpus=num_gpus).operations
    return Needs(steps * weights + past, operations)
