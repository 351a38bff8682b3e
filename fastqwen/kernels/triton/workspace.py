"""Scratch memory for products whose sums are split over several programs."""

from __future__ import annotations

import torch

from fastqwen.kernels.limits import SPLIT_BLOCKS, SPLIT_PARTS
from fastqwen.kernels.triton.launch import supports_overlap


class Workspace:
    """Parts in float32, and counters that every launch leaves at zero.

    ``overlap``: kernels may start before the one in front has ended (programmatic dependent launch).
    """

    def __init__(self, device: torch.device, max_parts: int = SPLIT_PARTS, max_blocks: int = SPLIT_BLOCKS) -> None:
        self.partial = torch.empty(max_parts, dtype=torch.float32, device=device)
        self.counter = torch.zeros(max_blocks, dtype=torch.int32, device=device)
        self.overlap = supports_overlap(device)
