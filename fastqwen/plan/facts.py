"""The planner's records: what a device is, and how an engine spends memory."""

from __future__ import annotations

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KIB, MIB, GIB = 2**10, 2**20, 2**30


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured of a device, or read from a data sheet."""

    kind: str  # cpu or cuda
    name: str
    total_bytes: int
    free_bytes: int  # what other processes leave; a GPU's own context is not taken off
    compute_capability: tuple[int, int] | None = None
    multiprocessors: int | None = None
    bandwidth_gb_s: float | None = None
    matmul_tflops: float | None = None  # dense products of 16-bit numbers
    unpacks: bool = False  # a CPU without our kernels (no compiler): packed weights are unpacked there


class EngineProfile(msgspec.Struct, frozen=True, kw_only=True):
    """How one engine spends memory beside weights and cache. docs/planner.md derives every number."""

    name: str
    step_tokens: int | None  # longest prefill step; None: a whole prompt at once
    least_step_tokens: int = 1  # the step that start-up measures is at least this long
    max_num_seqs: int
    block_size: int
    sampler_bytes: int = 0  # bytes for each entry of [sampled rows, vocabulary], all copies that live together
    library_bytes: int  # what kernels and libraries hold beside the context
    context_bytes_per_multiprocessor: int = 0
    collective_bytes: int = 0  # what a process holds for talking to the other GPUs
    rounding_bytes: int = 0  # for each large tensor: the allocator hands them out in steps of twice this
    is_fastqwen_gpu: bool = False  # its steps, sampler, graphs and kernels are modelled buffer by buffer (buffers.py)
    keeps_file_layout: bool = False  # packed weights stay as their file has them


# Measured on one H200 (132 multiprocessors), torch 2.11: 619 MiB once a context exists, 76 MiB more after cuBLAS,
# attention and Triton kernels were loaded, at most 3.4 KiB a node of a captured graph.
CONTEXT_BYTES_PER_MULTIPROCESSOR = round(618.8 * MIB / 132)
LIBRARY_BYTES = 76 * MIB
GRAPH_NODE_BYTES = round(3.4 * KIB)
KERNELS_PER_LAYER = 8

# torch's workspace for cuBLAS: 32 MiB from compute capability 9.0 on, else 8 MiB and 128 KiB; one for each stream, and
# graphs are captured on a stream of their own.
CUBLAS_CAPABILITY = (9, 0)
CUBLAS_BYTES, OLD_CUBLAS_BYTES = 32 * MIB, 8 * MIB + 128 * KIB

FASTQWEN_GPU = EngineProfile(
    name="fastqwen",
    step_tokens=8192,  # at most: steps.py says how many on a slower card
    max_num_seqs=256,
    block_size=64,
    library_bytes=LIBRARY_BYTES,
    context_bytes_per_multiprocessor=CONTEXT_BYTES_PER_MULTIPROCESSOR,
    # NCCL's documented NCCL_BUFFSIZE of 4 MiB, to send and to receive, on 32 channels.
    collective_bytes=2 * 32 * 4 * MIB,
    rounding_bytes=MIB,
    is_fastqwen_gpu=True,
)

CPU_STEP_TOKENS = 512
CPU_MIXED_TOKENS = 16  # beside running streams: from here on a token costs the same time however many there are
FASTQWEN_CPU = EngineProfile(
    name="fastqwen on a CPU",
    step_tokens=CPU_STEP_TOKENS,
    max_num_seqs=64,
    block_size=16,
    sampler_bytes=2 + 4 + 4,
    library_bytes=227 * MIB,  # a process that has computed with torch
)

# The engine of the published table: whole prompts, no CUDA graphs, and a start-up step that samples 256 rows with both
# top-k and top-p by sorting the vocabulary. library_bytes and collective_bytes are the two numbers that were fitted.
EAGER_2023 = EngineProfile(
    name="eager-2023",
    step_tokens=None,
    least_step_tokens=2048,
    max_num_seqs=256,
    block_size=16,
    # Half precision: logits, sorted, softmax, running sum, gathered (5 x 2) and the sort's second buffer (2 + 8);
    # 64-bit positions: of the sort and of its inverse (2 x 8); three masks of a byte.
    sampler_bytes=5 * 2 + (2 + 8) + 2 * 8 + 3,
    library_bytes=205 * MIB,
    context_bytes_per_multiprocessor=CONTEXT_BYTES_PER_MULTIPROCESSOR,
    collective_bytes=614 * MIB,
    rounding_bytes=MIB,
    keeps_file_layout=True,
)

PROFILES = {"fastqwen": FASTQWEN_GPU, "eager-2023": EAGER_2023}
