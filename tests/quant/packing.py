"""Packs matrices into GPTQ's layout, word by word as the format's description says; numpy only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Layout:
    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    v2: bool = False
    bias: bool = False  # a zero bias tensor on every linear, as in the published Qwen-1 files
    keep_g_idx: bool = True
    seed: int = field(default=0)

    def config(self) -> dict[str, object]:
        values: dict[str, object] = {
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "quant_method": "gptq",
        }
        return {**values, "checkpoint_format": "gptq_v2"} if self.v2 else values


def pack_columns(numbers: np.ndarray, bits: int) -> np.ndarray:
    """[n, m] -> int32 [n, m * bits / 32]: consecutive numbers of a row share a word, the first in the lowest bits."""
    if bits == 3:  # 32 numbers in three words, as a stream of bits
        stream = ((numbers[..., None] >> np.arange(3)) & 1).astype(np.uint8).reshape(numbers.shape[0], -1)
        return np.packbits(stream, axis=1, bitorder="little").view(np.int32)
    per_word = 32 // bits
    words = np.zeros((numbers.shape[0], numbers.shape[1] // per_word), dtype=np.uint32)
    for place in range(per_word):
        words |= (numbers[:, place::per_word].astype(np.uint32) & (2**bits - 1)) << np.uint32(bits * place)
    return words.view(np.int32)


def quantize(
    weight: np.ndarray, layout: Layout, g_idx: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """weight [out, in] -> the linear's tensors, and the float32 matrix [out, in] that they stand for."""
    out_size, in_size = weight.shape
    group_size = in_size if layout.group_size == -1 else layout.group_size
    num_groups = -(-in_size // group_size)
    if g_idx is None:
        g_idx = np.arange(in_size, dtype=np.int32) // group_size
        if layout.desc_act:
            g_idx = np.random.default_rng(layout.seed).permutation(g_idx)
    top = 2**layout.bits - 1
    scales = np.zeros((num_groups, out_size), dtype=np.float16)
    zeros = np.zeros((num_groups, out_size), dtype=np.int64)
    for group in range(num_groups):
        part = weight[:, g_idx == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if layout.sym:
            high = np.maximum(-low, high)
            low = -high
        scales[group] = np.maximum((high - low) / top, 1e-4)
        zeros[group] = (
            (top + 1) // 2 if layout.sym else np.clip(np.round(-low / scales[group].astype(np.float32)), 1, top)
        )
    scale, zero = scales.astype(np.float32)[g_idx], zeros[g_idx]  # [in, out]
    codes = np.clip(np.round(weight.T / scale) + zero, 0, top).astype(np.int64)
    dense = (scale * (codes - zero)).T
    tensors = {
        "qweight": pack_columns(codes.T, layout.bits).T.copy(),
        "qzeros": pack_columns(zeros if layout.v2 else zeros - 1, layout.bits),
        "scales": scales,
    }
    if layout.keep_g_idx:
        tensors["g_idx"] = g_idx.astype(np.int32)
    if layout.bias:
        tensors["bias"] = np.zeros(out_size, dtype=np.float16)
    return tensors, np.ascontiguousarray(dense, dtype=np.float32)
