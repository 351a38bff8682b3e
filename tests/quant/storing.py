"""A tiny checkpoint twice: as a quantization method stores it, and as the plain matrices that the stored ones stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastqwen.model_config import read_json
from tests.models.tiny import logits, prompt

LINEAR = re.compile(r"(_proj(_\w+)?|c_attn|mlp\.w1|mlp\.w2)\.weight$")
Stored = tuple[dict[str, Tensor], Tensor]  # a module's tensors, and the matrix that they stand for


def store_twice(
    folder: Path, store: Callable[[Tensor], Stored], config: dict[str, Any], *, plain_modules: tuple[str, ...] = ()
) -> tuple[Path, Path]:
    """``plain_modules`` are parts of the names of linears that stay as they are."""
    stored, plain = load_file(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    for name in [name for name in plain if LINEAR.search(name) and not any(part in name for part in plain_modules)]:
        tensors, plain[name] = store(stored.pop(name).float())
        stored |= {name.removesuffix("weight") + key: value for key, value in tensors.items()}
    values = read_json(folder / "config.json")
    places = folder / "stored", folder / "plain"
    for place, tensors in zip(places, (stored, plain), strict=True):
        place.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors")
        extra = {"quantization_config": config} if place.name == "stored" else {}
        (place / "config.json").write_text(json.dumps({**values, **extra}))
    return places


def check(stored: Path, plain: Path, length: int = 100) -> None:
    ids = prompt(length)
    expected = logits(plain, ids)
    assert expected.std() > 0.3, "such small logits prove nothing"
    torch.testing.assert_close(logits(stored, ids), expected, rtol=0, atol=1e-4)
