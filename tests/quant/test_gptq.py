"""GPTQ: a checkpoint packed in the documented layout computes what its own dequantised weights compute."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fastqwen import LLM, SamplingParams
from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.kernels import GroupedWeight
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.model_config import read_json
from fastqwen.models import parse_config
from fastqwen.plan import weights_bytes
from tests.models.tiny import MOE, greedy, logits, make, make_qwen1, prompt, start
from tests.quant.packing import Layout, quantize

LINEAR = re.compile(r"(_proj|c_attn|mlp\.w1|mlp\.w2)\.weight$")
LAYOUTS = {
    "int4": Layout(),
    "int4-asymmetric": Layout(sym=False),
    "int4-desc-act": Layout(desc_act=True, sym=False),
    "int4-one-group": Layout(group_size=-1),
    "int4-one-group-desc-act": Layout(group_size=-1, desc_act=True),
    "int4-biases": Layout(bias=True),
    "int4-no-g-idx": Layout(keep_g_idx=False),
    "int4-v2": Layout(v2=True, sym=False),
    "int4-uneven-groups": Layout(group_size=40),
    "int2": Layout(bits=2, sym=False),
    "int2-desc-act": Layout(bits=2, desc_act=True),
    "int3": Layout(bits=3),
    "int3-asymmetric": Layout(bits=3, sym=False, group_size=-1),
    "int3-v2": Layout(bits=3, sym=False, v2=True),
    "int8": Layout(bits=8),
    "int8-asymmetric": Layout(bits=8, sym=False, desc_act=True),
    "int8-v2-one-group": Layout(bits=8, group_size=-1, v2=True),
}


MODELS: dict[str, Callable[[Path], Any]] = {
    "qwen1": make_qwen1,
    "qwen2": lambda folder: make(folder, "Qwen2Config"),
    "qwen3": lambda folder: make(folder, "Qwen3Config", head_dim=32),
    "qwen3-moe": lambda folder: make(folder, "Qwen3MoeConfig", **MOE, head_dim=16, norm_topk_prob=True),
    "qwen2-moe": lambda folder: make(folder, "Qwen2MoeConfig", **MOE, shared_expert_intermediate_size=96),
}


def pack(
    folder: Path,
    layout: Layout,
    *,
    dense: tuple[str, ...] = (),
    g_idx_of: Callable[[str, int], np.ndarray | None] = lambda name, in_size: None,
) -> tuple[Path, Path]:
    """The checkpoint in ``folder`` twice: packed, and as the plain matrices that the packed ones stand for.

    Linears whose name contains one of ``dense`` stay as they are.
    """
    packed, plain = load_file(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in [name for name in packed if LINEAR.search(name) and not any(part in name for part in dense)]:
        tensors, matrix = quantize(packed.pop(name), layout, g_idx_of(name, plain[name].shape[1]))
        base = name.removesuffix(".weight")
        packed = {**{f"{base}.{key}": value for key, value in tensors.items()}, **packed}  # a real bias goes before
        plain[name] = matrix
    config = read_json(folder / "config.json")
    places = folder / "packed", folder / "plain"
    for place, tensors in zip(places, (packed, plain), strict=True):
        place.mkdir()
        save_file(tensors, place / "model.safetensors")
        extra = {"quantization_config": layout.config()} if place.name == "packed" else {}
        (place / "config.json").write_text(json.dumps({**config, **extra}))
    return places


def check(packed: Path, plain: Path, length: int = 100) -> None:
    ids = prompt(length)
    expected = logits(plain, ids)
    assert expected.std() > 0.3, "such small logits prove nothing"
    torch.testing.assert_close(logits(packed, ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["qwen1", "qwen2", "qwen3"])
def test_the_same_logits_as_its_own_dequantised_weights(model: str, layout: str, tmp_path: Path):
    MODELS[model](tmp_path)
    check(*pack(tmp_path, LAYOUTS[layout]))


def test_the_same_greedy_tokens_in_a_batch(tmp_path: Path):
    make_qwen1(tmp_path)
    packed, plain = pack(tmp_path, Layout(sym=False))
    prompts = [prompt(length) for length in (3, 63, 150)]
    assert greedy(start(packed), prompts, 24) == greedy(start(plain), prompts, 24)


@pytest.mark.parametrize("model", ["qwen2-moe", "qwen3-moe"])
@pytest.mark.parametrize("layout", ["int4", "int4-desc-act", "int8"])
def test_experts_are_unpacked_while_loading(model: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    MODELS[model](tmp_path)
    packed, plain = pack(tmp_path, LAYOUTS[layout])
    with caplog.at_level(logging.WARNING):
        check(packed, plain)
    assert len([record for record in caplog.records if "unpacked" in record.message]) == 1


@pytest.mark.parametrize("model", ["qwen2", "qwen3"])
def test_parts_of_a_joined_linear_may_group_their_inputs_differently(model: str, tmp_path: Path):
    MODELS[model](tmp_path)

    def own_order(name: str, in_size: int) -> np.ndarray:
        return np.random.default_rng(len(name) + ("k_proj" in name)).permutation(np.arange(in_size) // 32)

    check(*pack(tmp_path, Layout(desc_act=True), g_idx_of=own_order))


@pytest.mark.parametrize("dense", [("k_proj",), ("q_proj", "k_proj", "v_proj"), ("mlp.",), ("self_attn",)])
def test_modules_with_a_plain_weight_are_loaded_as_they_are(dense: tuple[str, ...], tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    check(*pack(tmp_path, Layout(), dense=dense))


def test_biases_of_some_parts_only(tmp_path: Path):
    make(tmp_path, "Qwen3Config", head_dim=32)
    packed, plain = pack(tmp_path, Layout())
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.gate_proj.bias"] = np.zeros(96, dtype=np.float16)
    save_file(tensors, packed / "model.safetensors")
    check(packed, plain)
    tensors["model.layers.0.mlp.gate_proj.bias"] += 1
    save_file(tensors, packed / "model.safetensors")
    assert (logits(packed, prompt(9)) - logits(plain, prompt(9))).abs().max() > 0.01, "the bias had no effect"


def test_quantize_config_json_beside_config_json(tmp_path: Path):
    make_qwen1(tmp_path)
    packed, plain = pack(tmp_path, Layout())
    config = read_json(packed / "config.json")
    values = config.pop("quantization_config")
    values.pop("quant_method")  # the old file has no such word
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quantize_config.json").write_text(json.dumps(values))
    check(packed, plain)
    (packed / "quantize_config.json").write_text(json.dumps({**values, "bits": 5}))
    with pytest.raises(Unsupported, match=r"quantize_config\.json.* 5 bits"):
        start(packed)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_op_in_many_small_chunks(bits: int, monkeypatch: pytest.MonkeyPatch):
    layout = Layout(bits=bits, sym=False, desc_act=True, keep_g_idx=True)
    matrix = np.random.default_rng(1).standard_normal((56, 96)).astype(np.float32)
    tensors, dense = quantize(matrix, layout)
    zeros = np.stack([tensors["qzeros"] >> shift & 2**bits - 1 for shift in range(0, 32, bits)], -1).reshape(3, 56) + 1
    bias = torch.randn(56)
    weight = GroupedWeight(
        codes=torch.from_numpy(tensors["qweight"]),
        scales=torch.from_numpy(tensors["scales"]),
        zeros=torch.from_numpy(zeros.astype(np.int16)),
        group_of=torch.from_numpy(tensors["g_idx"]).long(),
        bits=bits,
        group_size=32,
        bias=bias,
    )
    assert (weight.in_size, weight.out_size) == (96, 56)
    x = torch.randn(5, 96)
    expected = torch.nn.functional.linear(x, torch.from_numpy(dense), bias)
    for unpacked_bytes in (1, 4 * 96 * 9, 2**23):
        monkeypatch.setattr("fastqwen.kernels.reference.UNPACK_BYTES", unpacked_bytes)
        torch.testing.assert_close(ReferenceOps().grouped_linear(x, weight), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 5}, "5 bits"),
        ({"desc_act": "false"}, "desc_act"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"adapter": {"name": "lora"}}, "adapter"),
        ({"dynamic": ["-:x"]}, "dynamic"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}, "auto_awq"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:gptq", "sym": False}, "auto_round:gptq"),
        ({"quant_method": "auto-round", "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}}, "up_proj"),
        ({"bits": "four"}, "bits is 'four'"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": -2}, "group_size is -2"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"is_marlin_format": True}, "'marlin'"),
        ({"lm_head": True}, "lm_head"),
        ({"pack_dtype": "int16"}, "pack_dtype"),
        ({"dynamic": {"+:.*down": {"bits": 8}}}, "dynamic"),
        ({"quant_method": None}, "quantization method"),
        ({"quant_method": None, "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "online", "format": "int4"}, "'online'"),
        ({"quant_method": "dense"}, "'dense'"),
    ],
)
def test_variants_that_are_refused(changes: dict[str, Any], words: str, tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    packed, _ = pack(tmp_path, Layout())
    config = read_json(packed / "config.json")
    config["quantization_config"].update(changes)
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint) as caught:
        start(packed)
    assert words in str(caught.value) and "config.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        (Layout(sym=False), {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}),
        (Layout(sym=False, v2=True), {"quant_method": "auto-round", "packing_format": "auto_round"}),
        (Layout(sym=False, v2=True), {"quant_method": "intel/auto-round", "packing_format": "auto_round:gptqmodel"}),
        (Layout(bits=2), {"quant_method": "auto-round", "packing_format": "auto_round:gptq"}),
        (Layout(v2=True), {"quant_method": "auto-round", "packing_format": "auto_round:gptq"}),
        (Layout(keep_g_idx=False), {"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 16}}}),
        (Layout(), {"dynamic": {"-:.*lm_head": {}, "+:.*down": {"bits": 4, "group_size": 32}}}),
    ],
)
def test_relatives_of_gptq(layout: Layout, changes: dict[str, Any], tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    packed, plain = pack(tmp_path, layout)
    config = read_json(packed / "config.json")
    config["quantization_config"].pop("checkpoint_format", None)
    config["quantization_config"].update(changes)
    (packed / "config.json").write_text(json.dumps(config))
    check(packed, plain)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"group_size": 64}, "group_size is 64"), ({"group_size": 16}, "group_size is 16"),
        ({"group_size": -1}, "group_size is -1"), ({"bits": 8}, "4 bits a number, but bits is 8"),
        ({"bits": 2}, "4 bits a number, but bits is 2"),
    ],
    ids=lambda changes: str(changes),
)  # fmt: skip
def test_tensors_that_contradict_the_configuration(changes: dict[str, Any], words: str, tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    packed, _ = pack(tmp_path, Layout())
    config = read_json(packed / "config.json")
    config["quantization_config"].update(changes)
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match="q_proj") as caught:
        start(packed)
    assert words in str(caught.value)


def test_groups_that_were_left_empty_are_in_order(tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    packed, plain = pack(tmp_path, Layout(keep_g_idx=True))
    tensors = load_file(packed / "model.safetensors")
    empty = {name: np.zeros_like(one) for name, one in tensors.items() if name.endswith(".g_idx")}
    assert empty
    save_file({**tensors, **empty}, packed / "model.safetensors")
    check(packed, plain)


def test_keys_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make(tmp_path, "Qwen2Config")
    packed, _ = pack(tmp_path, Layout())
    config = read_json(packed / "config.json")
    config["quantization_config"]["something_new"] = 3
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quantize_config.json").write_text(json.dumps({"bits": 8, "group_size": 32}))
    start(packed)
    assert "something_new" in caplog.text and "quantize_config.json" in caplog.text


def test_a_packed_head_is_named(tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    packed, _ = pack(tmp_path, Layout())
    tensors = load_file(packed / "model.safetensors")
    tensors["lm_head.qweight"] = tensors.pop("lm_head.weight").astype(np.int32)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"lm_head.*packed"):
        start(packed)


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{NAME}.qweight"), "qweight is missing"),
        (lambda t: t.pop(f"{NAME}.scales"), "scales is missing"),
        (lambda t: t.pop(f"{NAME}.g_idx"), "g_idx is missing"),
        (lambda t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"][:1]}), "qzeros has shape"),
        (lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"].astype(np.int64)}), "32-bit whole"),
        (lambda t: t.update({f"{NAME}.g_idx": t[f"{NAME}.g_idx"] + 5}), "groups outside"),
        (lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"] * np.float16("nan")}), "NaN"),
        (lambda t: t.update({f"{NAME}.scales": t[f"{NAME}.scales"].astype(np.int8)}), "floating-point"),
    ],
)
def test_damaged_tensors(damage: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path):
    make(tmp_path, "Qwen2Config")
    packed, _ = pack(tmp_path, Layout(desc_act=True))
    tensors = load_file(packed / "model.safetensors")
    damage(tensors)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(BadCheckpoint) as caught:
        start(packed)
    assert words in str(caught.value) and str(packed) in str(caught.value)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("desc_act", [False, True])
def test_dummy_weights_of_the_published_configuration(configs: Path, tmp_path: Path, bits: int, desc_act: bool):
    """Qwen-7B-Chat-Int4's config.json with fewer layers and a smaller width."""
    config = read_json(configs / "qwen1-7b-int4" / "config.json")
    config.update(hidden_size=512, num_attention_heads=4, intermediate_size=1024, num_hidden_layers=3, vocab_size=1000)
    config["quantization_config"].update(bits=bits, desc_act=desc_act)
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, max_model_len=256, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    [output] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5


def test_the_plan_knows_what_packed_weights_take(configs: Path):
    config = read_json(configs / "qwen1-7b-int4" / "config.json")
    published_bytes = 5_860_564_992
    assert (
        abs(weights_bytes(parse_config(config, "config.json"), "float16") / published_bytes - 1) < 0.02
    )  # ours keeps zeros in 16 bits


@pytest.mark.parametrize("model", ["qwen2-moe", "qwen3-moe"])
@pytest.mark.parametrize("layout", ["int4", "int4-desc-act", "int8"])
def test_a_cpu_multiplies_by_packed_experts(model: str, layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """In bfloat16 they stay packed, and nobody is told otherwise; what differs from float32 is that type's rounding."""
    MODELS[model](tmp_path)
    packed, _plain = pack(tmp_path, LAYOUTS[layout])
    ids, expected = prompt(40), logits(packed, prompt(40))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        found = logits(packed, ids, dtype="bfloat16")
    assert not [record for record in caplog.records if "unpacked" in record.message]
    # of some tokens it moves the router to another expert
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).median() < 0.05
