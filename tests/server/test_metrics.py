"""Metrics under the names that dashboards ask for."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import TESTS, ask, client_of, get, make_state

BOARD = json.loads((TESTS.parent / "docs/grafana/fastqwen.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
# What boards written for vLLM ask for.
EXPECTED = {
    "vllm:e2e_request_latency_seconds_bucket", "vllm:time_per_output_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket", "vllm:time_to_first_token_seconds_sum", "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total", "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:request_success_total",
    "vllm:num_preemptions_total", "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket",
    "vllm:request_params_n_sum", "vllm:corrupted_requests_total", "vllm:request_decode_time_seconds_sum",
}  # fmt: skip


def scraped() -> dict[tuple[str, str], float]:
    """Sample values by name and finished_reason, after one finished request."""

    async def run() -> str:
        async with client_of(make_state()) as client:
            assert (await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4})).status_code == 200
            return (await client.get("/metrics")).text

    found = {}
    for family in text_string_to_metric_families(asyncio.run(run())):
        for sample in family.samples:
            assert sample.labels["model_name"] == "mock"
            found[sample.name, sample.labels.get("finished_reason") or sample.labels.get("le", "")] = sample.value
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_of_the_board_finds_its_metrics(expression: str):
    names = {name for name, _ in scraped()}
    asked = set(re.findall(r"vllm:\w+", expression))
    assert asked and asked <= names


def test_the_names_of_vllms_boards_are_there():
    assert {name for name, _ in scraped()} >= EXPECTED


def test_one_request_is_counted_once():
    found = scraped()
    assert found["vllm:generation_tokens_total", ""] == 4
    assert found["vllm:prompt_tokens_total", ""] == 2
    assert found["vllm:request_success_total", "length"] == 1
    assert found["vllm:time_to_first_token_seconds_count", ""] == 1
    assert found["vllm:inter_token_latency_seconds_count", ""] == 3
    assert found["vllm:request_generation_tokens_bucket", "8.0"] == 1
    assert found["vllm:request_generation_tokens_bucket", "1.0"] == 0


def test_what_vllms_boards_read_of_the_engine_is_there():
    """Names of examples/observability in vLLM 0.33.0's source."""
    state = make_state()
    ask(state, "/v1/completions", {"prompt": "a" * 20, "max_tokens": 3, "temperature": 0})
    text = get(state, "/metrics").text
    names = (
        "e2e_request_latency_seconds_bucket generation_tokens_total inter_token_latency_seconds_bucket "
        "iteration_tokens_total_bucket iteration_tokens_total_count iteration_tokens_total_sum kv_cache_usage_perc "
        "num_requests_running num_requests_waiting prompt_tokens_total request_decode_time_seconds_sum "
        "request_generation_tokens_bucket request_max_num_generation_tokens_sum request_prefill_time_seconds_sum "
        "request_prompt_tokens_bucket request_queue_time_seconds_sum request_success_total "
        "request_time_per_output_token_seconds_bucket time_to_first_token_seconds_bucket prompt_tokens_cached_total "
        "cache_config_info engine_sleep_state num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total"
    )
    for name in names.split():
        assert f"\nvllm:{name}{{" in text, name
    steps = state.engine.stats().num_steps
    assert steps and f'vllm:iteration_tokens_total_count{{model_name="mock"}} {float(steps)}' in text
    assert 'vllm:iteration_tokens_total_sum{model_name="mock"} 22.0' in text, "the last token of an answer is not read"


def value(text: str, sample: str) -> float:
    """``sample``: the name and its labels but the model's."""
    name, _, labels = sample.partition("{")
    wanted = labels.rstrip("}")
    [found] = [
        line for line in text.splitlines() if line.startswith(f"vllm:{name}{{") and wanted in line.rsplit(" ", 1)[0]
    ]
    return float(found.rsplit(" ", 1)[1])


def test_preemptions_are_told_by_request():
    state = make_state(lambda prompt, seed: "x" * 300, blocks=24, max_model_len=320)

    async def run() -> str:
        body = {"prompt": "a" * 20, "max_tokens": 250, "temperature": 0, "n": 2}
        async with client_of(state) as client:
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            return (await client.get("/metrics")).text

    text = asyncio.run(run())
    total = value(text, "num_preemptions_total")
    assert total > 0
    assert value(text, "request_num_preemptions_sum") == total
    assert value(text, "request_num_preemptions_count") == 2
    assert value(text, 'request_num_preemptions_bucket{le="20.0"}') == 2


def test_requests_that_are_turned_away_are_counted():
    state = make_state(max_concurrent_requests=1)
    assert value(get(state, "/metrics").text, 'admission_rejections_total{reason="max_num_queued_reqs"}') == 0
    state.num_active = 1
    assert ask(state, "/v1/completions", {"prompt": "hi"}).status_code == 429
    state.num_active = 0
    text = get(state, "/metrics").text
    assert value(text, 'admission_rejections_total{reason="max_num_queued_reqs"}') == 1
    assert value(text, 'admission_rejections_total{reason="max_num_queued_tokens"}') == 0


def test_the_prompts_that_were_computed_leave_out_what_the_cache_held():
    state = make_state(blocks=64, max_model_len=1024)
    for _ in range(2):
        ask(state, "/v1/completions", {"prompt": "a" * 100, "max_tokens": 2, "temperature": 0})
    text = get(state, "/metrics").text
    assert value(text, "request_prefill_kv_computed_tokens_sum") == 200 - value(text, "prompt_tokens_cached_total")
    assert value(text, "prompt_tokens_cached_total") == 96


def test_the_caches_size_is_told():
    state = make_state(blocks=64, max_model_len=512)
    text = get(state, "/metrics").text
    assert value(text, 'cache_config_info{kv_cache_max_concurrency="2.0",kv_cache_size_tokens="1024"') == 1


@pytest.mark.parametrize(
    ("depth", "name"), [(None, "awake"), (0, None), (1, "weights_offloaded"), (2, "discard_all")], ids=str
)
def test_how_deep_it_sleeps_is_told(depth: int | None, name: str | None):
    state = make_state()
    state.engine.depth = depth
    text = get(state, "/metrics").text
    for one in ("awake", "weights_offloaded", "discard_all"):
        assert value(text, f'engine_sleep_state{{sleep_state="{one}"}}') == (one == name)
