"""Time the small-batch kernels under several tilings, in CUDA graphs over many different weights (nothing stays in L2).

python bench/tune_kernels.py OUT.json skinny|streamed|gemv|attention|prompts|chunks|experts|one-expert [0.6b 8b 7b 30b] [m8 m16 ...]

All variants are compiled first, in as many processes as there are cores. The best of each shape is printed last:
microseconds a call, and TB/s of weights or of keys and values.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastqwen.kernels import (
    AttentionParts,
    DenseWeight,
    ExpertsWeight,
    HeadShape,
    LayerCache,
    Norm,
    PromptTiles,
    StepTokens,
)
from fastqwen.kernels.triton import attention, experts, linear, ops, pointwise, prefill, streamed, streamed_attention
from fastqwen.kernels.triton.workspace import Workspace
from fastqwen.runner.step_layout import cut_tiles

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
    "7b-o": (4096, 4096, "add"),
    "7b-gate": (11008, 4096, "gated"),
    "7b-down": (4096, 11008, "add"),
    "30b-qkv": (5120, 2048, "plain"),
    "30b-o": (2048, 4096, "add"),
    "30b-router": (128, 2048, "plain"),
}
HEADS = {
    "0.6b": (HeadShape(16, 8, 128, 128), 28),
    "8b": (HeadShape(32, 8, 128, 128), 36),
    "7b": (HeadShape(32, 32, 128, 128), 32),
    "30b": (HeadShape(32, 4, 128, 128), 48),
}
EXPERTS, EXPERT_HIDDEN, EXPERT_SIZE, TOP_K = 128, 2048, 768, 8

# What a variant is: its shape's name, what to print of it, and a function that makes a call over ``layers`` different
# weights, the bytes that each reads, and their number.
Made = tuple[Callable[[], None], float, int]
Variant = tuple[str, dict[str, Any], Callable[[int], Made]]


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def linear_call(name: str, m: int, call: Callable[..., Any], layers: int) -> Made:
    n, k, kind = SHAPES[name]
    wide = n * (2 if kind == "gated" else 1)
    layers = min(layers, max(4, min(28, int(600e6 / (wide * k * 2)))))
    weights = [random(wide, k, scale=0.02) for _ in range(layers)]
    x, norm, out = random(m, k), torch.ones(k, dtype=torch.bfloat16, device="cuda"), random(m, n)

    def run() -> None:
        for weight in weights:
            call(x, weight, norm if kind != "add" else None, out if kind == "add" else None, kind == "gated")

    return run, wide * k * 2, layers


def library(x: torch.Tensor, weight: torch.Tensor, norm: Any, out: Any, gated: bool) -> None:
    if norm is not None:
        x = pointwise.rms_norm(x, Norm(norm, 1e-6))
    if out is not None:
        torch.addmm(out, x, weight.t(), out=out)
    elif gated:
        pointwise.silu_mul(torch.nn.functional.linear(x, weight))
    else:
        torch.nn.functional.linear(x, weight)


def linear_variants(models: list[str], rows: list[int], tilings: Callable[..., Iterator[Any]]) -> Iterator[Variant]:
    for name, m in product(SHAPES, rows):
        if name.split("-")[0] not in models:
            continue
        n, k, kind = SHAPES[name]
        yield f"{name} m{m}", {"library": True}, lambda layers, name=name, m=m: linear_call(name, m, library, layers)
        for key, call in tilings(m, n, k, kind):
            yield f"{name} m{m}", key, lambda layers, name=name, m=m, call=call: linear_call(name, m, call, layers)


def with_eps(norm: Any) -> Norm | None:
    return None if norm is None else Norm(norm, 1e-6)


def streamed_tilings(m: int, n: int, k: int, kind: str) -> Iterator[Any]:
    """What linear.py chooses, and the kernel whose weights are on their way early."""
    space, gated = Workspace(torch.device("cuda")), kind == "gated"
    found: list[streamed.StreamTiling | None] = [None]
    for block_k, stages, split in product((64, 128), (3, 4, 6), (1, 2, 3, 4, 6, 8)):
        size = (streamed.BLOCK_N * (2 if gated else 1) + max(8, m)) * block_k * 2 * stages
        programs = n // streamed.BLOCK_N * split
        full = 40_000 < size < 115_000 and k // block_k >= split * 2
        parts = split == 1 or split * n * m * (2 if gated else 1) <= 2**21
        if full and parts and (96 <= programs <= 800 or split == 1):
            found.append(streamed.StreamTiling(block_k, split, stages))
    for t in found:

        def call(x: Any, weight: Any, norm: Any, out: Any, gated: bool, t: Any = t) -> None:
            if t is None and m == 1:
                linear.gemv(x, DenseWeight(weight), norm=with_eps(norm), add_to=out, gated=gated)
                return
            if norm is not None:
                x = pointwise.rms_norm(x, Norm(norm, 1e-6))
            if t is None:
                linear.skinny_linear(x, DenseWeight(weight), space, add_to=out, gated=gated)
            else:
                streamed.streamed_linear(x, DenseWeight(weight), space, add_to=out, gated=gated, tiling=t)

        yield {"now": True} if t is None else dataclasses.asdict(t), call


def prompt_variants(models: list[str], rows: list[int]) -> Iterator[Variant]:
    """Our kernel over pages, and cuDNN's over whole prompts: ``rows`` are prompts of 1024 tokens, 1 stands for one of 4096."""
    for model, m in product(models, rows):
        name = f"{model} {'1 x 4096' if m == 1 else f'{m} x 1024'} prompts"
        yield name, {"library": True}, lambda layers, model=model, m=m: attend_prompts(model, m, layers, None, 0)
        for height, keys, warps, stages in product((64, 128), (64, 128), (4, 8), (2, 3, 4)):
            if (height == 64) != (warps == 4) or (keys == 128 and stages > 2):
                continue
            t = prefill.PrefillTiling(keys, warps, stages)
            key = {"height": height, **dataclasses.asdict(t)}
            yield name, key, lambda layers, model=model, m=m, t=t, h=height: attend_prompts(model, m, layers, t, h)


