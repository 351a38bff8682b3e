"""In float32 on a CPU a request gets the same tokens and the same bits of log-probability, whatever runs beside it."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastqwen import LLM, RequestOutput, SamplingParams
from tests.models.tiny import MOE, YARN, make, prompt

MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # and the engine's options
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN, "tie_word_embeddings": True}, {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}, {}),
    "qwen3-8-bit-cache": ("Qwen3Config", {"head_dim": 32}, {"kv_cache_dtype": "int8"}),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 16, "norm_topk_prob": True}, {}),
}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.02, "logit_bias": {7: 3.0, 9: -50.0}},
    {"temperature": 0.9, "presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    {"temperature": 1.1, "top_p": 0.8, "stop_token_ids": [3, 5, 8], "min_tokens": 9},
    {"temperature": 0.7, "top_k": 5, "prompt_logprobs": 2},
]
REQUESTS = 32
ROOMY = {"max_num_batched_tokens": 512, "enable_prefix_caching": False}


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Prompts of many lengths, some with a common beginning, and every kind of sampling."""
    lengths = random.Random(1)
    found = []
    for index in range(REQUESTS):
        ids = prompt(lengths.randint(1, 70), seed=index)
        if index % 3 == 0:
            ids = prompt(40) + ids
        kind = {"max_tokens": lengths.randint(9, 18), "logprobs": 3, "seed": index, **KINDS[index % len(KINDS)]}
        found.append((ids, SamplingParams(**kind)))
    return found


def facts(output: RequestOutput) -> tuple[Any, ...]:
    """Everything that must not change, floats to the last bit."""
    answer = output.outputs[0]
    return (
        answer.token_ids,
        answer.finish_reason,
        answer.stop_reason,
        answer.cumulative_logprob,
        [[(one, entry.logprob, entry.rank) for one, entry in each.items()] for each in answer.logprobs or []],
        [each and [(one, entry.logprob) for one, entry in each.items()] for each in output.prompt_logprobs or []],
    )


def answers(llm: LLM, order: list[int]) -> list[tuple[Any, ...]]:
    """All requests in one call, in this order; the answers in the requests' own order."""
    listed = [requests()[index] for index in order]
    outputs = llm.generate([ids for ids, _ in listed], [params for _, params in listed], use_tqdm=False)
    by_index = dict(zip(order, map(facts, outputs), strict=True))
    return [by_index[index] for index in range(REQUESTS)]


def engines(name: str, place: Path) -> Callable[..., LLM]:
    """Of one model, whose files come to ``place``."""
    config_class, changes, options = MODELS[name]
    make(place, config_class, num_hidden_layers=2, **changes)
    return partial(LLM, str(place), **{"dtype": "float32", "skip_tokenizer_init": True, "max_num_seqs": 32, **options})


@pytest.fixture(scope="module", params=MODELS)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LLM]:
    return engines(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def alone(engine: Callable[..., LLM]) -> list[tuple[Any, ...]]:
    llm = engine(**ROOMY)
    found = [facts(llm.generate([ids], params)[0]) for ids, params in requests()]
    assert len({str(one[0]) for one in found}) > REQUESTS // 2, "answers that are all alike prove nothing"
    return found


SHUFFLED = random.Random(3).sample(range(REQUESTS), REQUESTS)
IN_ORDER = list(range(REQUESTS))


@pytest.mark.parametrize(
    ("options", "order"),
    [
        ({**ROOMY, "max_num_seqs": 1}, SHUFFLED),
        ({**ROOMY, "max_num_seqs": 8}, IN_ORDER),
        (ROOMY, IN_ORDER),
        (ROOMY, SHUFFLED),
        ({"max_num_batched_tokens": 7, "enable_prefix_caching": False}, SHUFFLED),
        ({"max_num_batched_tokens": 64}, IN_ORDER),
        ({"block_size": 8}, SHUFFLED),
        ({"num_threads": 1}, SHUFFLED),
    ],
    ids=["batch-1", "batch-8", "batch-32", "shuffled", "chunks-of-7", "chunks-of-64-cached", "cached", "one-thread"],
)
def test_the_same_whatever_runs_beside_it(
    engine: Callable[..., LLM], alone: list[tuple[Any, ...]], options: dict[str, Any], order: list[int]
):
    import torch

    threads = torch.get_num_threads()
    try:
        llm = engine(**options)
        assert answers(llm, order) == alone
        if options.get("enable_prefix_caching", True):
            assert answers(llm, order) == alone  # now most of each prompt comes from the cache
            stats = llm.stats()
            assert stats.prefix_hits_tokens > 0.3 * stats.prefix_queries_tokens
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("prompts_first", [True, False])
def test_the_same_after_being_pushed_out(engine: Callable[..., LLM], alone: list[tuple[Any, ...]], prompts_first: bool):
    plan = engine().plan
    room = 40 * 8 * plan.kv_bytes_per_token
    few = {"block_size": 8, "kv_cache_memory_bytes": room, "max_model_len": 256}
    llm = engine(**few, prompts_first=prompts_first)
    assert answers(llm, SHUFFLED) == alone
    assert llm.stats().num_preemptions > 0
