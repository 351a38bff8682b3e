"""Time the small-batch kernels under several tilings, in CUDA graphs over many different weights (nothing stays in L2).

python bench/tune_kernels.py OUT.json linear|attention [model ...]

Each line: shape, tiling, microseconds a call, TB/s of weights or of keys and values. The best of each shape comes last.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastqwen.kernels import AttentionBatch, HeadShape, LayerCache
from fastqwen.kernels.triton import attention, linear, pointwise

SHAPES = {  # name: (n, k, kind)
    "0.6b-qkv": (4096, 1024, "plain"),
    "0.6b-o": (1024, 2048, "add"),
    "0.6b-gate": (3072, 1024, "gated"),
    "0.6b-down": (1024, 3072, "add"),
    "8b-qkv": (6144, 4096, "plain"),
    "8b-o": (4096, 4096, "add"),
    "8b-gate": (12288, 4096, "gated"),
    "8b-down": (4096, 12288, "add"),
    "7b-qkv": (12288, 4096, "plain"),
    "7b-gate": (11008, 4096, "gated"),
    "7b-down": (4096, 11008, "add"),
}
HEADS = {"0.6b": (HeadShape(16, 8, 128), 28), "8b": (HeadShape(32, 8, 128), 36), "7b": (HeadShape(32, 32, 128), 32)}


def gemv_candidates(k: int, gated: bool) -> list[linear.Tiling]:
    found = []
    for block_n, warps in product((1, 2, 4, 8, 16), (2, 4, 8, 16)):
        per_thread = block_n * k * (2 if gated else 1) / (warps * 32)
        if 16 <= per_thread <= 96:
            found.append(linear.Tiling(block_n, warps))
    return found


def skinny_candidates(m: int, n: int, k: int, kind: str) -> list[linear.Tiling]:
    found = []
    for block_n, block_k, warps, stages in product((32, 64), (64, 128, 256), (4,), (3, 5)):
        if k % block_k or block_n * block_k * stages * 2 * (2 if kind == "gated" else 1) > 160_000:
            continue
        for split in (1,) if kind == "gated" else (1, 2, 4):
            programs = -(-n // block_n) * split
            if 96 <= programs <= 800 and k // split >= 2 * block_k:
                found.append(linear.Tiling(block_n, warps, block_k, split, stages, prefetch=8))
    return found


def jobs(models: list[str], rows: tuple[int, ...]) -> list[tuple[str, int, linear.Tiling]]:
    found = []
    for name, (n, k, kind) in SHAPES.items():
        if name.split("-")[0] not in models:
            continue
        for m in rows:
            tilings = gemv_candidates(k, kind == "gated") if m == 1 else skinny_candidates(m, n, k, kind)
            found += [(name, m, tiling) for tiling in tilings]
    return found


def call(name: str, m: int, tiling: linear.Tiling, weights: list[torch.Tensor], space: linear.Workspace) -> Any:
    n, k, kind = SHAPES[name]
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    norm = torch.ones(k, dtype=torch.bfloat16, device="cuda")
    out = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        for weight in weights:
            linear.skinny_linear(
                x,
                weight,
                space,
                norm=norm if m == 1 and kind != "add" else None,
                eps=1e-6,
                gated=kind == "gated",
                add_to=out if kind == "add" else None,
                tiling=tiling,
            )

    return run


def library_call(name: str, m: int, weights: list[torch.Tensor]) -> Any:
    """The same product through cuBLAS, with the fused parts as kernels of their own."""
    n, k, kind = SHAPES[name]
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    out = torch.zeros(m, n, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        for weight in weights:
            if kind == "add":
                torch.addmm(out, x, weight.t(), out=out)
            elif kind == "gated":
                pointwise.silu_mul(torch.nn.functional.linear(x, weight))
            else:
                torch.nn.functional.linear(x, weight)

    return run


def compile_some(work: list[tuple[str, int, linear.Tiling]]) -> None:
    space = linear.Workspace(torch.device("cuda"))
    for name, m, tiling in work:
        n, k, kind = SHAPES[name]
        try:
            weight = torch.zeros(n * (2 if kind == "gated" else 1), k, dtype=torch.bfloat16, device="cuda")
            call(name, m, tiling, [weight], space)()
        except Exception as error:
            print(name, m, tiling, type(error).__name__, flush=True)


def graph_us(run: Any, calls: int) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best = float("inf")
    for _ in range(4):
        start.record()
        for _ in range(3):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop) * 1e3 / 3 / calls)
    return best


def tune_linear(models: list[str], rows: tuple[int, ...]) -> dict[str, Any]:
    work = jobs(models, rows)
    began_s = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=compile_some, args=(work[index::14],)) for index in range(14)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(f"compiled {len(work)} in {time.perf_counter() - began_s:.0f} s", flush=True)
    space = linear.Workspace(torch.device("cuda"))
    results: dict[str, Any] = {}
    weights: list[torch.Tensor] = []
    current = ""
    for name, m, tiling in work:
        n, k, kind = SHAPES[name]
        rows_of = n * (2 if kind == "gated" else 1)
        if name != current:
            weights = []
            count = max(4, min(28, int(600e6 / (rows_of * k * 2))))
            weights = [torch.randn(rows_of, k, device="cuda").bfloat16() * 0.02 for _ in range(count)]
            current = name
        library = f"{name} m{m} library"
        if m > 1 and library not in results:
            us = graph_us(library_call(name, m, weights), len(weights))
            results[library] = [{"us": round(us, 2), "tb_s": round(rows_of * k * 2 / us / 1e6, 2)}]
        try:
            us = graph_us(call(name, m, tiling, weights, space), len(weights))
        except Exception as error:
            print(name, m, tiling, type(error).__name__, flush=True)
            continue
        tbs = rows_of * k * 2 / us / 1e6
        results.setdefault(f"{name} m{m}", []).append({"us": round(us, 2), "tb_s": round(tbs, 2), **asdict(tiling)})
    return results


def tune_attention(models: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for model, (rows, context) in product(models, ((1, 192), (8, 1088), (64, 1088))):
        shape, layers = HEADS[model]
        layers = max(2, min(layers, int(20e9 / (rows * context * shape.num_kv_heads * 512))))
        blocks = rows * (context // 64 + 1)
        caches = [
            LayerCache(*(torch.randn(blocks, shape.num_kv_heads, 64, 128, device="cuda").bfloat16() for _ in range(2)))
            for _ in range(layers)
        ]
        batch = _batch(rows, context, blocks)
        qkv = torch.randn(rows, (shape.num_heads + 2 * shape.num_kv_heads) * 128, device="cuda").bfloat16()
        out = torch.empty(rows, shape.num_heads * 128, dtype=torch.bfloat16, device="cuda")
        space = attention.DecodeWorkspace(torch.device("cuda"), max_rows=2048, shape=shape, max_parts=32768)
        for splits, stages, warps in product((1, 2, 3, 6, 9, 17), (2, 3), (4, 8)):
            if splits > -(-context // 64) or rows * shape.num_kv_heads * splits > 20000 or (splits == 1 and rows < 8):
                continue

            try:
                options = {"splits": splits, "num_stages": stages, "num_warps": warps}
                us = graph_us(partial(attend, qkv, batch, caches, shape, space, out, options), layers)
            except Exception as error:
                print(model, rows, splits, stages, warps, type(error).__name__, flush=True)
                continue
            tbs = rows * context * shape.num_kv_heads * 512 / us / 1e6
            entry = {"us": round(us, 2), "tb_s": round(tbs, 2), "splits": splits, "stages": stages, "warps": warps}
            results.setdefault(f"{model} b{rows}", []).append(entry)
        del caches
        torch.cuda.empty_cache()
    return results


def attend(
    qkv: torch.Tensor,
    batch: AttentionBatch,
    caches: list[LayerCache],
    shape: HeadShape,
    space: attention.DecodeWorkspace,
    out: torch.Tensor,
    options: dict[str, int],
) -> None:
    for cache in caches:
        attention.decode_attention(
            qkv, batch, cache, shape, space, q_norm=None, k_norm=None, eps=1e-6, window=None, out=out, **options
        )


def _batch(rows: int, context: int, blocks: int) -> AttentionBatch:
    def whole(values: Any) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device="cuda")

    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    return AttentionBatch(
        positions=whole([context - 1] * rows),
        cos_sin=torch.ones(rows, 128, device="cuda"),
        q_scale=None,
        token_tables=slots,
        table_rows=slots,
        row_starts=slots,
        context_lens=whole([context] * rows),
        block_tables=torch.randperm(blocks, device="cuda").int().view(rows, -1).contiguous(),
        cache_slots=slots,
        num_decode_rows=rows,
        max_row_tokens=1,
    )


def main() -> None:
    out, what, models = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or ["0.6b", "8b"]
    rows = tuple(int(word[1:]) for word in models if word[0] == "m") or (1, 8, 64)
    models = [word for word in models if word[0] != "m"]
    results = tune_linear(models, rows) if what == "linear" else tune_attention(models)
    out.write_text(json.dumps(results, indent=1))
    for name, entries in results.items():
        ranked = sorted(entries, key=lambda entry: entry["us"])
        print(name, "worst", ranked[-1]["us"])
        for entry in ranked[:3]:
            print("   ", " ".join(f"{key}={value}" for key, value in entry.items()))


if __name__ == "__main__":
    main()
