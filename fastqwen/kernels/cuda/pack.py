"""Packed weights in the order in which packed_linear.cu reads them.

A tile is 16 outputs. A unit of it is as many inputs as 512 bytes hold, 64 of 4 bits or 32 of 8 bits, and each of a warp's 32
lanes has 16 bytes of it: lane 4 * g + t those of the outputs g and g + 8, and of every 32 inputs the eight from 8 * t on. So
its bytes are its operands of the tensor cores (PTX ISA, mma.m16n8k16), and its part of x is 16 bytes in a row. Numbers of
FP8 stay in their matrix, of which a lane fetches 16 bytes of two rows: so libraries can multiply by it as well.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastqwen.kernels import GroupedWeight, ScaledWeight

STEP_K = 32  # inputs; no group is smaller
TILE_N = 16  # outputs
PLAIN_UNIT = 64  # inputs of Fp8's
BLOCK = 128  # outputs and inputs of the blocks that libraries know
PACK_COLUMNS = 4096  # outputs that are unpacked at once

Format = Literal["Int4", "Int8", "Fp8"]
Scales = Literal["PAIRS", "FLOATS", "TILES", "ROWS"]
SYMMETRIC_ZERO = {"Int4": 8, "Int8": 128}


@dataclass(frozen=True)
class PackedWeight:
    """weight[o, i] = scale(o, group of i) * (code[o, i] - zero(o, group of i)); the groups lie in order.

    ``order`` says which input stands where, if they were sorted by group or have padding between them.
    """

    format: Format
    words: Tensor  # int32 [tiles, units, 32, 4]; of Fp8 the matrix: [tiles, 16, units, 16]
    scales: Tensor  # see ``kind``
    kind: Scales  # PAIRS: float16 [tiles, groups, 8, 2]; FLOATS: float32 alike; TILES: float32 [tiles, groups]; ROWS: [out]
    zeros: Tensor | None  # int16 [tiles, groups, 8, 2]; None: 8 of 4 bits, 128 of 8 bits
    group_size: int  # 2^n * 32 inputs; of one group for all, at least as many as there are
    in_size: int  # with padding
    out_size: int
    order: Tensor | None = None  # int64 [in_size]; -1: padding, where x is zero
    bias: Tensor | None = None  # [out]
    blocks: Tensor | None = (
        None  # float32 [out / 128, in / 128 and zeros]: the scales once more, where these are their blocks
    )

    @property
    def num_bytes(self) -> int:
        tensors = (self.words, self.scales, self.zeros, self.order, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def group_scales(self) -> Tensor | None:
        return None if self.kind == "ROWS" else self.scales

    @property
    def row_scales(self) -> Tensor | None:
        return self.scales if self.kind == "ROWS" else None

    @property
    def groups(self) -> int:
        return 1 if self.kind == "ROWS" else self.scales.shape[1]

    @property
    def group_shift(self) -> int:
        """2 to this many steps of 32 inputs are a group."""
        return (self.group_size // STEP_K).bit_length() - 1

    def part(self, start: int, stop: int) -> PackedWeight:
        """Tiles ``start`` to ``stop``."""
        tiles, outputs = slice(start, stop), slice(start * TILE_N, stop * TILE_N)
        return replace(
            self,
            words=self.words[tiles],
            scales=self.scales[outputs if self.kind == "ROWS" else tiles],
            zeros=None if self.zeros is None else self.zeros[tiles],
            out_size=min(self.out_size, stop * TILE_N) - start * TILE_N,
            bias=None if self.bias is None else self.bias[outputs],
            blocks=None,
        )

    @property
    def unit(self) -> int:
        """Inputs that a warp takes at once."""
        return PLAIN_UNIT if self.format == "Fp8" else unit_inputs(4 if self.format == "Int4" else 8)

    @property
    def tiles(self) -> int:
        return self.words.shape[0]

    @property
    def units(self) -> int:
        return self.words.shape[2 if self.format == "Fp8" else 1]


def unit_inputs(bits: int) -> int:
    return 256 // bits


def pack_grouped(weight: GroupedWeight) -> PackedWeight:
    """The same numbers."""
    weight, order = _in_steps(weight)
    form: Format = "Int4" if weight.bits == 4 else "Int8"
    out_size = weight.out_size
    tiles = -(-out_size // (2 * TILE_N)) * 2  # a pair is computed together
    edges = [*range(0, tiles * TILE_N, PACK_COLUMNS), tiles * TILE_N]
    words = [pack_codes(_codes(weight, order, *edge), weight.bits) for edge in itertools.pairwise(edges)]
    exact = weight.scales.half().to(weight.scales.dtype).equal(weight.scales)
    symmetric = bool((weight.zeros == SYMMETRIC_ZERO[form]).all())
    scales = weight.scales.half() if exact else weight.scales.float()
    return PackedWeight(
        format=form,
        words=torch.cat(words),
        scales=by_tiles(scales, tiles),
        kind="PAIRS" if exact else "FLOATS",
        zeros=None if symmetric else by_tiles(weight.zeros, tiles),
        group_size=weight.group_size,
        in_size=weight.in_size if order is None else order.shape[0],
        out_size=out_size,
        order=order,
        bias=weight.bias,
    )


def pack_scaled(weight: ScaledWeight) -> PackedWeight | None:
    """The same numbers; None where a block has inputs that are no multiple of a unit."""
    height, width = weight.block
    out_size, in_size = weight.numbers.shape
    one_block = width >= in_size
    if not one_block and width % PLAIN_UNIT:
        return None
    tiles = -(-out_size // (2 * TILE_N)) * 2
    missing = (0, -in_size % PLAIN_UNIT, 0, tiles * TILE_N - out_size)
    numbers = functional.pad(weight.numbers.view(torch.uint8), missing).contiguous()  # no copy where nothing is missing
    kind: Scales = "ROWS"
    scales, group_size = weight.scales, _power_of_two(max(in_size, 2 * STEP_K))
    if one_block:
        scales = scales[:, 0].repeat_interleave(height)[:out_size].contiguous()
    else:
        units = width // PLAIN_UNIT
        group_size = width if units == _power_of_two(units) else PLAIN_UNIT
        scales = scales.repeat_interleave(width // group_size, 1)
        if height % TILE_N == 0:
            kind, lines = "TILES", scales.repeat_interleave(height // TILE_N, 0)[:tiles]
            scales = functional.pad(lines, (0, 0, 0, tiles - lines.shape[0])).contiguous()
        else:
            kind, scales = "FLOATS", by_tiles(scales.repeat_interleave(height, 0)[:out_size].t(), tiles)
    return PackedWeight(
        format="Fp8",
        words=numbers.view(torch.int32).view(tiles, TILE_N, -1, PLAIN_UNIT // 4),
        scales=scales,
        kind=kind,
        zeros=None,
        group_size=group_size,
        in_size=in_size,
        out_size=out_size,
        bias=weight.bias,
        blocks=functional.pad(weight.scales, (0, -weight.scales.shape[1] % 4))
        if weight.block == (BLOCK, BLOCK)
        else None,
    )


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 [16 * tiles, inputs of whole units] -> int32 [tiles, units, 32, 4]"""
    unit = unit_inputs(bits)
    tiles, units = codes.shape[0] // TILE_N, codes.shape[1] // unit
    if bits == 8:
        lanes = codes.view(tiles, 2, 8, units, 4, 2, 4).permute(
            0, 3, 2, 4, 5, 1, 6
        )  # row half, g, unit, t, operand, input
        return lanes.flatten().view(torch.int32).view(tiles, units, 32, 4)
    # row half, g, unit, step, t, operand, pair of inputs, input of the pair
    parts = codes.view(tiles, 2, 8, units, 2, 4, 2, 2, 2).permute(0, 3, 2, 5, 4, 6, 8, 7, 1)
    low, high = parts.unbind(-1)
    return (low | high << 4).flatten().view(torch.int32).view(tiles, units, 32, 4)


