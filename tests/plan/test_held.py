"""The planned weights against the tensors of a decoder that the engine built: whatever it joins, unpacks or drops."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import pytest
import torch

from fastqwen.build import build_decoder
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.layers.linear import Linear
from fastqwen.model_config import ModelConfig
from fastqwen.models import parse_config
from fastqwen.plan.weights import num_dense_layers, weights_bytes
from fastqwen.weights.source import DummyWeights

COMMON = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 512,
    "vocab_size": 1024, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu",
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
INT4 = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
INT8 = {**INT4, "bits": 8}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**COMMON, "model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen2 with biases": {**COMMON, "model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3 experts": {**COMMON, **MOE, "model_type": "qwen3_moe", "head_dim": 32, "decoder_sparse_step": 1},
    "qwen2 experts": {
        **COMMON, **MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 256, "decoder_sparse_step": 2,
    },
}  # fmt: skip


def held_bytes(value: Any, seen: set[int]) -> int:
    """Of all tensors within; one that stands in two places counts once."""
    if isinstance(value, torch.Tensor):
        pointer = value.untyped_storage().data_ptr()
        if pointer in seen:
            return 0
        seen.add(pointer)
        return value.untyped_storage().nbytes()
    if isinstance(value, (list, tuple)):
        return sum(held_bytes(one, seen) for one in value)
    if isinstance(value, Linear):
        return sum(held_bytes(one, seen) for one in vars(value).values())
    if dataclasses.is_dataclass(value):
        return sum(held_bytes(getattr(value, field.name), seen) for field in dataclasses.fields(value))
    return 0


def built(model: ModelConfig) -> tuple[int, int]:
    """(held, counted while loading), with dummy weights of 16 bits."""
    weights = DummyWeights(torch.float16, torch.device("cpu"), seed=0)
    decoder = build_decoder(model, weights, ReferenceOps())
    return held_bytes(decoder, set()), weights.num_bytes


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_model_holds_what_is_planned(name: str):
    model = parse_config(MODELS[name], name)
    held, counted = built(model)
    assert weights_bytes(model, "float16") == held == counted


@pytest.mark.parametrize("quantization", [INT4, INT8], ids=["int4", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_gptq_model_holds_what_is_planned(name: str, quantization: dict[str, Any]):
    """But for a bias at every linear, which published files have and dummy weights do not: 2 bytes an output."""
    model = parse_config({**MODELS[name], "quantization_config": quantization}, name)
    held, _ = built(model)
    planned = weights_bytes(model, "float16")
    outputs = COMMON["hidden_size"] + (0 if model.qkv_bias else model.q_size + 2 * model.kv_size)
    biases = 2 * (
        model.num_layers * outputs + num_dense_layers(model) * (2 * model.intermediate_size + model.hidden_size)
    )
    if model.moe is not None and model.moe.shared_size:
        sparse = len(model.moe.sparse_layers)
        biases += 2 * sparse * (2 * model.moe.shared_size + model.hidden_size)
    assert planned - held == biases


def test_packed_is_smaller_than_plain_and_larger_than_its_codes():
    model = parse_config(MODELS["qwen2 with biases"], "")
    packed = msgspec.structs.replace(model, quantization=INT4)
    assert weights_bytes(packed, "float16") < 0.6 * weights_bytes(model, "float16")
