"""Steps recorded as CUDA graphs: for which sizes, and how to read what they leave behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastqwen.runner.step_layout import TILE_TOKENS, StepLayout

MAX_PROMPT_ROWS = 64  # of a recorded step: each may add one tile that is not full
_PROMPT_TOKENS = [
    *range(16, 65, 16),
    *range(96, 257, 32),
    *range(320, 513, 64),
    *range(640, 1025, 128),
    *range(1280, 2049, 256),
]


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Row counts for which a decode step is recorded; a step takes the next larger one and pads."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, *range(80, 257, 16), *range(288, 2049, 32)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def decode_layouts(max_num_seqs: int) -> list[StepLayout]:
    return [StepLayout(tokens=size, tiles=0, samples=size) for size in decode_sizes(max_num_seqs)]


def prompt_layouts(most_tokens: int, max_num_seqs: int) -> list[StepLayout]:
    """Steps that have prompts, or parts of them, beside decode rows. Larger ones, which have prompts only, are not
    recorded: they keep the device busy for longer than the host needs to launch them."""
    sizes = [size for size in _PROMPT_TOKENS if size < most_tokens] + [most_tokens]
    return [
        StepLayout(tokens=tokens, tiles=tokens // TILE_TOKENS + MAX_PROMPT_ROWS, samples=min(tokens, max_num_seqs))
        for tokens in sizes
    ]


@dataclass(frozen=True)
class Recording:
    layout: StepLayout
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [tokens, hidden]
    logits: Tensor  # [samples, vocab], float32 or the model's type
    tokens: Tensor  # int32 [samples]


class _Memory:
    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(tensor.shape),
            "typestr": {2: "<i2", 4: "<i4"}[tensor.element_size()],
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def alias(tensor: Tensor) -> Tensor:
    """The same memory without owning it.

    All graphs share a pool. What a graph leaves behind is read right after its replay, in the stream's order, so graphs
    recorded later may use the same memory: with owners, the logits of all sizes alone would take a gigabyte.
    """
    assert tensor.is_contiguous()
    return torch.as_tensor(_Memory(tensor), device=tensor.device).view(tensor.dtype)
