"""Compiles the GPU's kernels as Qwen models call them, for compute capability 9.0, on a machine without a GPU.

Run by test_compile.py in a process of its own, in which Triton is not an interpreter: what the interpreter lets pass and the
compiler does not (types that change in a loop, pointers that are not there) fails here. Prints a line of JSON for each kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from fastqwen.kernels.triton import attention, experts, linear, pointwise, prefill, step, streamed, streamed_attention
from fastqwen.runner.step_layout import TILE_TOKENS

TARGET = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024  # of a multiprocessor, for one program at most
POINTERS = {  # those that are not of 16-bit numbers
    "fp32": "cos_sin q_scale partial stats frequencies rope_scale temperature top_p min_p best weights inner",
    "i32": "slots tables positions count counter tiles counts members ids row_slots starts token_ids top_k index",
    "u32": "cut",
    "i64": "seed",
}
TYPES = {f"{name}_ptr": kind for kind, names in POINTERS.items() for name in names.split()}
FLOATS = ("eps", "scale", "inverse_log")
ALIGNED = ("k_size", "n_size", "table_width", "size", "hidden")

Case = tuple[Any, dict[str, Any], int, int]  # kernel, constants, warps, stages


def cases() -> Iterator[Case]:
    yield from decode_cases()
    for window in (0, 4096):
        tiling = prefill.prefill_tiling(128, 2)
        shape = {"HEADS": 32, "KV_HEADS": 8, "DIM": 128, "BLOCK_SIZE": 64, "BLOCK_M": TILE_TOKENS, "WINDOW": window}
        yield (
            prefill._prefill,
            {**shape, "KEYS": tiling.keys, "PRECISION": "tf32", "STAGES": tiling.num_stages},
            tiling.num_warps,
            tiling.num_stages,
        )
    for counted, keep in ((True, False), (False, True)):
        shape = {"HEADS": 32, "KV_HEADS": 8, "HALF": 64, "ROTARY": 128, "WIDTH": 6144, "BLOCK_SIZE": 64}
        shape |= {"PADDED_HEADS": 32, "PADDED_KV": 8}
        missing = {"q_scale_ptr": None, **({} if counted else {"count_ptr": None})}
        missing |= {} if keep else {"k_out_ptr": None, "v_out_ptr": None}
        flags = {"NORM": True, "LOGN": False, "COUNTED": counted, "KEEP": keep}
        yield pointwise._rope_and_cache, {**shape, **flags, **missing}, 4, 3
    yield from partly_rotated_cases()
    yield from linear_cases()
    yield from streamed_cases()
    yield from streamed_attention_cases()
    yield from expert_cases()
    yield step._prepare, {"HALF": 64, "HALF_BLOCK": 64, "BLOCK": 1024, "LOGN": False, "q_scale_ptr": None}, 4, 3
    yield step._cut, {"BLOCK": 8192}, 16, 3
    yield step._sample_chunk, {"BLOCK": 4096}, 8, 3
    yield step._pick, {"BLOCK": 64}, 1, 3


def decode_cases() -> Iterator[Case]:
    """Qwen3-0.6B, Qwen-7B with logN, Qwen3-30B-A3B; one part, held parts, a recorded step with prompts."""
    for heads, kv_heads, splits, hold, logn, counted in (
        (16, 8, 4, True, False, False),
        (32, 32, 1, False, True, False),
        (32, 4, 2, False, False, True),
        (32, 4, 64, True, False, False),
    ):
        group = heads // kv_heads
        yield (
            attention._decode,
            {
                "HEADS": heads, "KV_HEADS": kv_heads, "HALF": 64, "ROTARY": 128,
                "WIDTH": (heads + 2 * kv_heads) * 128, "BLOCK_SIZE": 64, "GROUP": group, "GROUP_2": group,
                "MAX_SPLITS": splits, "WINDOW": 0, "NORM": not logn, "LOGN": logn, "COUNTED": counted, "HOLD": hold,
                "PRECISION": "tf32", "STAGES": 3, "PDL": True, **({} if logn else {"q_scale_ptr": None}),
                **({} if counted else {"count_ptr": None}), **({"q_norm_ptr": None, "k_norm_ptr": None} if logn else {}),
            },
            4,
            3,
        )  # fmt: skip


def partly_rotated_cases() -> Iterator[Case]:
    """Heads of 256 numbers of which 64 are rotated, an output gate behind the values."""
    shape = {"HEADS": 16, "KV_HEADS": 2, "HALF": 128, "ROTARY": 64, "WIDTH": 9216, "BLOCK_SIZE": 64}
    flags = {"NORM": True, "LOGN": False, "COUNTED": False, "q_scale_ptr": None, "count_ptr": None}
    decode = {"GROUP": 8, "GROUP_2": 8, "MAX_SPLITS": 4, "WINDOW": 0, "HOLD": False, "PRECISION": "tf32", "STAGES": 3}
    yield attention._decode, {**shape, **flags, **decode, "PDL": True}, 4, 3
    padded = {"PADDED_HEADS": 16, "PADDED_KV": 2, "KEEP": False, "k_out_ptr": None, "v_out_ptr": None}
    yield pointwise._rope_and_cache, {**shape, **flags, **padded}, 4, 3


def linear_cases() -> Iterator[Case]:
    for gated in (False, True):
        flags = {"GATED": gated, "ADD": not gated, "BIAS": False, "PDL": True, "bias_ptr": None}
        missing = {} if gated else {"norm_ptr": None}
        yield linear._gemv, {"K": 4096, "BLOCK_N": 2, "BLOCK_K": 4096, "NORM": gated, **flags, **missing}, 4, 1
        tiling = linear.skinny_tiling(64, 12288, 4096, gated=gated)
        sizes = {"BLOCK_M": 64, "BLOCK_N": tiling.block_n, "BLOCK_K": tiling.block_k, "SPLIT_K": tiling.split_k}
        more = {"EVEN_K": True, "PRECISION": "tf32", "PREFETCH": tiling.prefetch}
        yield linear._skinny, {**sizes, **more, **flags}, tiling.num_warps, tiling.num_stages
        # A matrix of one row, such as the gate of a shared expert: the compiler is given 1 as a constant.
        yield linear._skinny, {**sizes, **more, **flags, "n_size": 1}, tiling.num_warps, tiling.num_stages
        yield (
            linear._gemv,
            {"K": 2048, "BLOCK_N": 4, "BLOCK_K": 2048, "NORM": gated, **flags, **missing, "n_size": 1},
            4,
            1,
        )


def streamed_cases() -> Iterator[Case]:
    """A product of few rows that is split, one of many, and a gated one."""
    for rows, n, k, gated in ((8, 4096, 4096, False), (64, 12288, 4096, False), (16, 3072, 1024, True)):
        tiling = streamed.stream_tiling(rows, n, k, gated=gated)
        sizes = {"BLOCK_M": rows, "BLOCK_N": streamed.BLOCK_N, "BLOCK_K": tiling.block_k, "SPLIT_K": tiling.split_k}
        flags = {"GATED": gated, "ADD": not gated, "BIAS": False, "PDL": True, "bias_ptr": None}
        yield streamed._streamed, {**sizes, **flags, "STAGES": tiling.num_stages}, 4, 3


def streamed_attention_cases() -> Iterator[Case]:
    """Qwen3-0.6B, Qwen-7B with logN, Qwen3-30B-A3B in a recorded step with prompts, and a window."""
    for heads, kv_heads, logn, counted, window in (
        (16, 8, False, False, 0),
        (32, 32, True, False, 0),
        (32, 4, False, True, 0),
        (16, 2, False, False, 4096),
    ):
        group = heads // kv_heads
        shape = {"HEADS": heads, "KV_HEADS": kv_heads, "DIM": 128, "BLOCK_SIZE": 64, "GROUP": group, "HEADS_2": 8}
        shape["WIDTH"] = (heads + 2 * kv_heads) * 128
        flags = {"KEYS": 128, "WINDOW": window, "NORM": not logn, "LOGN": logn, "COUNTED": counted, "PDL": True}
        missing = {**({} if logn else {"q_scale_ptr": None}), **({} if counted else {"count_ptr": None})}
        missing |= {"q_norm_ptr": None, "k_norm_ptr": None} if logn else {}
        yield streamed_attention._decode_streamed, {**shape, **flags, **missing}, 4, 3


def expert_cases() -> Iterator[Case]:
    many = {"EXPERTS": 128, "PADDED": 128, "TOP_K": 8, "PDL": True}
    route = {**many, "TOP_K_2": 8, "NORMALIZE": True, "ROUND_TO": tl.bfloat16}
    yield experts._route, {**route, "LISTS": True, "BLOCK_T": 4}, 4, 3
    yield experts._route, {**route, "LISTS": False, "BLOCK_T": 1, "counts_ptr": None}, 1, 3
    for pairs in (64, 2048, 4096, 65536):
        tiling = experts.group_tiling(pairs, 128)
        for gated in (True, False):
            sizes = {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.gate_n if gated else tiling.block_n}
            sizes |= {"BLOCK_K": tiling.block_k, "EVEN_K": True, "PRECISION": "tf32", "HALVES": tiling.block_m >= 128}
            yield (
                experts._grouped,
                {**many, **sizes, "GATED": gated, "PER_PAIR": not gated},
                tiling.num_warps,
                tiling.num_stages,
            )
    yield experts._sum_pairs, {**many, "BLOCK": 1024}, 4, 3
    one = experts.ONE_TILING
    yield experts._one_token_up, {"K": 2048, "BLOCK_K": 2048, "BLOCK_N": one.up_n, "PDL": True}, one.up_warps, 1
    down = {"K": 768, "BLOCK_K": 1024, "BLOCK_N": one.down_n, "TOP_K": 8, "TOP_K_2": 8, "PDL": True}
    yield experts._one_token_down, down, one.down_warps, 1


def compile_case(kernel: Any, constants: dict[str, Any], warps: int, stages: int) -> dict[str, Any]:
    signature = {name: _type_of(name, constants) for name in kernel.arg_names}
    aligned = [name.endswith("_ptr") or name in ALIGNED for name in signature]
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if aligned[index] and kind != "constexpr"
    }
    source_of = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_of(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": constants.get("PDL", False)}
    found = triton.compile(source, target=TARGET, options=options)
    return {
        "kernel": kernel.__name__,
        "shared_bytes": found.metadata.shared,
        "fits": found.metadata.shared <= SHARED_BYTES,
    }


def _type_of(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*" + TYPES.get(name, "bf16")
    return "fp32" if name in FLOATS else "i32"


if __name__ == "__main__":
    for case in cases():
        print(json.dumps(compile_case(*case)), flush=True)
