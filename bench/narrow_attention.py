"""Attention of decoding rows over a cache of 8 bits, kernel by kernel, beside a cache of 16 bits; on a GPU.

python bench/narrow_attention.py OUT.json [7b 8b ...] [m8 m64 m256]

Each kernel is compared with the others' answer, then timed in a CUDA graph over many layers' caches, so that nothing stays in
the second-level cache. Microseconds a layer, and TB/s of keys and values.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.tune_kernels import HEADS, graph_us
from fastqwen.benchmark.machine import measure
from fastqwen.kernels import AttentionParts, LayerCache, StepTokens
from fastqwen.kernels.triton import streamed_attention, streamed_narrow, streamed_scalar
from fastqwen.kernels.triton.attention import DecodeWorkspace

CONTEXT, BLOCK, DIM = 1088, 64, 128
DEVICE = torch.device("cuda")
CACHE_BYTES = 8e9  # of all layers together
KERNELS = {"16 bits": streamed_attention, "narrow": streamed_narrow, "scalar": streamed_scalar}


def make_cache(blocks: int, kv_heads: int, dtype: torch.dtype) -> LayerCache:
    size = (blocks, kv_heads, BLOCK, DIM)
    if dtype.itemsize == 2:
        return LayerCache(*(torch.randn(size, device=DEVICE).to(dtype) for _ in range(2)))
    numbers = [torch.randint(0, 120, size, device=DEVICE, dtype=torch.int8).view(dtype) for _ in range(2)]
    return LayerCache(*numbers, *(torch.rand(size[:3], device=DEVICE).half() / 50 for _ in range(2)))


def time_one(name: str, rows: int, kernel: str, dtype: torch.dtype) -> tuple[dict[str, Any], torch.Tensor]:
    shape, layers = HEADS[name]
    read = rows * CONTEXT * shape.num_kv_heads * 2 * (DIM * dtype.itemsize + (2 if dtype.itemsize == 1 else 0))
    layers = max(2, min(layers, int(CACHE_BYTES / read)))
    blocks = rows * (CONTEXT // BLOCK + 1)
    torch.manual_seed(0)
    caches = [make_cache(blocks, shape.num_kv_heads, dtype) for _ in range(layers)]
    number = torch.float16 if name == "7b" else torch.bfloat16
    if dtype.itemsize == 2:
        number = dtype
    step = StepTokens(
        positions=torch.full((rows,), CONTEXT - 1, dtype=torch.int32, device=DEVICE),
        cos_sin=torch.ones(rows, DIM, device=DEVICE),
        q_scale=None,
        slots=torch.arange(rows, dtype=torch.int32, device=DEVICE),
        row_starts=torch.arange(rows + 1, dtype=torch.int32, device=DEVICE),
        block_tables=torch.randperm(blocks, device=DEVICE).int().view(rows, -1).contiguous(),
        num_decode_rows=rows,
    )
    qkv = torch.randn(rows, shape.width, device=DEVICE).to(number)
    out = torch.empty(rows, shape.num_heads * DIM, dtype=number, device=DEVICE)
    space, parts = DecodeWorkspace(DEVICE, shape=shape), AttentionParts(shape)

    def run() -> None:
        for cache in caches:
            KERNELS[kernel].decode_attention(qkv, step, cache, parts, space, out=out)

    us = graph_us(run, layers)
    return {"us": round(us, 2), "tb_s": round(read / us / 1e6, 3)}, out.float()


def main() -> None:
    out, words = Path(sys.argv[1]), sys.argv[2:]
    rows = [int(word[1:]) for word in words if word[0] == "m"] or [8, 64]
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "read_tb_s": measure(DEVICE, "bfloat16").read_gb_s / 1e3,
    }
    for name, count in product([word for word in words if word[0] != "m"] or ["7b", "8b"], rows):
        own, answers = {}, {}
        for kernel, dtype in (
            ("16 bits", torch.float16), ("narrow", torch.int8), ("scalar", torch.int8), ("scalar", torch.float8_e4m3fn),
        ):  # fmt: skip
            key = f"{kernel} {str(dtype).removeprefix('torch.')}"
            own[key], answers[key] = time_one(name, count, kernel, dtype)
        own["difference"] = float((answers["narrow int8"] - answers["scalar int8"]).abs().max())
        results[f"{name} b{count}"] = own
        print(f"{name} b{count}", own, flush=True)
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
