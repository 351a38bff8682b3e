"""The plan that the engine starts with, and its comparison with what was measured."""

from __future__ import annotations

import msgspec
import pytest

from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, DoesNotFit, Unsupported
from fastqwen.plan import DeviceFacts, Measured, choose_dtype, compare, make_plan
from fastqwen.plan.catalog import catalog, find_published
from fastqwen.plan.facts import GIB
from fastqwen.plan.gpus import find_target


def model_of(name: str):
    found = find_published(name)
    assert found is not None
    return found.model


def cpu(free_gib: float) -> DeviceFacts:
    free = int(free_gib * GIB)
    return DeviceFacts(kind="cpu", name="CPU", total_bytes=2 * free, free_bytes=free)


def test_a_gpu_is_filled_to_its_share():
    facts = find_target("RTX 4090").facts
    plan = make_plan(model_of("Qwen3-8B"), EngineConfig(model="Qwen/Qwen3-8B", max_model_len=8192), facts)
    assert plan.dtype == "bfloat16"
    assert plan.block_size == 32, "a card of 100 KiB or less of shared memory"
    assert 0.89 * facts.total_bytes < plan.peak_bytes <= 0.9 * facts.total_bytes
    assert plan.num_blocks * plan.block_size >= 8192


def test_what_was_measured_goes_before_what_was_predicted():
    facts = find_target("RTX 4090").facts
    config = EngineConfig(model="Qwen/Qwen3-8B", max_model_len=4096)
    plan = make_plan(model_of("Qwen3-8B"), config, facts, available_kv_bytes=GIB)
    assert plan.num_blocks == GIB // (32 * plan.kv_bytes_per_token)


def test_a_gpu_that_is_too_small_is_told_what_to_type():
    config = EngineConfig(model="Qwen/Qwen2.5-7B-Instruct")
    with pytest.raises(DoesNotFit, match=r"use fastqwen serve Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4") as error:
        make_plan(model_of("Qwen2.5-7B-Instruct"), config, find_target("10GB").facts)
    assert "\n" not in str(error.value)


