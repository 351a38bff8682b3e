"""Sizes against the published files and the published parameter counts."""

from __future__ import annotations

import pytest

from fastqwen.plan.catalog import catalog, find_published
from fastqwen.plan.memory import kv_bytes_per_token
from fastqwen.plan.weights import num_parameters, read_bytes, weights_bytes

# Total bytes of the published safetensors or bin files.
FILES = {
    "Qwen-7B": ("bfloat16", 15_442_649_088),
    "Qwen-72B": ("bfloat16", 144_575_840_256),
    "Qwen-7B-Chat-Int4": ("float16", 5_860_564_992),
}
# Parameters in billions, as the model cards give them, and those active for a token where they say so.
PARAMETERS = {
    "Qwen1.5-4B": 3.95,
    "Qwen1.5-32B": 32.5,
    "Qwen1.5-72B": 72.3,
    "Qwen1.5-110B": 111.2,
    "Qwen1.5-MoE-A2.7B": 14.3,
    "Qwen2-57B-A14B": 57.4,
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.61,
    "Qwen2.5-14B": 14.7,
    "Qwen2.5-32B": 32.5,
    "Qwen2.5-72B": 72.7,
    "Qwen3-4B": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235.0,
    "Qwen3-Coder-480B-A35B-Instruct": 480.0,
}
ACTIVE = {"Qwen3-30B-A3B": 3.3, "Qwen3-235B-A22B": 22.0, "Qwen3-Coder-480B-A35B-Instruct": 35.0}


def model_of(name: str):
    found = find_published(name)
    assert found is not None
    return found.model


@pytest.mark.parametrize("name", FILES)
def test_weights_are_as_large_as_the_published_files(name: str):
    dtype, total = FILES[name]
    assert weights_bytes(model_of(name), dtype, as_in_file=True) == pytest.approx(total, rel=0.001)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_the_card_says(name: str):
    assert num_parameters(model_of(name)) / 1e9 == pytest.approx(PARAMETERS[name], rel=0.012)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name: str):
    model = model_of(name)
    embedding = model.vocab_size * model.hidden_size / 1e9
    assert num_parameters(model, active=True) / 1e9 + embedding == pytest.approx(ACTIVE[name], rel=0.03)


def test_kv_bytes_per_token():
    assert kv_bytes_per_token(model_of("Qwen-7B"), "float16") == 512 * 1024
    assert kv_bytes_per_token(model_of("Qwen-72B"), "float16") == 2560 * 1024
    assert kv_bytes_per_token(model_of("Qwen3-8B"), "bfloat16", kv_cache_dtype="fp8") == 72 * 1024 + 2 * 36 * 8 * 2
    # Four key-value heads on eight GPUs: each is kept twice.
    moe = model_of("Qwen3-30B-A3B")
    assert kv_bytes_per_token(moe, "bfloat16", num_gpus=8) == kv_bytes_per_token(moe, "bfloat16", num_gpus=4)


def test_a_step_of_more_tokens_reads_more_experts():
    moe = model_of("Qwen3-30B-A3B")
    one, eight, many = (read_bytes(moe, "bfloat16", 1, batch) for batch in (1, 8, 4096))
    assert one == pytest.approx(6.1e9, rel=0.05)
    assert eight == pytest.approx(25e9, rel=0.05)
    assert many == pytest.approx(weights_bytes(moe, "bfloat16"), rel=0.02)


@pytest.mark.parametrize("entry", catalog().models, ids=lambda entry: entry.name)
def test_every_published_model_has_sizes_and_a_source(entry):
    model = catalog().model(entry)
    assert entry.name in entry.source
    assert weights_bytes(model, "float16") > 0
    assert (model.quantization is None) == (entry.quantization is None)