def attend_prompts(model: str, number: int, layers: int, tiling: prefill.PrefillTiling | None, height: int) -> Made:
    """Bytes stand for operations here: TB/s are TFLOP/s."""
    shape, _ = HEADS[model]
    number, length = (1, 4096) if number == 1 else (number, 1024)
    tokens = number * length
    blocks = tokens // 64
    cache = LayerCache(*(random(blocks, shape.num_kv_heads, 64, 128) for _ in range(2)))
    q, out = random(tokens, shape.num_heads, 128), random(tokens, shape.num_heads * 128)
    operations = number * 2 * length * length * shape.num_heads * 128
    if tiling is None:
        k, v = (random(tokens, shape.num_kv_heads, 128) for _ in range(2))
        spans = tuple((index * length, length) for index in range(number))
        return (lambda: [ops.fresh_prompts(q, k, v, spans, out) for _ in range(4)]), operations, 4
    tiles, _ = cut_tiles([(index, 0, length) for index in range(number)], 0, height=height)
    step = StepTokens(
        positions=torch.zeros(tokens, dtype=torch.int32, device="cuda"),
        cos_sin=torch.zeros(1, 128, device="cuda"),
        q_scale=None,
        slots=torch.zeros(tokens, dtype=torch.int32, device="cuda"),
        row_starts=torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda"),
        block_tables=torch.randperm(blocks, device="cuda").int().view(number, -1).contiguous(),
        num_decode_rows=0,
        prompts=PromptTiles(torch.from_numpy(tiles).cuda(), height),
    )

    def run() -> None:
        for _ in range(4):
            prefill.prefill_attention(
                q, step, cache, AttentionParts(shape), Workspace(q.device), out=out, tiling=tiling
            )

    return run, operations, 4


