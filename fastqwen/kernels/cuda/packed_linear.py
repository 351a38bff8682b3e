"""Launches of packed_linear.cu: which of its kernels computes a product, with how much memory and how many blocks."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastqwen.kernels import Norm
from fastqwen.kernels.cuda import driver, nvrtc
from fastqwen.kernels.cuda.pack import STEP_K, TILE_N, PackedWeight, unit_inputs
from fastqwen.kernels.triton.launch import card_of

SOURCES = ("primitives.cuh", "packed_linear.cu")
KERNEL = "packed_linear"
TYPES = {torch.float16: "Fp16", torch.bfloat16: "Bf16"}
FEW_ROWS, SOME_ROWS = 8, 64
SLICE_SUMS = 256  # float32 sums of a pair of tiles and 8 rows
MAX_COUNTERS = 16384
UNPACK_BYTES = 64 * 2**20  # of weights as plain numbers at a time


class Args(ctypes.Structure):
    """``Args`` of packed_linear.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "words", "scales", "zeros", "row_scales", "norm", "bias", "out")),
        *((name, ctypes.c_void_p) for name in ("partial", "counter")),
        *((name, ctypes.c_int) for name in ("rows", "k_size", "n_size", "tiles", "units", "groups", "group_shift")),
        *((name, ctypes.c_int) for name in ("grain", "gated", "add")),
        ("eps", ctypes.c_float),
    ]


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for."""

    body: str  # what it calls
    type: str  # of x
    format: str
    scales: str
    zeros: bool
    small_groups: bool
    warps: int = 8  # of a block
    depth: int = 6  # units of a warp that are on their way, with few rows
    stages: int = 4  # chunks of x and weights, with some rows

    def defines(self) -> dict[str, str]:
        return {
            "TYPE": self.type,
            "FORMAT": self.format,
            "SCALES": self.scales,
            "ZEROS": str(int(self.zeros)),
            "SMALL_GROUPS": str(int(self.small_groups)),
            "WARPS": str(self.warps),
            "DEPTH": str(self.depth),
            "STAGES": str(self.stages),
        }


def variant_of(body: str, dtype: torch.dtype, weight: PackedWeight, **tuned: int) -> Variant:
    small = weight.format == "Int4" and weight.group_size == STEP_K
    return Variant(body, TYPES[dtype], weight.format, weight.kind, weight.zeros is not None, small, **tuned)


def source(variant: Variant) -> str:
    parts = [(Path(__file__).parent / name).read_text() for name in SOURCES]
    return "\n".join([*parts, f"KERNEL({KERNEL})(Args args) {{ {variant.body}(args); }}\n"])


def args_of(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    partial: Tensor,
    counter: Tensor,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    add: bool = False,
    grain: int = 1,
) -> Args:
    assert x.is_contiguous() and out.is_contiguous() and x.shape[1] == weight.in_size and x.shape[1] % 8 == 0
    is_rows = weight.kind == "ROWS"
    return Args(
        x=x.data_ptr(),
        words=weight.words.data_ptr(),
        scales=None if is_rows else weight.scales.data_ptr(),
        zeros=_pointer(weight.zeros),
        row_scales=weight.scales.data_ptr() if is_rows else None,
        norm=None if norm is None else norm.weight.data_ptr(),
        bias=_pointer(weight.bias),
        out=out.data_ptr(),
        partial=partial.data_ptr(),
        counter=counter.data_ptr(),
        rows=x.shape[0],
        k_size=x.shape[1],
        n_size=weight.out_size,
        tiles=weight.tiles,
        units=weight.units,
        groups=1 if is_rows else weight.scales.shape[1],
        group_shift=(weight.group_size // STEP_K).bit_length() - 1,
        grain=grain,
        gated=int(gated),
        add=int(add),
        eps=0.0 if norm is None else norm.eps,
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


# ---- which kernel, and what it needs ----


@dataclass(frozen=True)
class Launch:
    """A kernel, and what a block of it sets aside."""

    variant: Variant
    shared_bytes: int
    pairs: int  # of tiles that a block has; its other warps share their inputs


@dataclass(frozen=True)
class PackedTiling:
    """What was measured to be fastest."""

    warps: int = 8
    depth: int = 6
    stages: int = 4
    blocks_each: int = 1  # on a multiprocessor
    whole: bool = True  # a block has tiles as a whole, of few rows
    wide: int | None = None  # pairs of tiles of a block, with more than 8 rows; None: by the shape

    @property
    def tuned(self) -> dict[str, int]:
        return {"warps": self.warps, "depth": self.depth, "stages": self.stages}


def launch_of(dtype: torch.dtype, rows: int, weight: PackedWeight, tiling: PackedTiling) -> Launch:
    if rows > FEW_ROWS:
        return _some(dtype, rows, weight, tiling)
    count = next(count for count in (1, 2, 4, 8) if count >= rows)
    variant = variant_of(f"few_rows<{count}>", dtype, weight, **tiling.tuned)
    ring = variant.warps * variant.depth * 2 * _slot_bytes(variant)
    end = 4 * (variant.warps * SLICE_SUMS + variant.warps + 1)
    x_bytes = count * 16 * _spread(weight.units * unit_inputs(_bits(weight)) // 8)
    return Launch(variant, _aligned(ring + end) + x_bytes, 1)


def _some(dtype: torch.dtype, rows: int, weight: PackedWeight, tiling: PackedTiling) -> Launch:
    slices = next((slices for slices in (2, 4) if 8 * slices >= rows), 8)
    wide = tiling.wide or (8 if weight.tiles >= 512 else 4)
    variant = variant_of(f"some_rows<{wide}, {slices}>", dtype, weight, **tiling.tuned)
    ring = variant.stages * variant.warps * 2 * _slot_bytes(variant)
    pieces = variant.warps // wide * unit_inputs(_bits(weight)) // 8
    x_bytes = variant.stages * 8 * slices * 16 * _spread(pieces)
    end = 4 * (variant.warps * SLICE_SUMS + 1)
    return Launch(variant, _aligned(ring + x_bytes + end), wide)


def _bits(weight: PackedWeight) -> int:
    return 4 if weight.format == "Int4" else 8


def _slot_bytes(variant: Variant) -> int:
    groups = 2 if variant.small_groups else 1
    words = groups * ({"ROWS": 0, "FLOATS": 2}.get(variant.scales, 1) + int(variant.zeros))
    return 512 + 128 * max(1, words)


def _spread(pieces: int) -> int:
    """Pieces of 16 bytes between rows of x: rows of two neighbours lie in different banks."""
    return pieces + 4 if pieces % 8 == 0 else pieces


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


# ---- on a device ----


class PackedSpace:
    """What all products of a device share: scratch for split tiles and unpacked weights, and the compiled kernels."""

    def __init__(self, device: torch.device) -> None:
        card = card_of(device)
        self.card, self.device = card, device
        self.overlap = card.capability >= (9, 0)
        # Each of two blocks on a multiprocessor may leave the sums of two tiles of the largest size.
        self.partial = torch.empty(
            2 * 2 * card.multiprocessors * 8 * SLICE_SUMS * 8, dtype=torch.float32, device=device
        )
        self.counter = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
        self.unpacked = torch.empty(UNPACK_BYTES // 2, dtype=torch.int16, device=device)
        self._kernels: dict[Launch, tuple[driver.Kernel, int]] = {}

    def kernel(self, launch: Launch) -> tuple[driver.Kernel, int]:
        """The kernel, and how many blocks of it the device holds at once. Raises CannotCompile."""
        if launch not in self._kernels:
            variant = launch.variant
            code = nvrtc.machine_code(source(variant), variant.defines(), self.card.capability)
            kernel = driver.Kernel(driver.load(code), KERNEL, launch.shared_bytes, 32 * variant.warps)
            self._kernels[launch] = kernel, kernel.blocks_at_once() * self.card.multiprocessors
        return self._kernels[launch]


def packed_product(
    x: Tensor,
    weight: PackedWeight,
    space: PackedSpace,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    add_to: Tensor | None = None,
    tiling: PackedTiling | None = None,
) -> Tensor:
    """x [m <= 64, k] -> [m, n], [m, n / 2] if gated; the norm in front only of 8 rows or less."""
    t = tiling or PackedTiling()
    rows, width = x.shape[0], weight.out_size // 2 if gated else weight.out_size
    assert rows <= SOME_ROWS and (not gated or weight.out_size % (2 * TILE_N) == 0)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device) if add_to is None else add_to
    assert norm is None or rows <= FEW_ROWS
    launch = launch_of(x.dtype, rows, weight, t)
    kernel, at_once = space.kernel(launch)
    sharing = launch.variant.warps // launch.pairs
    block_tiles, chunks = -(-weight.tiles // 2 // launch.pairs), -(-weight.units // sharing)
    if rows <= FEW_ROWS:
        chunks = weight.units
    grain = chunks if rows <= FEW_ROWS and t.whole else 1
    blocks = min(at_once, t.blocks_each * space.card.multiprocessors, block_tiles * chunks // grain)
    args = args_of(
        x, weight, out, space.partial, space.counter, norm=norm, gated=gated, add=add_to is not None, grain=grain
    )
    kernel.launch(blocks, args, overlap=space.overlap)
    return out