def test_a_cache_that_was_set_too_small_is_answered_with_a_length():
    config = EngineConfig(model="x", max_model_len=8192, kv_cache_memory_bytes=GIB // 2)
    with pytest.raises(DoesNotFit, match=r"use --max-model-len 3616 or less"):
        make_plan(model_of("Qwen3-8B"), config, find_target("RTX 4090").facts)


def test_less_free_than_predicted_is_answered_with_a_length():
    config = EngineConfig(model="x", max_model_len=8192)
    with pytest.raises(DoesNotFit, match=r"use --max-model-len \d+ or less"):
        make_plan(model_of("Qwen3-8B"), config, find_target("RTX 4090").facts, available_kv_bytes=GIB)


def test_a_length_that_nobody_asked_for_shrinks_and_says_so():
    plan = make_plan(model_of("Qwen3-8B"), EngineConfig(model="Qwen/Qwen3-8B"), find_target("L4").facts)
    assert 0 < plan.max_model_len < 40960
    assert "the longest sequence is" in plan.notices[0]


def test_a_cpu_keeps_a_small_cache():
    plan = make_plan(model_of("Qwen3-0.6B"), EngineConfig(model="Qwen/Qwen3-0.6B"), cpu(16))
    assert plan.kv_bytes <= 4 * GIB
    assert plan.block_size == 16
    with pytest.raises(DoesNotFit, match="--max-model-len"):
        make_plan(model_of("Qwen3-8B"), EngineConfig(model="x", max_model_len=40960), cpu(16))


def test_the_type_follows_the_device():
    v100, a100 = find_target("V100 32GB").facts, find_target("A100 80GB").facts
    model = model_of("Qwen-7B")
    assert choose_dtype("auto", model, a100) == ("bfloat16", [])
    dtype, notices = choose_dtype("auto", model, v100)
    assert dtype == "float16"
    assert "bfloat16" in notices[0]
    with pytest.raises(BadConfig, match="--dtype float16"):
        choose_dtype("bfloat16", model, v100)


def test_comparison_warns_beyond_five_percent():
    config = EngineConfig(model="Qwen/Qwen3-8B", max_model_len=4096)
    plan = make_plan(model_of("Qwen3-8B"), config, find_target("RTX 4090").facts)
    close = Measured(weights_bytes=int(plan.weights_bytes * 1.02), peak_bytes=plan.peak_bytes)
    lines = compare(plan, close)
    assert [line.what for line in lines] == ["weights", "peak"]
    assert not any(line.warn for line in lines)
    far = compare(plan, Measured(num_blocks=plan.num_blocks // 2))
    assert far[0].warn
    assert "more than 5% apart" in far[0].text


def test_an_unknown_quantization_is_refused():
    entry = catalog().find("Qwen/Qwen3-8B")
    assert entry is not None
    model = msgspec.structs.replace(catalog().model(entry), quantization={"quant_method": "magic"})
    with pytest.raises(Unsupported, match="no quantization method 'magic'"):
        make_plan(model, EngineConfig(model="x"), cpu(64))


def test_what_other_programs_hold_is_taken_off_the_share():
    facts = find_target("RTX 4090").facts
    shared = msgspec.structs.replace(facts, free_bytes=facts.total_bytes - 2 * GIB)
    config = EngineConfig(model="Qwen/Qwen3-4B", max_model_len=4096)
    alone, beside = (make_plan(model_of("Qwen3-4B"), config, one) for one in (facts, shared))
    assert alone.kv_bytes - beside.kv_bytes == pytest.approx(2 * GIB, rel=0.01)


def test_a_gpu_of_its_own_facts(monkeypatch: pytest.MonkeyPatch):
    """The process's own context and tensors are not what others hold."""
    import torch

    from fastqwen.plan.facts import CONTEXT_BYTES_PER_MULTIPROCESSOR
    from fastqwen.runner.device import device_facts

    class Properties:
        multi_processor_count = 100

    own = 100 * CONTEXT_BYTES_PER_MULTIPROCESSOR
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB - own, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: GIB)
    facts = device_facts(torch.device("cuda", 0))
    assert facts.total_bytes - facts.free_bytes == 3 * GIB
    assert facts.multiprocessors == 100


def test_prompts_beside_streams_take_as_many_tokens_as_last_a_twentieth_of_a_second():
    def mixed(name: str, gpu: str, **wishes: int) -> int | None:
        config = EngineConfig(model=name, max_model_len=4096, **wishes)
        return make_plan(model_of(name), config, find_target(gpu).facts).max_num_mixed_tokens

    assert mixed("Qwen3-8B", "H200") == 2048
    assert mixed("Qwen3-0.6B", "H200") == 2048, "more would not be recorded"
    assert mixed("Qwen3-8B", "RTX 4090") == 256, "a slower card, so fewer"
    assert mixed("Qwen3-8B", "RTX 3090") == 128, "512 took 182 ms"
    assert mixed("Qwen3-0.6B", "GTX 1650") == 64, "less than a tile is not worth a step"
    assert mixed("Qwen3-8B", "H200", max_num_mixed_tokens=700) == 700
    assert (
        make_plan(model_of("Qwen3-0.6B"), EngineConfig(model="x", max_model_len=4096), cpu(16)).max_num_mixed_tokens
        == 16
    )


def test_the_longest_step_lasts_about_a_second():
    def longest(name: str, gpu: str, **wishes: int) -> int:
        config = EngineConfig(model=name, max_model_len=2048, **wishes)
        return make_plan(model_of(name), config, find_target(gpu).facts).max_num_batched_tokens

    assert longest("Qwen3-8B", "H200") == 8192
    assert 2048 <= longest("Qwen3-8B", "RTX 3090") <= 3072
    assert longest("Qwen3-1.7B", "RTX 3090") == 8192
    assert 512 <= longest("Qwen3-4B", "T4") <= 4096
    assert longest("Qwen3-8B", "RTX 3090", max_num_batched_tokens=8192) == 8192


def test_memory_is_planned_for_the_steps_that_will_be_made():
    """Planned with the default, and with the number that the default comes to."""
    model, facts = model_of("Qwen3-8B"), find_target("RTX 3090").facts
    usual = make_plan(model, EngineConfig(model="x", max_model_len=4096), facts)
    config = EngineConfig(model="x", max_model_len=4096, max_num_batched_tokens=usual.max_num_batched_tokens)
    assert make_plan(model, config, facts) == usual


@pytest.mark.parametrize(("head_dim", "dtype"), [(80, "bfloat16"), (16, "float16"), (512, "bfloat16"), (24, "float32")])
def test_heads_that_the_gpus_kernels_do_not_take_are_refused(head_dim: int, dtype: str):
    model = msgspec.structs.replace(model_of("Qwen3-8B"), head_dim=head_dim)
    config = EngineConfig(model="x", dtype=dtype, max_model_len=1024)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match=f"head_dim is {head_dim}, on a GPU .*--device cpu"):
        make_plan(model, config, find_target("RTX 4090").facts)
    assert make_plan(model, config, cpu(200)).num_blocks > 0


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim", "most"),
    [("RTX 3090", "bfloat16", 128, 256), ("RTX 3090", "float32", 256, 64), ("H200", "bfloat16", 256, 256)],
)
def test_blocks_that_do_not_fit_into_shared_memory_are_refused(gpu: str, dtype: str, head_dim: int, most: int):
    model = msgspec.structs.replace(model_of("Qwen3-0.6B"), head_dim=head_dim)
    facts = find_target(gpu).facts

    def plan(block_size: int) -> int:
        config = EngineConfig(model="x", dtype=dtype, max_model_len=1024, block_size=block_size)  # type: ignore[arg-type]
        return make_plan(model, config, facts).block_size

    assert plan(most) == most and plan(16) == 16
    for size in (8, 2 * most):
        with pytest.raises(BadConfig, match=rf"--block-size is {size}, .*it can be 16, .*{most} on {gpu}"):
            plan(size)


def test_the_oldest_cards_say_that_they_are_slow_and_take_short_steps():
    model, config = model_of("Qwen-1_8B-Chat"), EngineConfig(model="x", max_model_len=2048)
    plan = make_plan(model, config, find_target("GTX 1080 Ti").facts)
    assert (plan.dtype, plan.max_num_batched_tokens, plan.device) == ("float16", 512, "GTX 1080 Ti")
    assert any("torch's operations only" in notice and "slow" in notice for notice in plan.notices)
    assert not make_plan(model, config, find_target("H200").facts).notices
