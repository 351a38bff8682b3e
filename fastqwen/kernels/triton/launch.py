"""Kernels that start before the one in front has ended (programmatic dependent launch, compute capability 9.0)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines behind these pointers; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability; (0, 0) where there is no GPU and Triton interprets."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def supports_overlap(device: torch.device) -> bool:
    return capability(device) >= (9, 0)


def overlapping(enabled: bool) -> dict[str, Any]:
    """Launch options; such a kernel must call gdc_wait before it touches what others write."""
    return {"launch_pdl": True} if enabled else {}
