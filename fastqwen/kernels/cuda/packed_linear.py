"""Products with packed weights: which kernel of packed_linear.cu computes one, with how much memory and how many blocks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from fastqwen.kernels import GroupedWeight, Norm, ScaledWeight
from fastqwen.kernels.cuda import driver, nvrtc
from fastqwen.kernels.cuda.eight_bit import eight_bit_product, multiplies
from fastqwen.kernels.cuda.pack import STEP_K, TILE_N, PackedWeight, pack_grouped, pack_scaled
from fastqwen.kernels.limits import EIGHT_BIT_ROWS, PACKED_ROWS, PACKED_SUMS, PACKED_TILES, PLAIN_BYTES
from fastqwen.kernels.triton import pointwise
from fastqwen.kernels.triton.launch import Card, card_of

SOURCES = ("primitives.cuh", "packed_linear.cu")
KERNEL = "packed_linear"
TYPES = {torch.float16: "Fp16", torch.bfloat16: "Bf16"}
FEW_ROWS, SOME_ROWS = 8, 64
SLICE_SUMS = 256  # float32 sums of a pair of tiles and 8 rows


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
    assert x.is_contiguous() and out.is_contiguous() and x.shape[1] == -(-weight.in_size // 8) * 8
    return Args(
        x=x.data_ptr(),
        words=weight.words.data_ptr(),
        scales=_pointer(weight.group_scales),
        zeros=_pointer(weight.zeros),
        row_scales=_pointer(weight.row_scales),
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
        groups=weight.groups,
        group_shift=weight.group_shift,
        grain=grain,
        gated=int(gated),
        add=int(add),
        eps=0.0 if norm is None else norm.eps,
    )


def plain_args(weight: PackedWeight, out: Tensor) -> Args:
    """Of ``unpack``: out [16 * tiles, inputs of whole units]"""
    return Args(
        words=weight.words.data_ptr(),
        scales=_pointer(weight.group_scales),
        zeros=_pointer(weight.zeros),
        row_scales=_pointer(weight.row_scales),
        out=out.data_ptr(),
        n_size=weight.out_size,
        tiles=weight.tiles,
        units=weight.units,
        groups=weight.groups,
        group_shift=weight.group_shift,
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
    sums: int  # float32: what a block leaves of a tile that it shares with others


@dataclass(frozen=True)
class PackedTiling:
    warps: int = 8
    depth: int = 4
    stages: int = 3
    blocks_each: int = 1  # on a multiprocessor
    whole: bool = True  # a block has whole tiles, with few rows
    wide: int = 4  # pairs of tiles of a block, with more rows

    @property
    def tuned(self) -> dict[str, int]:
        return {"warps": self.warps, "depth": self.depth, "stages": self.stages}


def few_launch(dtype: torch.dtype, rows: int, weight: PackedWeight, tiling: PackedTiling) -> Launch:
    """Of up to 8 rows."""
    count = next(count for count in (1, 2, 4, 8) if count >= rows)
    variant = variant_of(f"few_rows<{count}>", dtype, weight, **tiling.tuned)
    ring = variant.warps * variant.depth * 2 * _slot_bytes(variant)
    end = 4 * (variant.warps * SLICE_SUMS + variant.warps + 1)
    x_bytes = count * 16 * _spread(variant, weight.units * weight.unit // 8)
    return Launch(variant, _aligned(ring + end) + x_bytes, 1, SLICE_SUMS)


def some_launch(dtype: torch.dtype, rows: int, weight: PackedWeight, tiling: PackedTiling) -> Launch:
    """Of up to 64 rows."""
    slices = next((slices for slices in (2, 4) if 8 * slices >= rows), 8)
    variant = variant_of(f"some_rows<{tiling.wide}, {slices}>", dtype, weight, **tiling.tuned)
    ring = variant.stages * variant.warps * 2 * _slot_bytes(variant)
    pieces = variant.warps // tiling.wide * weight.unit // 8
    x_bytes = variant.stages * 8 * slices * 16 * _spread(variant, pieces)
    end = 4 * (variant.warps * SLICE_SUMS + 1)
    return Launch(variant, _aligned(ring + x_bytes + end), tiling.wide, tiling.wide * slices * SLICE_SUMS)


Tilings = Sequence[PackedTiling]

# Fastest first (bench/results/h100-packed.json); on a card with less shared memory the first that fits. Matrices with about one
# pair of tiles for each multiprocessor want more warps for each.
NARROW: Tilings = (
    PackedTiling(16, 6),
    PackedTiling(16, 4),
    PackedTiling(16, 2),
    PackedTiling(8, 4),
    PackedTiling(8, 2),
)
NARROW_LONG: Tilings = NARROW[1:]
BROAD_ONE: Tilings = (PackedTiling(8, 4, blocks_each=3), PackedTiling(8, 2, blocks_each=3))
BROAD: Tilings = (PackedTiling(16, 3, blocks_each=2), *NARROW[2:])
BYTES_NARROW_ONE: Tilings = (PackedTiling(16, 2), PackedTiling(8, 2))  # of Fp8, whose units are twice as large
BYTES: Tilings = (PackedTiling(8, 2, blocks_each=3),)
SOME: Tilings = (PackedTiling(blocks_each=2), PackedTiling(wide=8), PackedTiling(wide=8, stages=2))
LONG_UNITS = 128


def choose(dtype: torch.dtype, rows: int, weight: PackedWeight, card: Card) -> tuple[Launch, PackedTiling]:
    """The fastest that fits into the card's shared memory; the last one fits every card from 7.5 on."""
    if rows <= FEW_ROWS:
        narrow = weight.tiles // 2 <= card.multiprocessors * 3 // 2
        if weight.format == "Fp8":
            wanted = BYTES_NARROW_ONE if narrow and rows == 1 else BYTES
        elif narrow:
            wanted = NARROW_LONG if weight.units >= LONG_UNITS or rows > 1 else NARROW
        else:
            wanted = BROAD_ONE if rows == 1 else BROAD
        whole = weight.tiles >= card.multiprocessors  # else there would be too few blocks
        for tiling in wanted:
            tiling = replace(tiling, whole=whole)
            launch = few_launch(dtype, rows, weight, tiling)
            if launch.shared_bytes <= card.shared_bytes:
                return launch, tiling
    launches = [(some_launch(dtype, rows, weight, tiling), tiling) for tiling in SOME]
    return next((one for one in launches if one[0].shared_bytes <= card.shared_bytes), launches[-1])


