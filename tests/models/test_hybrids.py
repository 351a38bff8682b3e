"""Qwen3.5, Qwen3.5-MoE and Qwen3-Next against transformers, under each of the names that checkpoints give their parts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.models import parse_config, read_config
from tests.models.tiny import MOE, greedy, logits, make, prompt, start

DELTA = {
    "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 24, "linear_conv_kernel_dim": 4,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
SPARSE = {**MOE, "shared_expert_intermediate_size": 40}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-5": ("Qwen3_5TextConfig", {"rope_parameters": ROPE}),
    "qwen3-5-tied": ("Qwen3_5TextConfig", {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "qwen3-5-moe": ("Qwen3_5MoeTextConfig", {"rope_parameters": ROPE, **SPARSE}),
    "qwen3-next": (
        "Qwen3NextConfig",
        {**SPARSE, "decoder_sparse_step": 1, "norm_topk_prob": True, "partial_rotary_factor": 0.25},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(case: str, tmp_path: Path):
    config_class, changes = CASES[case]
    model = make(tmp_path, config_class, **{**DELTA, **changes})
    long = prompt(150)
    with torch.no_grad():
        expected = model(torch.tensor([long])).logits[0]
    found = logits(tmp_path, long)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.5, "such small logits prove nothing"
    prompts = [prompt(length) for length in (1, 40)]
    whole = greedy(start(tmp_path), prompts)
    for ids, answer in zip(prompts, whole, strict=True):
        assert answer == reference_answer(model, ids)
    assert greedy(start(tmp_path, max_num_batched_tokens=7), prompts) == whole


def reference_answer(model: Any, ids: list[int]) -> list[int]:
    with torch.no_grad():
        options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        out = model.generate(torch.tensor([ids]), pad_token_id=0, eos_token_id=None, **options)
    return out[0, len(ids) :].tolist()


def wrapped(source: Path, folder: Path, *, config: dict[str, Any], prefix: str, **more: torch.Tensor) -> None:
    """A text model as part of one with a vision tower: its keys under text_config, its tensors under another prefix."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    named = {name.replace("model.", prefix, 1) if name.startswith("model.") else name: x for name, x in tensors.items()}
    save_file({**named, **more}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_published_checkpoint(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    flat = tmp_path / "flat"
    make(flat, "Qwen3_5MoeTextConfig", **{**DELTA, **CASES["qwen3-5-moe"][1]})
    text = json.loads((flat / "config.json").read_text())
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "text_config": text,
        "vision_config": {"model_type": "qwen3_5_moe", "depth": 2}, "image_token_id": 250, "video_token_id": 251,
        "vision_start_token_id": 252, "vision_end_token_id": 253, "tie_word_embeddings": False,
    }  # fmt: skip
    extra = {
        "model.visual.blocks.0.attn.qkv.weight": torch.ones(6, 2),
        "mtp.layers.0.mlp.gate.weight": torch.ones(2, 2),
    }
    wrapped(flat, tmp_path / "whole", config=config, prefix=prefix, **extra)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(tmp_path / "whole", prompt(20)), logits(flat, prompt(20)))
    [line] = [record.getMessage() for record in caplog.records if "not read" in record.getMessage()]
    assert "the vision part (model.visual." in line and "a head for guessing ahead (mtp.layers.0" in line
    model = read_config(tmp_path / "whole")
    assert model.model_type == "qwen3_5_moe" and not model.notices


def test_experts_one_by_one_and_packed_are_the_same(tmp_path: Path):
    packed, single = tmp_path / "packed", tmp_path / "single"
    make(single, "Qwen3_5MoeTextConfig", **{**DELTA, **CASES["qwen3-5-moe"][1]})
    tensors = load_file(single / "model.safetensors")
    count = len(tensors)
    for layer in range(4):
        prefix = f"model.layers.{layer}.mlp.experts."
        gates, ups, downs = (
            [tensors.pop(f"{prefix}{expert}.{kind}_proj.weight") for expert in range(8)]
            for kind in ("gate", "up", "down")
        )
        pairs = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        tensors |= {f"{prefix}gate_up_proj": torch.stack(pairs), f"{prefix}down_proj": torch.stack(downs)}
    assert len(tensors) == count - 4 * (24 - 2)
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors")
    (packed / "config.json").write_text((single / "config.json").read_text())
    assert torch.equal(logits(single, prompt(20)), logits(packed, prompt(20)))


def test_half_precision_stays_as_near_as_the_reference_does(tmp_path: Path):
    model = make(tmp_path, "Qwen3_5TextConfig", dtype=torch.bfloat16, **{**DELTA, **CASES["qwen3-5"][1]})
    ids = prompt(60)
    with torch.no_grad():
        rounded = model(torch.tensor([ids])).logits[0].float()
        exact = model.float()(torch.tensor([ids])).logits[0]
    found = logits(tmp_path, ids, dtype="bfloat16")
    assert (found - exact).abs().mean() <= 2 * (rounded - exact).abs().mean() + 1e-4


def config(**changes: Any) -> dict[str, Any]:
    values = transformers.Qwen3_5TextConfig(**{**DELTA, "rope_parameters": ROPE}).to_dict()
    return {**values, "architectures": ["Qwen3_5ForCausalLM"], **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"output_gate_type": "sigmoid"}, Unsupported, "output_gate_type is 'sigmoid'"),
        ({"attn_output_gate": False}, Unsupported, "attn_output_gate is False"),
        ({"linear_num_value_heads": 3}, BadCheckpoint, "no multiple of linear_num_key_heads"),
        ({"layer_types": ["full_attention"]}, BadCheckpoint, "a word for each of 4 layers"),
        ({"layer_types": ["sliding_attention"] * 4}, Unsupported, "sliding_attention"),
        ({"partial_rotary_factor": 0.5}, Unsupported, "partial_rotary_factor"),
        ({"architectures": ["Qwen3_5ForTokenClassification"]}, Unsupported, "not one that continues"),
        ({"ngram_size": 3}, Unsupported, "ngram_size is 3"),
    ],
)
def test_what_would_change_the_answer_is_refused(changes: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        parse_config(config(**changes), "config.json")


def test_a_state_of_another_type_is_told():
    [line] = parse_config(config(mamba_ssm_dtype="bfloat16"), "config.json").notices
    assert "mamba_ssm_dtype is 'bfloat16'; states are kept in float32" in line
