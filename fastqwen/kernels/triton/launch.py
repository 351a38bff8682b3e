"""What a card gives a program, and kernels that start before the one in front has ended (programmatic dependent launch,
compute capability 9.0)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from fastqwen.kernels.limits import DOTS_CAPABILITY, emulated_capability, shared_bytes


@triton.jit
def prefetch(pointers):
    """Ask for the cache lines behind these pointers; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@dataclass(frozen=True)
class Card:
    """What tilings go by."""

    capability: tuple[int, int]
    shared_bytes: int  # of shared memory for one program at most, as the driver says and Triton compares
    multiprocessors: int

    @property
    def has_dots(self) -> bool:
        """Whether Triton's products use tensor cores; on older cards they are ordinary arithmetic, for small tiles only."""
        return self.capability >= DOTS_CAPABILITY


INTERPRETED = Card((8, 0), 227 * 1024, 132)  # where there is no GPU: an H200's sizes

UNSTAGED_BYTES = 5 * 1024  # of a program's shared memory: sums between warps, what Triton aligns


@cache
def card_of(device: torch.device) -> Card:
    if device.type != "cuda":
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    emulated = emulated_capability()
    if emulated is None:
        return Card((found.major, found.minor), shared, found.multi_processor_count)
    return Card(emulated, min(shared, shared_bytes(emulated)), found.multi_processor_count)


def stages_that_fit(wanted: int, stage_bytes: int, card: Card) -> int:
    """Of a loop whose loads are in shared memory before they are used; the last stage's go on to registers."""
    return max(1, min(wanted, (card.shared_bytes - UNSTAGED_BYTES) // stage_bytes + 1))


def supports_overlap(device: torch.device) -> bool:
    return card_of(device).capability >= (9, 0)


def overlapping(enabled: bool) -> dict[str, Any]:
    """Launch options; such a kernel must call gdc_wait before it touches what others write."""
    return {"launch_pdl": True} if enabled else {}
