"""Check products with packed weights against the reference, and time them under several tilings, in CUDA graphs over many
different weights (nothing stays in L2).

python bench/tune_packed.py OUT.json [check] [int4|int8|fp8 ...] [m1 m8 m16 m32 m64] [quick]

Prints for each shape the best tilings: microseconds a product, TB/s of weights and scales, and their share of what a copy on
the same device in the same run reaches.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fastqwen.kernels import GroupedWeight, Norm
from fastqwen.kernels.cuda import nvrtc
from fastqwen.kernels.cuda.pack import PackedWeight, pack_grouped
from fastqwen.kernels.cuda.packed_linear import (
    PackedSpace,
    PackedTiling,
    Variant,
    few_launch,
    packed_product,
    some_launch,
    source,
)
from fastqwen.kernels.reference import unpack_grouped

SHAPES = {  # name: (n, k, kind)
    "7b-qkv": (12288, 4096, "plain"),
    "7b-o": (4096, 4096, "add"),
    "7b-gate": (22016, 4096, "gated"),
    "7b-down": (4096, 11008, "add"),
    "8b-gate": (24576, 4096, "gated"),
}
BYTES = 300 * 2**20  # of weights that a graph goes through


def copy_tb_s() -> float:
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    best = min(elapsed(lambda: b.copy_(a), 5) for _ in range(3))
    return 2 * a.nbytes / best / 1e12


def elapsed(run: Callable[[], Any], times: int) -> float:
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def random_weight(form: str, n: int, k: int, group: int = 128) -> PackedWeight:
    bits = 4 if form == "int4" else 8
    tiles, units = -(-n // 32) * 2, -(-k * bits // 256)
    words = torch.randint(-(2**31), 2**31 - 1, (tiles, units, 32, 4), dtype=torch.int32, device="cuda")
    if form == "fp8":
        scales = torch.rand(tiles, -(-k // group), device="cuda") * 0.01
        words = (words & 0x3F3F3F3F).view(tiles, 16, units // 2, 16)
        return PackedWeight("Fp8", words, scales, "TILES", None, group, k, n)
    scales = (torch.rand(tiles, -(-k // group), 8, 2, device="cuda") * 0.01).half()
    return PackedWeight("Int4" if bits == 4 else "Int8", words, scales, "PAIRS", None, group, k, n)


def check(space: PackedSpace) -> list[dict[str, Any]]:
    found = []
    cases = itertools.product(
        (4, 8), (torch.float16, torch.bfloat16), (32, 128, 1056), (True, False), (1, 2, 5, 8, 9, 17, 40, 64)
    )
    for bits, dtype, group, symmetric, rows in cases:
        n, k = 1104 if symmetric else 1120, 1056
        groups = -(-k // group)
        scales = (torch.rand(groups, n, device="cuda") * 0.3 / 2**bits + 0.1 / 2**bits).half()
        zeros = torch.full((groups, n), 2 ** (bits - 1), dtype=torch.int16, device="cuda")
        if not symmetric:
            zeros.random_(1, 2**bits + 1)
        codes = torch.randint(-(2**31), 2**31 - 1, (k * bits // 32, n), dtype=torch.int32, device="cuda")
        weight = GroupedWeight(codes, scales, zeros, None, bits, group)
        packed = pack_grouped(weight)
        assert packed is not None
        plain = unpack_grouped(weight, 0, n).float()
        x = torch.randn(rows, k, device="cuda").to(dtype)
        for form in ("plain", "gated", "add", "normed"):
            if (form == "normed" and rows > 8) or (form == "gated" and n % 32):
                continue
            norm = Norm(torch.rand(k, device="cuda").to(dtype) + 0.5, 1e-6) if form == "normed" else None
            seen = x.float()
            if norm is not None:
                seen = seen * torch.rsqrt(seen.square().mean(-1, keepdim=True) + 1e-6) * norm.weight.float()
            expected = seen @ plain.t()
            if form == "gated":
                expected = torch.nn.functional.silu(expected[:, : n // 2]) * expected[:, n // 2 :]
            residual = torch.randn(rows, n, device="cuda").to(dtype) if form == "add" else None
            if residual is not None:
                expected = expected + residual.float()
            for blocks_each, wide in ((1, 4), (2, 8)):
                tiling = PackedTiling(blocks_each=blocks_each, wide=wide)
                out = packed_product(
                    x, packed, space, norm=norm, gated=form == "gated",
                    out=None if residual is None else residual.clone(), add=residual is not None, tiling=tiling,
                )  # fmt: skip
                worst = ((out.float() - expected).abs() / (expected.abs() + expected.abs().mean())).max().item()
                if not worst < (0.03 if dtype == torch.bfloat16 else 0.006):
                    found.append({"bits": bits, "dtype": str(dtype), "group": group, "symmetric": symmetric, "rows": rows,
                                  "form": form, "wide": wide, "worst": worst})  # fmt: skip
    torch.cuda.synchronize()
    return found


def tilings(rows: int, *, quick: bool) -> Iterator[PackedTiling]:
    if rows <= 8:
        for warps, depth, each, whole in itertools.product((8, 16), (2, 3, 4, 6, 8), (1, 2, 3), (True, False)):
            if 24 <= warps * depth * each <= 128 and not (quick and not whole):
                yield PackedTiling(warps=warps, depth=depth, blocks_each=each, whole=whole)
    else:
        for stages, each, wide in itertools.product((3, 4, 6), (1, 2), (1, 2, 4, 8)):
            yield PackedTiling(stages=stages, blocks_each=each, wide=wide)


def compile_all(weight: PackedWeight, rows: list[int], quick: bool, space: PackedSpace) -> None:
    """In as many threads as there are cores; later they are found in the cache."""
    variants = {
        (few_launch if count <= 8 else some_launch)(torch.float16, count, weight, tiling).variant
        for count in rows
        for tiling in tilings(count, quick=quick)
    }

    def compile_one(variant: Variant) -> None:
        nvrtc.machine_code(source(variant), variant.defines(), space.card.capability)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, variants))


def timed(weights: list[PackedWeight], kind: str, rows: int, space: PackedSpace, tiling: PackedTiling) -> float:
    """Seconds a product."""
    n, k = weights[0].out_size, weights[0].in_size
    x = torch.randn(rows, k, device="cuda").half()
    residual = torch.zeros(rows, n, device="cuda").half() if kind == "add" else None
    norm = Norm(torch.ones(k, device="cuda").half(), 1e-6) if rows == 1 and kind != "add" else None

    def run() -> None:
        for weight in weights:
            packed_product(
                x,
                weight,
                space,
                norm=norm,
                gated=kind == "gated",
                out=residual,
                add=residual is not None,
                tiling=tiling,
            )

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return min(elapsed(graph.replay, 5) for _ in range(3)) / len(weights)


def main() -> None:
    out, words = Path(sys.argv[1]), set(sys.argv[2:])
    space = PackedSpace(torch.device("cuda", 0))
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(0), "copy_tb_s": round(copy_tb_s(), 3), "times": []}
    print(json.dumps(result), flush=True)
    if "check" in words:
        start = time.time()
        result["wrong"] = check(space)
        print(len(result["wrong"]), "wrong", result["wrong"][:10], round(time.time() - start, 1), "s", flush=True)
    rows = sorted(int(word[1:]) for word in words if word[0] == "m") or [1, 8, 16, 64]
    for form in [one for one in ("int4", "int8", "fp8") if one in words]:
        for name, (n, k, kind) in SHAPES.items():
            first = random_weight(form, n, k)
            num_bytes = first.num_bytes
            weights = [first] + [random_weight(form, n, k) for _ in range(BYTES // num_bytes)]
            compile_all(first, rows, "quick" in words, space)
            for count in rows:
                found = []
                for tiling in tilings(count, quick="quick" in words):
                    try:
                        seconds = timed(weights, kind, count, space, tiling)
                    except RuntimeError as error:
                        if "invalid argument" not in str(error):  # more shared memory than there is
                            print(name, count, tiling, error, flush=True)
                        continue
                    found.append((seconds, tiling))
                for seconds, tiling in sorted(found, key=lambda one: one[0])[:5]:
                    rate = num_bytes / seconds / 1e12
                    line = {"form": form, "shape": name, "rows": count, "us": round(seconds * 1e6, 2), "tb_s": round(rate, 3),
                            "share": round(rate / result["copy_tb_s"], 3), "tiling": str(tiling)[13:-1]}  # fmt: skip
                    result["times"].append(line)
                    print(json.dumps(line), flush=True)
            del weights
            out.write_text(json.dumps(result, indent=1))
    out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
