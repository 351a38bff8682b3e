"""FP8 and GPTQ siblings of hybrids compute what their own dequantised weights compute, whatever their files leave plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastqwen.errors import BadCheckpoint
from fastqwen.model_config import read_json
from fastqwen.weights.checkpoint import open_checkpoint
from tests.models.test_hybrids import CASES, DELTA
from tests.models.tiny import greedy, make, prompt, start
from tests.quant.packing import Layout, quantize
from tests.quant.storing import Stored, check, store_twice
from tests.quant.test_fp8 import BLOCKS, LAYOUTS

# What published files leave as it is: of the small matrices, the routers, and the head.
PLAIN = ("in_proj_a", "in_proj_b", "in_proj_ba", "shared_expert_gate")
SIZES = {**DELTA, "linear_key_head_dim": 32, "linear_value_head_dim": 32, "moe_intermediate_size": 64,
         "shared_expert_intermediate_size": 64}  # fmt: skip
MODELS = ["qwen3-5", "qwen3-5-moe", "qwen3-next"]


def with_half_scales(matrix: Tensor) -> Stored:
    """As published files have them: scales in bfloat16."""
    tensors, _ = LAYOUTS["blocks"][0](matrix)
    scales = tensors["weight_scale_inv"].bfloat16()
    each = scales.float().repeat_interleave(32, 0).repeat_interleave(16, 1)
    dense = tensors["weight"].float() * each[: matrix.shape[0], : matrix.shape[1]]
    return {**tensors, "weight_scale_inv": scales}, dense


def tiny(folder: Path, case: str) -> None:
    config_class, changes = CASES[case]
    sizes = {key: value for key, value in SIZES.items() if key in changes or key in DELTA}
    make(folder, config_class, **{**changes, **sizes})


def of_gptq(layout: Layout) -> Any:
    def store(matrix: Tensor) -> Stored:
        tensors, dense = quantize(matrix.numpy().astype(np.float32), layout)
        return {name: torch.from_numpy(value) for name, value in tensors.items()}, torch.from_numpy(dense)

    return store


@pytest.mark.parametrize("plain", [PLAIN, (*PLAIN, "linear_attn."), (*PLAIN, "self_attn.", "shared_expert.")], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_fp8_in_blocks(case: str, plain: tuple[str, ...], tmp_path: Path):
    tiny(tmp_path, case)
    config = {**BLOCKS, "modules_to_not_convert": ["lm_head", *plain]}
    check(*store_twice(tmp_path, with_half_scales, config, plain_modules=plain))


@pytest.mark.parametrize("layout", [Layout(), Layout(sym=False, desc_act=True), Layout(bits=8)], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_gptq(case: str, layout: Layout, tmp_path: Path):
    tiny(tmp_path, case)
    plain = (*PLAIN, "linear_attn.in_proj", "shared_expert")
    check(*store_twice(tmp_path, of_gptq(layout), layout.config(), plain_modules=plain))


def test_gptq_of_everything(tmp_path: Path):
    """b and a as well, whose 4 outputs are half a word of zeros."""
    tiny(tmp_path, "qwen3-5")
    check(*store_twice(tmp_path, of_gptq(Layout()), Layout().config(), plain_modules=("in_proj_a", "in_proj_b")))


def test_the_same_greedy_tokens_in_a_batch_and_from_the_cache(tmp_path: Path):
    tiny(tmp_path, "qwen3-5-moe")
    stored, plain = store_twice(tmp_path, LAYOUTS["blocks"][0], BLOCKS, plain_modules=PLAIN)
    prompts = [prompt(length) for length in (3, 63, 90)]
    expected = greedy(start(plain), prompts, 16)
    core = start(stored, max_num_batched_tokens=33)
    assert greedy(core, prompts, 16) == greedy(core, prompts, 16) == expected
    assert core.scheduler.num_prefix_hits > 0


def as_published(folder: Path, *, kind: str) -> None:
    """The same checkpoint as part of one with a vision tower, which is plain, and with an MTP layer, which is packed."""
    tensors = load_file(folder / "model.safetensors")
    named = {name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: one
             for name, one in tensors.items()}  # fmt: skip
    named["model.visual.blocks.0.attn.qkv.weight"] = torch.ones(6, 2)
    named["mtp.fc.weight"] = torch.ones(2, 2)
    named["mtp.layers.0.mlp.experts.0.gate_proj.weight"] = torch.ones(2, 2).to(torch.float8_e4m3fn)
    named["mtp.layers.0.mlp.experts.0.gate_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(named, folder / "model.safetensors")
    text = read_json(folder / "config.json")
    quantization = text.pop("quantization_config", None)
    config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": text,
              "vision_config": {"model_type": "qwen3_5_moe"}, "tie_word_embeddings": False}  # fmt: skip
    if quantization is not None:
        (text if kind == "inside" else config)["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["inside", "outside"])
def test_a_published_fp8_file_with_its_other_parts(kind: str, tmp_path: Path):
    tiny(tmp_path, "qwen3-5-moe")
    excluded = [
        "lm_head",
        "model.visual.blocks.0.attn.qkv",
        "mtp.fc",
        "model.language_model.layers.0.linear_attn.in_proj_a",
    ]
    config = {**BLOCKS, "modules_to_not_convert": excluded}
    places = store_twice(tmp_path, LAYOUTS["blocks"][0], config, plain_modules=PLAIN)
    for place in places:
        as_published(place, kind=kind)
    assert open_checkpoint(places[0]).model.quantization is not None
    check(*places)


def test_experts_whose_scales_are_in_one_tensor_are_refused_by_name(tmp_path: Path):
    """As transformers holds them while it computes; published files have a tensor for each expert."""
    tiny(tmp_path, "qwen3-5-moe")
    stored, _ = store_twice(tmp_path, LAYOUTS["blocks"][0], BLOCKS, plain_modules=PLAIN)
    tensors = load_file(stored / "model.safetensors")
    prefix = "model.layers.0.mlp.experts."
    for kind, name in (("weight", "down_proj"), ("weight_scale_inv", "down_proj_scale_inv")):
        tensors[prefix + name] = torch.stack([tensors.pop(f"{prefix}{expert}.down_proj.{kind}") for expert in range(8)])
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=r"experts\.0\.down_proj\.weight has 8 bits a number, but there is no"):
        start(stored)
