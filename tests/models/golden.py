"""The golden models: their weights from a seed, and how their logits and tokens are compared."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

SEEDS = {"qwen1_tiny": 20231207, "qwen3_5_tiny": 20260020}
EXACT_BELOW = 2.0**-17  # smaller weights were set to zero
MAX_ERROR, MEAN_ERROR = 1e-3, 1e-4  # of float32 logits, whose standard deviation is about 3


def make_golden(source: Path, folder: Path) -> None:
    """A checkpoint in ``folder`` of what ``source`` describes. Weights that differ from the reference's are refused."""
    generator = torch.Generator().manual_seed(SEEDS[source.name])
    spread = _qwen1_spread if source.name == "qwen1_tiny" else _hybrid_spread
    tensors = {}
    for name, shape, digest in json.loads((source / "weights.json").read_text()):
        scale, center = spread(name, shape)
        weight = scale * torch.randn(shape, generator=generator)
        if center:
            weight = center + weight
        weight = weight.bfloat16().float()
        weight[weight.abs() < EXACT_BELOW] = 0
        found = hashlib.sha256(weight.numpy().tobytes()).hexdigest()[: len(digest)]
        assert found == digest, f"{name}: this torch draws other random numbers than the reference's"
        tensors[name] = weight
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _qwen1_spread(name: str, shape: list[int]) -> tuple[float, float]:
    """The standard deviation of a tensor's numbers and their mean: logits get clear winners."""
    if "ln_" in name or name == "lm_head.weight":
        return 0.2, 1.0 if "ln_" in name else 0.0
    if name == "transformer.wte.weight":
        return 1.0, 0.0
    if "c_attn" in name:
        return (0.5 if name.endswith("bias") else 0.08), 0.0
    return 1.5 / math.sqrt(shape[1]), 0.0


# By the end of a tensor's name, the first that fits.
HYBRID_SPREADS = {
    "linear_attn.norm.weight": (0.2, 1.0),
    "A_log": (1.5, -3.0),  # memories fade by 0.3 to 0.999 a token
    "dt_bias": (0.7, 0.5),
    "conv1d.weight": (0.5, 0.0),
    "q_norm.weight": (0.2, 0.5),
    "k_norm.weight": (0.2, 0.5),
    "norm.weight": (0.2, 0.0),
    "layernorm.weight": (0.2, 0.0),
    "pre_fc_norm_embedding.weight": (0.2, 0.0),
    "pre_fc_norm_hidden.weight": (0.2, 0.0),
    "embed_tokens.weight": (1.0, 0.0),
    "lm_head.weight": (0.28, 0.0),
    **{f"in_proj_{part}.weight": (0.11, 0.0) for part in ("qkv", "z", "b", "a")},
    **{f"{part}_proj.weight": (0.11, 0.0) for part in "qkv"},
}


def _hybrid_spread(name: str, shape: list[int]) -> tuple[float, float]:
    found = next((spread for end, spread in HYBRID_SPREADS.items() if name.endswith(end)), None)
    return (1.5 / math.sqrt(shape[-1]), 0.0) if found is None else found


def check_logits(found: Any, expected: Any) -> None:
    """float32 [tokens, vocab], both."""
    error = np.abs(np.asarray(found, np.float32) - expected)
    assert error.max() <= MAX_ERROR and error.mean() <= MEAN_ERROR, (error.max(), error.mean())
    assert (found.argmax(-1) == expected.argmax(-1)).all()
