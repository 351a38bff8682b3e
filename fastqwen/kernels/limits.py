"""Sizes and limits of the GPU's kernels and recorded steps, for those who must know them without torch: the planner
counts the memory that follows from them, runner and kernels allocate and choose by them."""

from __future__ import annotations

import os

KIB, MIB = 2**10, 2**20


FUSED_ROWS = 64  # products of up to so many rows use our own kernels, others cuBLAS
SAMPLE_CHUNK = 4096  # entries of the vocabulary that one program of the sampler looks at
LISTED = 32  # of these the largest, for whom the others are cut
WISH_WORDS = 20  # what a request wishes of the sampler, in words of 32 bits (wishes.py)
MAX_BENT = 1120  # tokens with a bias, and those that end an answer
MAX_TOLD = 32  # log-probabilities that the device finds; whoever asks for more gets them on a slower way
SPLIT_PARTS = 4 * 2**20  # float32 numbers for products that are split over programs
SPLIT_BLOCKS = 16384  # int32 counters for them
DECODE_PARTS = 16384  # parts of contexts in a decode step; each has an output and two numbers for each query head
DECODE_STAGES = 3
DECODE_SUMS_BYTES = 12 * KIB
DECODE_ROWS = 2048  # int32 counters for each key-value head
CACHE_SCALE_BYTES = 2  # float16, for each head of each token in a cache of 8-bit numbers
UNPACK_BYTES = 8 * MIB  # of a packed matrix, as float32, unpacked at a time
PLAIN_BYTES = 64 * MIB  # of a packed matrix, as plain numbers for cuBLAS, at a time
PACKED_SUMS = 16384  # float32: what a block leaves of products with packed weights, at most
PACKED_TILES = 16384  # int32 counters for them
PACKED_ROWS = 128  # products of up to so many rows read packed weights; larger ones unpack them first
EIGHT_BIT_ROWS = 16  # the same, where a library multiplies 8-bit numbers as they are
WIDE_BYTES = 200 * MIB  # activations of a step that are worth to be made in two parts
CHUNK_ROWS = 4096
GPU_BLOCK_SIZES = (16, 32, 64, 128, 256)  # of the KV cache, in tokens
SMALL_BLOCK = (
    32  # the usual size where a multiprocessor has 100 KiB or less, so that several programs run beside each other
)
DOTS_CAPABILITY = (
    8,
    0,
)  # before it products are ordinary arithmetic, and larger blocks than SMALL_BLOCK leave the registers
WIDEST_WITHOUT_DOTS = 128  # heads; a tile of prompts with wider ones does not fit into 64 KiB
GPU_HEAD_DIMS = (16, 32, 64, 128, 256)  # the first in float32 only
TILE_TOKENS = 64  # of the prompt kernel; steps with prompts beside streams have a multiple of so many tokens
DELTA_CHUNK = 64  # tokens whose writes to a memory of fixed size are solved for together
MAX_RECORDED_TOKENS = 2048
LIBRARY_ATTENTION_CAPABILITY = (9, 0)  # from here on whole prompts go through cuDNN


SHARED_KIB = {(7, 5): 64, (8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


def shared_bytes(capability: tuple[int, int]) -> int:
    """Of shared memory for one program at most (CUDA C++ programming guide, technical specifications by capability); of a
    capability that is not known the least of today's."""
    return SHARED_KIB.get(capability, 99) * KIB


def gpu_head_dims(capability: tuple[int, int], number_bytes: int) -> tuple[int, ...]:
    sizes = GPU_HEAD_DIMS if number_bytes > 2 else GPU_HEAD_DIMS[1:]
    return tuple(size for size in sizes if capability >= DOTS_CAPABILITY or size <= WIDEST_WITHOUT_DOTS)


def gpu_block_sizes(capability: tuple[int, int], head_dim: int, number_bytes: int) -> tuple[int, ...]:
    """Of the KV cache, in tokens: those that attention takes on this card."""
    sizes = (size for size in GPU_BLOCK_SIZES if decode_stages(size, head_dim, number_bytes, shared_bytes(capability)))
    return tuple(size for size in sizes if capability >= DOTS_CAPABILITY or size <= SMALL_BLOCK)


def usual_block_size(capability: tuple[int, int], most: int) -> int:
    return SMALL_BLOCK if shared_bytes(capability) < 100 * KIB else most


EMULATED = "FASTQWEN_EMULATED_CAPABILITY"  # for tests: compute as on a card of this capability, "8.6", on a newer one


def emulated_capability() -> tuple[int, int] | None:
    major, _, minor = os.environ.get(EMULATED, "").partition(".")
    return (int(major), int(minor)) if major and minor else None


def decode_stages(block_size: int, head_dim: int, number_bytes: int, shared_bytes: int) -> int:
    """How many blocks of keys and values the attention of single tokens has on their way; 0: not even one fits.

    All stages but the last lie in shared memory, beside one block as the product's operand and the sums (what Triton 3.7
    asks for: tests/kernels/compile_for_gpu.py).
    """
    tile = block_size * head_dim * number_bytes
    left = shared_bytes - tile - DECODE_SUMS_BYTES
    return 0 if left < 0 else min(DECODE_STAGES, left // (2 * tile) + 1)


def graph_batches(max_num_seqs: int) -> tuple[int, ...]:
    """Row counts for which a decode step is recorded; a step takes the next larger one and pads."""
    sizes = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, *range(80, 257, 16), *range(288, 2049, 32))
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def graph_tokens(most_tokens: int) -> tuple[int, ...]:
    """Token counts for which a step with prompts is recorded. Larger ones are not: they keep the device busy for longer
    than the host needs to launch them."""
    most = min(most_tokens, MAX_RECORDED_TOKENS)
    sizes = (
        *range(16, 65, 16),
        *range(96, 257, 32),
        *range(320, 1025, TILE_TOKENS),
        *range(1152, 2049, 2 * TILE_TOKENS),
    )
    return (*(size for size in sizes if size < most), most)


def feed_forward_rows(tokens: int, width: int) -> int:
    """How many of a step's tokens go through the feed-forward part at once, ``width`` 16-bit numbers each.

    cuBLAS is faster with half of 8192 tokens at a time where activations are wide, and slower with less (8192 tokens of
    Qwen3-8B on an H200: 668 TFLOP/s at once, 706 by 4096, 652 by 512; bench/results/h200-chunks.json).
    """
    return min(tokens, CHUNK_ROWS) if tokens * width * 2 > WIDE_BYTES else tokens
