"""Weights quantized while they are loaded: the nearest numbers of each format, and what a flag may say."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from fastqwen.errors import BadConfig, Unsupported
from fastqwen.kernels.reference import unpack_grouped, unpack_scaled
from fastqwen.model_config import read_json
from fastqwen.models import parse_config
from fastqwen.plan import weights_bytes
from fastqwen.quant import ONLINE_FORMATS, find, wished
from fastqwen.quant.online import GROUPS, as_fp8, as_grouped
from tests.models.tiny import MOE, greedy, logits, make, prompt, start
from tests.quant.storing import store_twice
from tests.quant.test_awq import CONFIG as AWQ
from tests.quant.test_awq import in_groups


@pytest.mark.parametrize("form", GROUPS)
@pytest.mark.parametrize("in_size", [192, 200])
def test_whole_numbers_are_off_by_half_a_step_at_most(form: str, in_size: int):
    bits, group = GROUPS[form]
    matrix = torch.randn(24, in_size)
    weight = as_grouped(matrix, bits, group)
    steps = weight.scales.float().t().repeat_interleave(group, 1)[:, :in_size]
    off = (unpack_grouped(weight, 0, 24) - matrix).abs() / steps
    assert off.max() <= (1.01 if bits == 4 else 0.51), "a zero is rounded as well"
    assert off.mean() < 0.3


def test_floating_point_numbers_are_off_by_a_sixteenth_at_most():
    matrix = torch.randn(24, 200)
    found = unpack_scaled(as_fp8(matrix), 0, 24)
    assert ((found - matrix).abs() <= matrix.abs() / 16 + 1e-4).all()


def test_a_matrix_of_zeros_stays_one():
    assert not unpack_scaled(as_fp8(torch.zeros(8, 64)), 0, 8).any()
    assert not unpack_grouped(as_grouped(torch.zeros(8, 64), 4, 64), 0, 8).any()


@pytest.mark.parametrize("form", ONLINE_FORMATS)
def test_a_model_is_close_to_its_plain_self(form: str, tmp_path: Path):
    make(tmp_path, "Qwen3Config", head_dim=32)
    ids = prompt(60)
    plain, found = logits(tmp_path, ids), logits(tmp_path, ids, quantization=form)
    off = (found - plain).abs().mean() / plain.std()
    assert 0 < off < {"fp8": 0.15, "int8": 0.05, "int4": 0.5}[form]
    prompts = [ids[:5], ids[:33]]
    together = greedy(start(tmp_path, quantization=form), prompts, 8)
    assert together == [greedy(start(tmp_path, quantization=form), [one], 8)[0] for one in prompts]


def test_what_the_flag_may_say():
    stored = {"quant_method": "awq"}
    assert wished(None, None, "config.json") is None and wished(None, "none", "config.json") is None
    assert wished(stored, "awq_marlin", "config.json") == stored == wished(stored, None, "config.json")
    assert wished(None, "gguf", "model.gguf") is None
    for quantization, wish, source, words in (
        (stored, "fp8", "config.json", "weights are awq"),
        (None, "gptq", "config.json", "fp8, int8, int4"),
        (None, "int8", "model.gguf", "another file"),
    ):
        with pytest.raises(BadConfig, match=words):
            wished(quantization, wish, source)


def test_a_packed_checkpoint_keeps_its_own(tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    stored, _ = store_twice(tmp_path, in_groups(32), AWQ)
    ids = prompt(9)
    assert logits(stored, ids, quantization="awq").equal(logits(stored, ids))
    with pytest.raises(BadConfig, match="--quantization is int8"):
        start(stored, quantization="int8")


def test_experts_are_refused_by_name(tmp_path: Path):
    make(tmp_path, "Qwen3MoeConfig", **MOE, head_dim=16)
    with pytest.raises(Unsupported, match="experts"):
        start(tmp_path, quantization="int8")


@pytest.mark.parametrize("form, share", [("fp8", 1 / 2), ("int8", 0.516), ("int4", 0.281)])
def test_the_plan_knows_what_they_take(form: str, share: float, configs: Path):
    config = read_json(configs / "qwen3-8b" / "config.json")
    model = parse_config(config, "config.json")
    plain = weights_bytes(model, "bfloat16")
    quantization = wished(None, form, "config.json")
    held = weights_bytes(msgspec.structs.replace(model, quantization=quantization), "bfloat16")
    linears = 2 * 36 * 4096 * (4096 + 2 * 1024 + 4096 + 3 * 12288)
    assert (held - (plain - linears)) / linears == pytest.approx(share, abs=0.001)
    assert find(quantization, "config.json").notices == ()
