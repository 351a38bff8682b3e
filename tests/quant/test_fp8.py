"""FP8: a checkpoint in each documented layout computes what its own dequantised weights compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastqwen import LLM, SamplingParams
from fastqwen.errors import BadCheckpoint
from fastqwen.kernels import ScaledWeight
from fastqwen.kernels.cuda.pack import pack_scaled
from fastqwen.kernels.reference import ReferenceOps, unpack_scaled
from fastqwen.layers.linear import ScaledLinear
from fastqwen.model_config import read_json
from fastqwen.models import parse_config
from fastqwen.plan import weights_bytes
from tests.models.tiny import MOE, greedy, make, make_qwen1, prompt, start
from tests.quant.storing import Stored, check, store_twice

LARGEST = 448.0  # of e4m3


def stored_as(
    height: int | None, width: int | None, *, shape: tuple[int, ...] | None = None, name: str = "weight_scale"
) -> Callable[[Tensor], Stored]:
    """Blocks of height x width, None for all; ``shape`` of the scales in the file, if they have another."""

    def store(matrix: Tensor) -> Stored:
        block = height or matrix.shape[0], width or matrix.shape[1]
        counts = [-(-size // step) for size, step in zip(matrix.shape, block, strict=True)]
        scales = torch.zeros(counts)
        each = torch.zeros_like(matrix)
        for i in range(counts[0]):
            for j in range(counts[1]):
                part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                scales[i, j] = matrix[part].abs().max() / LARGEST
                each[part] = scales[i, j]
        numbers = (matrix / each).to(torch.float8_e4m3fn)
        kept = scales if shape is None else scales.reshape(shape)
        return {"weight": numbers, name: kept, "input_scale": torch.ones(1)}, numbers.float() * each

    return store


def of_llm_compressor(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 16]}
OF_OUTPUTS = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}}
LAYOUTS: dict[str, tuple[Callable[[Tensor], Stored], dict[str, Any]]] = {
    "blocks": (stored_as(32, 16, name="weight_scale_inv"), BLOCKS),
    "cut-blocks": (stored_as(40, 24, name="weight_scale_inv"), {**BLOCKS, "weight_block_size": [40, 24]}),
    "matrix": (stored_as(None, None, shape=()), {"quant_method": "fp8", "activation_scheme": "static"}),
    "llm-compressor-matrix": (stored_as(None, None, shape=(1,)), of_llm_compressor("tensor")),
    "llm-compressor-outputs": (stored_as(1, None), of_llm_compressor("channel")),
    "llm-compressor-blocks": (stored_as(16, 16), of_llm_compressor("block", block_structure=[16, 16])),
    "modelopt": (stored_as(None, None, shape=()), {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}),
    "modelopt-outputs": (stored_as(1, None, shape=(-1,)), OF_OUTPUTS),
}  # fmt: skip
MODELS: dict[str, Callable[[Path], Any]] = {
    "qwen1": make_qwen1,
    "qwen2": lambda folder: make(folder, "Qwen2Config"),
    "qwen3": lambda folder: make(folder, "Qwen3Config", head_dim=32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", ["qwen1", "qwen3"])
def test_the_same_logits_as_its_own_dequantised_weights(model: str, layout: str, tmp_path: Path):
    MODELS[model](tmp_path)
    check(*store_twice(tmp_path, *LAYOUTS[layout]))


def test_experts_are_unpacked_while_loading(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make(tmp_path, "Qwen3MoeConfig", **MOE, head_dim=16, norm_topk_prob=True)
    check(*store_twice(tmp_path, *LAYOUTS["blocks"]))
    assert len([record for record in caplog.records if "unpacked" in record.message]) == 1


@pytest.mark.parametrize("plain", [("k_proj",), ("mlp.",)])
def test_modules_without_scales_are_loaded_as_they_are(plain: tuple[str, ...], tmp_path: Path):
    MODELS["qwen2"](tmp_path)
    check(*store_twice(tmp_path, *LAYOUTS["blocks"], plain_modules=plain))


def test_the_same_greedy_tokens_in_a_batch(tmp_path: Path):
    MODELS["qwen2"](tmp_path)
    stored, plain = store_twice(tmp_path, *LAYOUTS["matrix"])
    prompts = [prompt(length) for length in (3, 63, 150)]
    assert greedy(start(stored), prompts, 16) == greedy(start(plain), prompts, 16)


def test_model_optimizers_own_file(tmp_path: Path):
    MODELS["qwen2"](tmp_path)
    stored, plain = store_twice(tmp_path, *LAYOUTS["modelopt"])
    config = read_json(stored / "config.json")
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (stored / "hf_quant_config.json").write_text(json.dumps(own))
    check(stored, plain)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**BLOCKS, "weight_block_size": [32]}, "weight_block_size"),
        ({**BLOCKS, "fmt": "e5m2"}, "fmt"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
        (of_llm_compressor("group", group_size=16), "'group'"),
        (of_llm_compressor("channel", num_bits=4), "4 bits"),
        ({**of_llm_compressor("channel"), "format": "pack-quantized"}, "pack-quantized"),
        ({**of_llm_compressor("channel"), "transform_config": {"a": 1}}, "transform_config"),
        ({**of_llm_compressor("channel"), "config_groups": {}}, "config_groups"),
    ],
)
def test_variants_that_are_refused(config: dict[str, Any], words: str, tmp_path: Path):
    MODELS["qwen2"](tmp_path)
    stored, _ = store_twice(tmp_path, LAYOUTS["blocks"][0], config)
    with pytest.raises(BadCheckpoint) as caught:
        start(stored)
    assert words in str(caught.value) and "config.json" in str(caught.value) and "\n" not in str(caught.value)


NAME = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{NAME}.weight_scale_inv"), "no model.layers.1.mlp.down_proj.weight_scale_inv"),
        (lambda t: t.update({f"{NAME}.weight_scale_inv": torch.ones(1, 1)}), "has shape"),
        (lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].float()}), "expected float8_e4m3fn"),
        (lambda t: t[f"{NAME}.weight"].view(torch.uint8).fill_(127), "NaN"),
    ],
)
def test_damaged_tensors(damage: Callable[[dict[str, Any]], Any], words: str, tmp_path: Path):
    MODELS["qwen2"](tmp_path)
    stored, _ = store_twice(tmp_path, *LAYOUTS["blocks"])
    tensors = load_file(stored / "model.safetensors")
    damage(tensors)
    save_file(tensors, stored / "model.safetensors")
    with pytest.raises(BadCheckpoint) as caught:
        start(stored)
    assert words in str(caught.value) and str(stored) in str(caught.value)


def scaled(height: int, width: int, out_size: int, in_size: int) -> ScaledWeight:
    numbers = torch.randn(out_size, in_size).to(torch.float8_e4m3fn)
    return ScaledWeight(numbers, torch.rand(-(-out_size // height), -(-in_size // width)) + 0.5, (height, width))


@pytest.mark.parametrize("first, second", [((128, 64), (128, 64)), ((256, 192), (64, 192)), ((32, 64), (128, 64))])
def test_joined_matrices_keep_their_numbers(first: tuple[int, int], second: tuple[int, int]):
    parts = scaled(*first, 256, 192), scaled(*second, 80, 192)
    joined = ScaledLinear(ReferenceOps(), parts[0]).joined(ScaledLinear(ReferenceOps(), parts[1]))
    assert isinstance(joined, ScaledLinear)
    assert unpack_scaled(joined.weight, 0, 336).equal(torch.cat([unpack_scaled(a, 0, a.out_size) for a in parts]))


@pytest.mark.parametrize(
    "height, width, kind", [(128, 128, "TILES"), (16, 192, "TILES"), (24, 64, "FLOATS"), (1, 500, "ROWS")]
)
def test_the_gpus_layout_holds_the_same_numbers(height: int, width: int, kind: str):
    weight = scaled(height, width, 72, 200)
    packed = pack_scaled(weight)
    assert packed is not None and packed.kind == kind
    numbers = packed.words.flatten().view(torch.float8_e4m3fn).float().view(96, 256)[:72, :200]
    if kind == "ROWS":
        each = packed.scales[:, None]
    else:
        lines = packed.scales[:, :, None, None].expand(-1, -1, 8, 2) if kind == "TILES" else packed.scales
        each = (
            lines.permute(0, 3, 2, 1).reshape(-1, packed.groups)[:72].repeat_interleave(packed.group_size, 1)[:, :200]
        )
    assert (numbers * each).equal(unpack_scaled(weight, 0, 72))


def test_blocks_that_no_kernel_takes_are_left_to_the_reference():
    assert pack_scaled(scaled(16, 24, 64, 96)) is None


def test_dummy_weights_of_the_published_configuration(configs: Path, tmp_path: Path):
    """Qwen3-8B-FP8's config.json with fewer layers and a smaller width."""
    config = read_json(configs / "qwen3-8b" / "config.json")
    config.update(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=384)
    config.update(num_hidden_layers=2, vocab_size=1000)
    config["quantization_config"] = {**BLOCKS, "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    llm = LLM(str(tmp_path), load_format="dummy", skip_tokenizer_init=True, max_model_len=256, seed=1)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    [output] = llm.generate([[1, 2, 3]], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 5


def test_the_plan_knows_what_they_take(configs: Path):
    config = read_json(configs / "qwen3-8b" / "config.json")
    plain = weights_bytes(parse_config(config, "config.json"), "bfloat16")
    config["quantization_config"] = {**BLOCKS, "weight_block_size": [128, 128]}
    linears = 36 * 4096 * (4096 + 2 * 1024 + 4096 + 3 * 12288)
    saved = plain - weights_bytes(parse_config(config, "config.json"), "bfloat16")
    assert saved == linears - linears * 4 // (128 * 128)
