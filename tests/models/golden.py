"""The golden Qwen-1 model: its weights from a seed, and how its logits and tokens are compared."""

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

SEED = 20231207
EXACT_BELOW = 2.0**-17  # smaller weights were set to zero
MAX_ERROR, MEAN_ERROR = 1e-3, 1e-4  # of float32 logits, whose standard deviation is about 3


def make_golden_qwen1(source: Path, folder: Path) -> None:
    """A checkpoint in ``folder`` of what ``source`` describes. Weights that differ from the reference's are refused."""
    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, shape, digest in json.loads((source / "weights.json").read_text()):
        weight = _scale(name, shape) * torch.randn(shape, generator=generator)
        if "ln_" in name:
            weight += 1
        weight = weight.bfloat16().float()
        weight[weight.abs() < EXACT_BELOW] = 0
        found = hashlib.sha256(weight.numpy().tobytes()).hexdigest()[: len(digest)]
        assert found == digest, f"{name}: this torch draws other random numbers than the reference's"
        tensors[name] = weight
    for name in ("config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _scale(name: str, shape: list[int]) -> float:
    """The standard deviation of a tensor's numbers: logits get clear winners."""
    if "ln_" in name or name == "lm_head.weight":
        return 0.2
    if name == "transformer.wte.weight":
        return 1.0
    if "c_attn" in name:
        return 0.5 if name.endswith("bias") else 0.08
    return 1.5 / math.sqrt(shape[1])


def check_logits(found: Any, expected: Any) -> None:
    """float32 [tokens, vocab], both."""
    error = np.abs(np.asarray(found, np.float32) - expected)
    assert error.max() <= MAX_ERROR and error.mean() <= MEAN_ERROR, (error.max(), error.mean())
    assert (found.argmax(-1) == expected.argmax(-1)).all()
