"""Metrics under the names that dashboards ask for."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.harness import TESTS, client_of, make_state

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