def chunk_variants(models: list[str], rows: list[int]) -> Iterator[Variant]:
    """A step of 8192 tokens through cuBLAS, so many rows at a time. TB/s are TFLOP/s."""
    for model, part in product(models, ("qkv", "o", "mlp")):
        if ("gate" if part == "mlp" else part) not in {name.split("-")[1] for name in SHAPES if name.startswith(model)}:
            continue
        for chunk in (512, 1024, 2048, 4096, 8192):
            name = f"{model}-{part} 8192 tokens"
            yield name, {"rows": chunk}, lambda layers, model=model, part=part, c=chunk: in_chunks(model, part, c)


def in_chunks(model: str, part: str, chunk: int) -> Made:
    tokens, layers = 8192, 6
    names = ("gate", "down") if part == "mlp" else (part,)
    shapes = [SHAPES[f"{model}-{name}"] for name in names]
    weights = [
        [random(n * (2 if kind == "gated" else 1), k, scale=0.02) for n, k, kind in shapes] for _ in range(layers)
    ]
    x, residual = random(tokens, shapes[0][1]), random(tokens, shapes[-1][0])
    operations = sum(2 * tokens * weight.numel() for weight in weights[0])

    def run() -> None:
        for matrices in weights:
            for start in range(0, tokens, chunk):
                rows = x[start : start + chunk]
                if part == "mlp":
                    rows = pointwise.silu_mul(torch.nn.functional.linear(rows, matrices[0]))
                if part == "qkv":
                    torch.nn.functional.linear(rows, matrices[0])
                else:
                    target = residual[start : start + chunk]
                    torch.addmm(target, rows, matrices[-1].t(), out=target)

    return run, operations, layers