def unpack_codes(words: Tensor, bits: int) -> Tensor:
    """What pack_codes made of it: int32 [tiles, units, 32, 4] -> uint8 [16 * tiles, inputs]"""
    tiles, units = words.shape[:2]
    found = words.contiguous().view(torch.uint8)
    if bits == 8:
        lanes = found.view(tiles, units, 8, 4, 2, 2, 4).permute(0, 5, 2, 1, 3, 4, 6)
        return lanes.reshape(tiles * TILE_N, units * 32)
    parts = torch.stack([found & 15, found >> 4], -1).view(tiles, units, 8, 4, 2, 2, 2, 2, 2)
    return parts.permute(0, 8, 2, 1, 4, 3, 5, 7, 6).reshape(tiles * TILE_N, units * 64)


def by_tiles(numbers: Tensor, tiles: int) -> Tensor:
    """[groups, out] -> [tiles, groups, 8, 2]: the numbers of the outputs g and g + 8 are neighbours."""
    groups, out_size = numbers.shape
    padded = functional.pad(numbers, (0, tiles * TILE_N - out_size))
    return padded.view(groups, tiles, 2, 8).permute(1, 0, 3, 2).contiguous()


def _in_steps(weight: GroupedWeight) -> tuple[GroupedWeight, Tensor | None]:
    """The weight with groups of 2^n steps, whose inputs stand side by side, and where each input went."""
    size, group_of = weight.group_size, weight.group_of
    inputs = torch.arange(weight.in_size, device=weight.codes.device)
    if group_of is None:
        if size >= weight.in_size or size % STEP_K == 0:
            return _with_whole_steps(weight), None
        return _uneven(weight, inputs // size, inputs)
    order = group_of.argsort(stable=True)
    if size % STEP_K == 0 and group_of[order].equal(inputs // size):
        return _with_whole_steps(weight), order
    return _uneven(weight, group_of, order)


def _with_whole_steps(weight: GroupedWeight) -> GroupedWeight:
    size = weight.group_size
    if size >= weight.in_size:
        return replace(weight, group_size=_power_of_two(max(size, 2 * STEP_K)))
    steps = size // STEP_K
    if steps == _power_of_two(steps):
        return weight
    scales, zeros = (part.repeat_interleave(steps, 0) for part in (weight.scales, weight.zeros))
    return replace(weight, scales=scales, zeros=zeros, group_size=STEP_K)


def _uneven(weight: GroupedWeight, group_of: Tensor, order: Tensor) -> tuple[GroupedWeight, Tensor]:
    """Groups of any size: each is filled up to whole steps with inputs that do not exist (-1 in the order)."""
    counts = torch.bincount(group_of, minlength=weight.scales.shape[0])
    steps = (counts + STEP_K - 1) // STEP_K
    group = group_of[order]
    begins = (steps.cumsum(0) - steps) * STEP_K - (counts.cumsum(0) - counts)
    places = torch.arange(weight.in_size, device=order.device) + begins[group]
    spread = order.new_full((int(steps.sum()) * STEP_K,), -1)
    spread[places] = order
    scales, zeros = (part.repeat_interleave(steps, 0) for part in (weight.scales, weight.zeros))
    return replace(weight, scales=scales, zeros=zeros, group_size=STEP_K), spread


def _codes(weight: GroupedWeight, order: Tensor | None, start: int, stop: int) -> Tensor:
    """Outputs ``start`` to ``stop``, and inputs to the end of the last unit: uint8 [outputs, inputs]"""
    columns = weight.codes[:, start:stop]
    shifts = torch.arange(0, 32, weight.bits, dtype=torch.int32, device=columns.device)
    codes = ((columns.unsqueeze(1) >> shifts[:, None]) & (2**weight.bits - 1)).to(torch.uint8).flatten(0, 1)
    if order is not None:
        codes = codes[order]  # any code does where there is no input: x is zero there
    unit = unit_inputs(weight.bits)
    missing = -(-codes.shape[0] // unit) * unit - codes.shape[0]
    return functional.pad(codes.t(), (0, missing, 0, stop - start - columns.shape[1])).contiguous()


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
