"""Every architecture against transformers: float32 logits to 1e-3, 64 greedy tokens equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny import MOE, YARN, greedy, logits, make, prompt, start

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied-mha": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-3-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3-yarn": ("Qwen3Config", {"head_dim": 32, "rope_parameters": YARN}),
    "qwen2-moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 80}),
    "qwen2-moe-mixed": (
        "Qwen2MoeConfig",
        {**MOE, "shared_expert_intermediate_size": 80, "norm_topk_prob": True, "decoder_sparse_step": 2},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe-mixed": ("Qwen3MoeConfig", {**MOE, "head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [1]}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens(case: str, tmp_path: Path):
    config_class, changes = CASES[case]
    model = make(tmp_path, config_class, **changes)
    prompts = [prompt(length) for length in (1, 17, 40)]
    long = prompt(150)
    with torch.no_grad():
        expected = model(torch.tensor([long])).logits[0]
    found = logits(tmp_path, long)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert expected.std() > 0.5, "such small logits prove nothing"
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    whole = greedy(start(tmp_path), prompts)
    for ids, answer in zip(prompts, whole, strict=True):
        assert answer == _greedy_reference(model, ids)
    assert greedy(start(tmp_path, max_num_batched_tokens=7), prompts) == whole


def _greedy_reference(model: Any, ids: list[int]) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["qwen2", "qwen3", "qwen3-moe"])
def test_half_precision_stays_as_near_as_the_reference_does(case: str, dtype: torch.dtype, tmp_path: Path):
    """Teacher-forced: our half precision may not be further from float32 than twice what transformers' own is."""
    config_class, changes = CASES[case]
    model = make(tmp_path, config_class, dtype=dtype, **changes)
    ids = prompt(60)
    with torch.no_grad():
        rounded = model(torch.tensor([ids])).logits[0].float()
        exact = model.float()(torch.tensor([ids])).logits[0]
    found = logits(tmp_path, ids, dtype=str(dtype).removeprefix("torch."))
    assert (found - exact).abs().mean() <= 2 * (rounded - exact).abs().mean() + 1e-4
