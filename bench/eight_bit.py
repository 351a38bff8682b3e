"""Products with 8-bit floating-point weights on a GPU: python bench/eight_bit.py OUT.json [check] [time]

``check``: every number of rows against the reference operation, on fresh numbers; ``time``: Qwen3-8B's matrices by the packed
kernels, by the library with activations of 8 bits, and by the library in bfloat16, to choose by.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastqwen.kernels import ScaledWeight
from fastqwen.kernels.cuda.eight_bit import eight_bit_product, multiplies
from fastqwen.kernels.cuda.packed_linear import PackedProduct, PackedSpace, make_product, packed_product
from fastqwen.kernels.reference import unpack_scaled
from fastqwen.kernels.triton.quantize import quantize

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
FEW, MANY = (1, 8, 16, 32, 64), (8, 16, 32, 48, 64, 128, 256, 2048, 8192)
BLOCKS = {"blocks": (128, 128), "rows": (1, None), "matrix": (None, None), "odd": (24, 192)}


def random_weight(n: int, k: int, height: int | None, width: int | None) -> ScaledWeight:
    numbers = (torch.randn(n, k, device="cuda") * 32).to(torch.float8_e4m3fn)
    block = height or n, width or k
    scales = (torch.rand(-(-n // block[0]), -(-k // block[1]), device="cuda") + 0.5) * 1e-3
    return ScaledWeight(numbers, scales, block)


def product_of(weight: ScaledWeight, space: PackedSpace) -> PackedProduct:
    product = make_product(weight, torch.bfloat16, space)
    assert product is not None
    return product


def check(space: PackedSpace) -> list[dict[str, Any]]:
    wrong = []
    for name, block in BLOCKS.items():
        weight = random_weight(640, 1152, *block)
        product = product_of(weight, space)
        plain = unpack_scaled(weight, 0, 640)
        for rows in (1, 3, 8, 17, 32, 33, 64, 65, 130, 301, 1024):
            x = torch.randn(rows, 1152, device="cuda").bfloat16()
            seen, limit = x.float(), 0.02
            if multiplies(product.weight, space.card.capability) and rows > product.most_rows:
                width = 1152 if product.weight.kind == "ROWS" else 128
                numbers, scales = quantize(x, width)
                seen = numbers.float() * scales.t().repeat_interleave(width, 1)
                off = ((seen - x.float()).abs() / x.float().abs().clamp(min=0.05)).max().item()
                if off > 0.07:
                    wrong.append({"quantize": name, "rows": rows, "worst": off})
            expected = seen @ plain.t()
            worst = (
                ((product.plain(x).float() - expected).abs() / (expected.abs() + expected.abs().mean())).max().item()
            )
            if not worst < limit:
                wrong.append({"weight": name, "rows": rows, "worst": worst})
    return wrong


def seconds_of(run: Callable[[int], object], copies: int) -> float:
    """Of one of ``copies`` products, recorded as the engine's steps are: the host has no part in it."""
    for index in range(copies):
        run(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(copies):
            run(index)
    times = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / copies)
    return min(times)


def times_of(name: str, space: PackedSpace) -> list[dict[str, Any]]:
    found, (n, k) = [], SHAPES[name]
    copies = max(4, 400 * 2**20 // (n * k))
    weights = [product_of(random_weight(n, k, 128, 128), space).weight for _ in range(copies)]
    plain = [torch.randn(n, k, device="cuda").bfloat16() for _ in range(4)]
    for rows in sorted({*FEW, *MANY}):
        x = torch.randn(rows, k, device="cuda").bfloat16()
        ways: dict[str, Callable[[int], object]] = {"bfloat16": lambda i, x=x: x @ plain[i % 4].t()}
        if rows in FEW:
            ways["packed"] = lambda i, x=x: packed_product(x, weights[i], space)
        if rows in MANY:
            ways["eight_bit"] = lambda i, x=x: eight_bit_product(x, weights[i])
            ways["quantize"] = lambda i, x=x: quantize(x, 128)
        us = {f"{way}_us": round(1e6 * seconds_of(run, copies), 2) for way, run in ways.items()}
        best = min(us.get("packed_us", 1e9), us.get("eight_bit_us", 1e9))
        found.append(
            {"matrix": name, "rows": rows, **us, "tb_s": n * k / 1e6 / best, "tflops": 2 * rows * n * k / 1e6 / best}
        )
        print(found[-1], flush=True)
    return found


def main() -> None:
    out, words = Path(sys.argv[1]), sys.argv[2:] or ["check", "time"]
    space, results = PackedSpace(torch.device("cuda")), {}
    if "check" in words:
        results["wrong"] = check(space)
        print(f"{len(results['wrong'])} wrong", results["wrong"][:10], flush=True)
    if "time" in words:
        results["times"] = [line for name in SHAPES for line in times_of(name, space)]
    out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