def _slot_bytes(variant: Variant) -> int:
    groups = 2 if variant.small_groups else 1
    words = groups * ({"ROWS": 0, "FLOATS": 2}.get(variant.scales, 1) + int(variant.zeros))
    return (1024 if variant.format == "Fp8" else 512) + 128 * max(1, words)


def _spread(variant: Variant, pieces: int) -> int:
    """``x_stride``"""
    return pieces if pieces % 8 else pieces + (1 if variant.format == "Fp8" else 4)


def _aligned(size: int) -> int:
    return -(-size // 16) * 16


# ---- on a device ----


class PackedSpace:
    """What all products of a device share: scratch for split tiles and unpacked weights, and the compiled kernels.

    Raises CannotCompile where NVRTC does not run.
    """

    def __init__(self, device: torch.device) -> None:
        self.card = card_of(device)
        self._capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else self.card.capability
        self.overlap = self.card.capability >= (9, 0)
        self.partial = torch.empty(2 * self.card.multiprocessors * PACKED_SUMS, dtype=torch.float32, device=device)
        self.counter = torch.zeros(PACKED_TILES, dtype=torch.int32, device=device)
        self.plain = torch.empty(PLAIN_BYTES // 2, dtype=torch.int16, device=device)
        self._compiler = ThreadPoolExecutor()  # each program takes seconds; most are ready before a weight is
        self._programs: dict[Variant, Future[bytes]] = {}
        self._kernels: dict[Launch, tuple[driver.Kernel, int]] = {}
        nvrtc.machine_code("", {}, self._capability)

    def compile_for(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        """Begin to compile what steps of any size need for this matrix."""
        self._program(variant_of("unpack", dtype, weight))
        for rows in (1, 2, 4, 8, 16, 32, SOME_ROWS):
            self._program(choose(dtype, rows, weight, self.card)[0].variant)

    def _program(self, variant: Variant) -> Future[bytes]:
        if variant not in self._programs:
            args = source(variant), variant.defines(), self._capability
            self._programs[variant] = self._compiler.submit(nvrtc.machine_code, *args)
        return self._programs[variant]

    def kernel(self, launch: Launch) -> tuple[driver.Kernel, int]:
        """The kernel, and how many blocks of it the device holds at once. Raises CannotCompile."""
        if launch not in self._kernels:
            variant = launch.variant
            kernel = driver.Kernel(
                driver.load(self._program(variant).result()), KERNEL, launch.shared_bytes, 32 * variant.warps
            )
            self._kernels[launch] = kernel, kernel.blocks_at_once() * self.card.multiprocessors
        return self._kernels[launch]


def packed_product(
    x: Tensor,
    weight: PackedWeight,
    space: PackedSpace,
    *,
    norm: Norm | None = None,
    gated: bool = False,
    out: Tensor | None = None,
    add: bool = False,
    tiling: PackedTiling | None = None,
) -> Tensor:
    """x [m <= 64, k] -> out [m, n], [m, n / 2] if gated; ``add``: to what ``out`` has. The norm in front: of 8 rows or less."""
    rows, width = x.shape[0], weight.out_size // 2 if gated else weight.out_size
    assert rows <= SOME_ROWS and (not gated or weight.out_size % (2 * TILE_N) == 0)
    if tiling is None:
        launch, tiling = choose(x.dtype, rows, weight, space.card)
    else:
        launch = (few_launch if rows <= FEW_ROWS else some_launch)(x.dtype, rows, weight, tiling)
    has_all_x = launch.variant.body.startswith("few")
    assert norm is None or has_all_x
    if out is None:
        out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    kernel, at_once = space.kernel(launch)
    sharing = 1 if has_all_x else launch.variant.warps // launch.pairs
    block_tiles, chunks = -(-weight.tiles // 2 // launch.pairs), -(-weight.units // sharing)
    grain = chunks if has_all_x and tiling.whole else 1
    blocks = min(at_once, tiling.blocks_each * space.card.multiprocessors, block_tiles * chunks // grain)
    blocks = min(blocks, space.partial.numel() // (2 * launch.sums))  # a block may leave sums of two tiles
    args = args_of(x, weight, out, space.partial, space.counter, norm=norm, gated=gated, add=add, grain=grain)
    kernel.launch(blocks, args, overlap=space.overlap)
    return out


def unpacked(
    weight: PackedWeight, first_tile: int, space: PackedSpace, dtype: torch.dtype
) -> tuple[Tensor, PackedWeight]:
    """As many tiles from ``first_tile`` on as the scratch holds, as plain numbers [outputs, inputs], and what they are of."""
    padded = weight.units * weight.unit
    count = min(weight.tiles - first_tile, PLAIN_BYTES // (2 * TILE_N * padded))
    part = weight.part(first_tile, first_tile + count)
    plain = space.plain[: count * TILE_N * padded].view(dtype).view(count * TILE_N, padded)
    variant = variant_of("unpack", dtype, weight)
    kernel, at_once = space.kernel(Launch(variant, variant.warps * _slot_bytes(variant), 1, 0))
    kernel.launch(min(at_once, -(-count * part.units // variant.warps)), plain_args(part, plain), overlap=False)
    return plain[: part.out_size, : weight.in_size], part


class PackedProduct:
    """A decoder's ways to use packed weights: a kernel for each number of rows, and cuBLAS with unpacked ones for the most."""

    def __init__(self, weight: PackedWeight, space: PackedSpace) -> None:
        self.weight, self._space = weight, space
        self.num_bytes = weight.num_bytes
        self._has_padding = weight.order is not None and bool((weight.order < 0).any())
        self._by_bytes = multiplies(weight, space.card.capability)
        self.most_rows = EIGHT_BIT_ROWS if self._by_bytes else PACKED_ROWS

    def reads_norm(self, norm: Norm, x: Tensor) -> bool:
        return norm.weight.dtype == x.dtype

    def plain(self, x: Tensor) -> Tensor:
        return self._product(self._inputs(x), None)

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        if self._fuses_norm(x):
            return packed_product(x.contiguous(), self.weight, self._space, norm=norm)
        return self.plain(pointwise.rms_norm(x, norm))

    def gated_of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        if x.shape[0] > self.most_rows or self.weight.out_size % (2 * TILE_N):
            return pointwise.silu_mul(self.of_norm(x, norm))
        if self._fuses_norm(x):
            return packed_product(x.contiguous(), self.weight, self._space, norm=norm, gated=True)
        x = self._inputs(pointwise.rms_norm(x, norm))
        out = torch.empty((x.shape[0], self.weight.out_size // 2), dtype=x.dtype, device=x.device)
        self._in_passes(x, out, gated=True, add=False)
        return out

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        self._product(self._inputs(x), residual)

    def _fuses_norm(self, x: Tensor) -> bool:
        if x.shape[0] > FEW_ROWS or self.weight.order is not None or x.shape[1] % 8:
            return False
        return choose(x.dtype, x.shape[0], self.weight, self._space.card)[0].variant.body.startswith("few")

    def _inputs(self, x: Tensor) -> Tensor:
        """As the kernels want them: in the weights' order, in rows of whole 16 bytes."""
        order = self.weight.order
        if order is not None:
            x = functional.pad(x, (0, 1))[:, order] if self._has_padding else x.index_select(1, order)
        if x.shape[1] % 8:
            x = functional.pad(x, (0, -x.shape[1] % 8))
        return x.contiguous()

    def _product(self, x: Tensor, add_to: Tensor | None) -> Tensor:
        out = add_to
        if self._by_bytes and x.shape[0] > self.most_rows:
            found = eight_bit_product(x, self.weight)
            return found if out is None else out.add_(found)
        if out is None:
            out = torch.empty((x.shape[0], self.weight.out_size), dtype=x.dtype, device=x.device)
        if x.shape[0] <= self.most_rows:
            self._in_passes(x, out, gated=False, add=add_to is not None)
        else:
            self._by_library(x, out, add=add_to is not None)
        return out

    def _in_passes(self, x: Tensor, out: Tensor, *, gated: bool, add: bool) -> None:
        for start in range(0, x.shape[0], SOME_ROWS):
            rows = slice(start, start + SOME_ROWS)
            packed_product(x[rows], self.weight, self._space, gated=gated, out=out[rows], add=add)

    def _by_library(self, x: Tensor, out: Tensor, *, add: bool) -> None:
        tile = 0
        while tile < self.weight.tiles:
            plain, part = unpacked(self.weight, tile, self._space, x.dtype)
            columns = out[:, tile * TILE_N : tile * TILE_N + plain.shape[0]]
            weight = plain.t()
            if add:
                torch.addmm(columns, x[:, : plain.shape[1]], weight, out=columns)
            else:
                torch.mm(x[:, : plain.shape[1]], weight, out=columns)
            if part.bias is not None:
                columns += part.bias
            tile += part.tiles


def make_product(weight: GroupedWeight | ScaledWeight, dtype: torch.dtype, space: PackedSpace) -> PackedProduct | None:
    """None for activations that these kernels do not take, float32, and bfloat16 before 8.0; and for odd blocks."""
    if dtype not in TYPES or (dtype == torch.bfloat16 and not space.card.has_dots):
        return None
    packed = pack_grouped(weight) if isinstance(weight, GroupedWeight) else pack_scaled(weight)
    if packed is None:
        return None
    space.compile_for(packed, dtype)
    return PackedProduct(packed, space)