def skinny_tilings(m: int, n: int, k: int, kind: str) -> Iterator[Any]:
    space = Workspace(torch.device("cuda"))
    for block_n, block_k, stages in product((32, 64), (64, 128, 256), (3, 5)):
        if k % block_k or block_n * block_k * stages * 2 * (2 if kind == "gated" else 1) > 160_000:
            continue
        for split in (1,) if kind == "gated" else (1, 2, 4):
            if not (96 <= -(-n // block_n) * split <= 800 and k // split >= 2 * block_k):
                continue
            t = linear.Tiling(block_n, 4, block_k, split, stages, prefetch=8)

            def call(x: Any, weight: Any, norm: Any, out: Any, gated: bool, t: Any = t) -> None:
                if norm is not None:
                    x = pointwise.rms_norm(x, Norm(norm, 1e-6))
                linear.skinny_linear(x, DenseWeight(weight), space, add_to=out, gated=gated, tiling=t)

            yield {"block_n": block_n, "block_k": block_k, "split_k": split, "stages": stages}, call


def gemv_tilings(m: int, n: int, k: int, kind: str) -> Iterator[Any]:
    for block_n, warps in product((1, 2, 4, 8, 16), (2, 4, 8, 16)):
        if not 16 <= block_n * k * (2 if kind == "gated" else 1) / (warps * 32) <= 96:
            continue
        t = linear.Tiling(block_n, warps)

        def call(x: Any, weight: Any, norm: Any, out: Any, gated: bool, t: Any = t) -> None:
            linear.gemv(x, DenseWeight(weight), norm=with_eps(norm), add_to=out, gated=gated, tiling=t)

        yield {"block_n": block_n, "warps": warps}, call


def attention_variants(models: list[str], rows: list[int]) -> Iterator[Variant]:
    for model, m in product(models, rows):
        shape, _ = HEADS[model]
        context = 192 if m == 1 else 1088
        keys: list[dict[str, Any]] = [{}]
        for splits, size in product((1, 2, 3, 4, 5, 6, 8, 9, 12, 16), (64, 128)):
            if m * shape.num_kv_heads * splits <= 8192 and splits * size <= context + size:
                keys.append({"tiling": streamed_attention.DecodeTiling(splits, size)})
        for key in keys:
            yield (
                f"{model} b{m} attention",
                dataclasses.asdict(key["tiling"]) if key else {"now": True},
                lambda layers, model=model, m=m, context=context, key=key: attend(model, m, context, layers, **key),
            )


def attend(model: str, rows: int, context: int, layers: int, **options: Any) -> Made:
    shape, own_layers = HEADS[model]
    read = rows * context * shape.num_kv_heads * 512
    layers = max(1, min(layers, own_layers, int(8e9 / read)))
    blocks = rows * (context // 64 + 1)
    caches = [LayerCache(*(random(blocks, shape.num_kv_heads, 64, 128) for _ in range(2))) for _ in range(layers)]
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    step = StepTokens(
        positions=torch.full((rows,), context - 1, dtype=torch.int32, device="cuda"),
        cos_sin=torch.ones(rows, 128, device="cuda"),
        q_scale=None,
        slots=slots,
        row_starts=torch.arange(rows + 1, dtype=torch.int32, device="cuda"),
        block_tables=torch.randperm(blocks, device="cuda").int().view(rows, -1).contiguous(),
        num_decode_rows=rows,
    )
    qkv = random(rows, (shape.num_heads + 2 * shape.num_kv_heads) * 128)
    out = torch.empty(rows, shape.num_heads * 128, dtype=torch.bfloat16, device="cuda")
    norm = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    space = attention.DecodeWorkspace(torch.device("cuda"), shape=shape)
    parts = AttentionParts(shape, norm, norm, 1e-6)

    def run() -> None:
        for cache in caches:
            attend_rows = streamed_attention.decode_attention if options else attention.decode_attention
            attend_rows(qkv, step, cache, parts, space, out=out, **options)

    return run, read, layers


def expert_variants(models: list[str], rows: list[int]) -> Iterator[Variant]:
    for m in rows:
        for t in group_tilings(m * TOP_K / EXPERTS):
            key = {name: getattr(t, name) for name in t.__dataclass_fields__}
            yield f"experts m{m}", key, lambda layers, m=m, t=t: grouped(m, t, layers)


def group_tilings(average: float) -> Iterator[experts.GroupTiling]:
    if average > 100:
        for gate_n, block_n, block_k, stages in product((64, 128), (128, 256), (64,), (3, 4)):
            yield experts.GroupTiling(128, block_n, gate_n, block_k, 8, stages)
        for block_m, block_n, gate_n, warps, stages in (
            (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (64, 256, 128, 8, 3), (64, 256, 128, 8, 4), (128, 128, 64, 4, 4)
        ):  # fmt: skip
            yield experts.GroupTiling(block_m, block_n, gate_n, 64, warps, stages)
        yield experts.GroupTiling(64, 128, 64, 64, 4, 3)
        yield experts.GroupTiling(64, 128, 128, 64, 4, 3)
        return
    for block_m, block_n, block_k, stages in product((16, 32, 64), (32, 64), (128, 256), (3, 4)):
        if block_m <= 4 * average + 16 and (block_m + 2 * block_n) * block_k * 2 * stages < 200_000:
            yield experts.GroupTiling(block_m, block_n, block_n, block_k, 4, stages)


def expert_weights(layers: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (
            random(EXPERTS, 2 * EXPERT_SIZE, EXPERT_HIDDEN, scale=0.02),
            random(EXPERTS, EXPERT_HIDDEN, EXPERT_SIZE, scale=0.02),
        )
        for _ in range(min(2, layers))
    ]


def grouped(m: int, tiling: experts.GroupTiling, layers: int) -> Made:
    weights = expert_weights(layers)
    x, residual, logits = random(m, EXPERT_HIDDEN), random(m, EXPERT_HIDDEN), random(m, EXPERTS)
    counts = torch.zeros(EXPERTS, dtype=torch.int32, device="cuda")

    def run() -> None:
        for gate_up, down in weights:
            weight = ExpertsWeight(logits, gate_up, down, TOP_K, normalize=True)
            experts.add_experts(residual, x, logits, weight, counts, tiling=tiling)

    touched = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** m)
    return run, touched * 3 * EXPERT_SIZE * EXPERT_HIDDEN * 2, len(weights)


def one_expert_variants(models: list[str], rows: list[int]) -> Iterator[Variant]:
    for up_n, up_warps, down_n, down_warps in product((2, 4, 8), (4, 8), (1, 2), (4, 8)):
        t = experts.OneTiling(up_n, up_warps, down_n, down_warps)
        key = {name: getattr(t, name) for name in t.__dataclass_fields__}
        yield "one token's experts", key, lambda layers, t=t: one_token(t, layers)


def one_token(tiling: experts.OneTiling, layers: int) -> Made:
    weights = expert_weights(layers)
    residual, norm, logits = random(1, EXPERT_HIDDEN), random(EXPERT_HIDDEN), [random(1, EXPERTS) for _ in range(8)]

    def run() -> None:
        for choice in logits[: 8 if layers > 1 else 1]:
            for gate_up, down in weights:
                weight = ExpertsWeight(choice, gate_up, down, TOP_K, normalize=True)
                experts.add_experts_of_one(residual, residual, Norm(norm, 1e-6), choice, weight, tiling=tiling)

    return run, TOP_K * 3 * EXPERT_SIZE * EXPERT_HIDDEN * 2, len(weights) * 8


def variants(what: str, models: list[str], rows: list[int]) -> list[Variant]:
    makers: dict[str, Callable[[], Iterator[Variant]]] = {
        "streamed": lambda: linear_variants(models, rows, streamed_tilings),
        "chunks": lambda: chunk_variants(models, rows),
        "prompts": lambda: prompt_variants(models, rows),
        "skinny": lambda: linear_variants(models, rows, skinny_tilings),
        "gemv": lambda: linear_variants(models, [1], gemv_tilings),
        "attention": lambda: attention_variants(models, rows),
        "experts": lambda: expert_variants(models, rows),
        "one-expert": lambda: one_expert_variants(models, rows),
    }
    return list(makers[what]())


def compile_some(what: str, models: list[str], rows: list[int], part: int, parts: int) -> None:
    for name, key, make in variants(what, models, rows)[part::parts]:
        try:
            make(1)[0]()
            torch.cuda.synchronize()
        except Exception as error:
            print(name, key, type(error).__name__, flush=True)


def graph_us(run: Callable[[], None], calls: int) -> float:
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


def tune(what: str, models: list[str], rows: list[int]) -> dict[str, list[dict[str, Any]]]:
    began_s = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    count = max(1, (os.cpu_count() or 2) - 2)
    workers = [context.Process(target=compile_some, args=(what, models, rows, part, count)) for part in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = variants(what, models, rows)
    print(f"{what}: {len(found)} variants compiled in {time.perf_counter() - began_s:.0f} s", flush=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for name, key, make in found:
        try:
            run, read, calls = make(28)
            us = graph_us(run, calls)
        except Exception as error:
            print(name, key, type(error).__name__, str(error)[:80], flush=True)
            continue
        results.setdefault(name, []).append({"us": round(us, 2), "tb_s": round(read / us / 1e6, 2), **key})
        del run
    return results


def main() -> None:
    out, what, words = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    rows = [int(word[1:]) for word in words if word[0] == "m"] or [8]
    models = [word for word in words if word[0] != "m"] or ["0.6b", "8b"]
    results = tune(what, models, rows)
    out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "command": sys.argv, **results}, indent=1))
    for name, entries in results.items():
        ranked = sorted(entries, key=lambda entry: entry["us"])
        print(name, "worst", ranked[-1]["us"], *(f"library {one['us']}" for one in ranked if "library" in one))
        for entry in ranked[:3]:
            print("   ", " ".join(f"{key}={value}" for key, value in entry.items()))


if __name__ == "__main__":
    main()
