"""Steps recorded as CUDA graphs: for which sizes, and how to read what they leave behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastqwen.kernels.limits import TILE_TOKENS, graph_batches, graph_tokens
from fastqwen.runner.step_layout import StepLayout

MAX_PROMPT_ROWS = 64  # of a recorded step: each may add one tile that is not full


def decode_layouts(max_num_seqs: int) -> list[StepLayout]:
    return [StepLayout(tokens=size, tiles=0, rows=size, samples=size) for size in graph_batches(max_num_seqs)]


def prompt_layouts(most_tokens: int, max_num_seqs: int) -> list[StepLayout]:
    """Steps that have prompts, or parts of them, beside decode rows."""
    found = []
    for tokens in graph_tokens(most_tokens):
        rows = min(tokens, max_num_seqs)
        found.append(StepLayout(tokens, tokens // TILE_TOKENS + MAX_PROMPT_ROWS, rows, samples=rows))
    return found


@dataclass(frozen=True)
class Recording:
    layout: StepLayout
    graph: torch.cuda.CUDAGraph
    hidden: Tensor  # [tokens, hidden]
    logits: Tensor  # [samples, vocab], float32 or the model's type
    tokens: Tensor  # int32 [samples]
    told: Tensor  # int32 [samples, words], log-probabilities as sampling.py has them


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
