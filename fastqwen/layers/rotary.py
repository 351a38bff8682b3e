"""Rotary profiles. A profile is a property of a request, not of the model: it is chosen once from the prompt's whole
length and kept, so that prompts of different lengths run in one batch, each as it would run alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastqwen.layers.rotary_key import DEFAULT_KEY, parse_key
from fastqwen.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int, key: str = DEFAULT_KEY) -> tuple[Tensor, float]:
    """float32 [head_dim / 2] angles per position, and the factor on cosine and sine, for a profile's key."""
    kind, value = parse_key(key)
    if kind == "ntk":
        theta = rope.theta * value ** (head_dim / (head_dim - 2))
        return _plain(theta, head_dim), 1.0
    if rope.kind == "linear":
        return _plain(rope.theta, head_dim) / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, head_dim), 1.0
    factor = value if kind == "yarn" else rope.factor
    if rope.kind == "yarn" and factor > 1.0:
        return _yarn(rope, head_dim, factor), _yarn_scale(rope, factor)
    return _plain(rope.theta, head_dim), 1.0


def logn_scale(positions: Tensor, logn_len: int) -> Tensor:
    """max(1, ln(p + 1) / ln(logn_len)) for 0-based positions (Qwen technical report, arXiv 2309.16609)."""
    return (torch.log((positions + 1).float()) / math.log(logn_len)).clamp_(min=1.0)


def _plain(theta: float, head_dim: int) -> Tensor:
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))


def _yarn(rope: RopeConfig, head_dim: int, factor: float) -> Tensor:
    """YaRN, arXiv 2309.00071, section 3.2: interpolate slow dimensions, keep fast ones, blend between."""

    def dimension_of(rotations: float) -> float:
        return head_dim * math.log(rope.trained_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    base = _plain(rope.theta, head_dim)
    return base / factor * interpolated + base * (1 - interpolated)


def _yarn_scale(rope: RopeConfig, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _llama3(rope: RopeConfig, head_dim: int) -> Tensor:
    """Llama 3.1's rule: long wavelengths divided by factor, short ones kept, a linear blend between."""
    base = _plain(rope.theta, head_dim)
    wavelength = 2 * math.pi / base
    low_wavelength = rope.trained_len / rope.low_freq_factor
    high_wavelength = rope.trained_len / rope.high_freq_factor
    blend = (rope.trained_len / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = (1 - blend) * base / rope.factor + blend * base
    scaled = torch.where(wavelength > low_wavelength, base / rope.factor, smooth)
    return torch.where(wavelength < high_wavelength, base, scaled)
