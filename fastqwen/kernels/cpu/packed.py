"""Matrices of small whole numbers as packed.cpp reads them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastqwen.kernels import CodedWeight, GroupedWeight, Norm
from fastqwen.kernels.cpu.arena import Arena

TILE, BLOCK = 16, 32  # outputs, inputs
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# By the bits of a code: packed.cpp's Kind, the bytes of a tile's block, and how many groups of scales a block has.
KINDS = {8: (0, 512, 1), 4: (1, 256, 1), 5: (2, 320, 1), 6: (3, 384, 2), 2: (4, 128, 2), 3: (5, 192, 2)}
PLAIN, ADDED, GATED = 0, 1, 2
SIGNATURES = {
    "fq_pack": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p],
    "fq_packed_product": [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_void_p, ctypes.c_int64,
        ctypes.c_int,
    ],
}  # fmt: skip

_POINTERS = ("codes", "scales", "parts", "minima", "min_parts", "bias")
_NUMBERS = ("kind", "halves", "zero", "shift", "inputs", "outputs")


class _Matrix(ctypes.Structure):
    """packed.cpp's Matrix."""

    _fields_ = [*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _NUMBERS)]


@dataclass(frozen=True)
class TiledWeight:
    codes: Tensor  # uint8 [tiles, blocks, bytes of a block]
    tensors: dict[str, Tensor]  # [tiles, groups, 16] each, and the bias
    header: _Matrix  # points into them

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + sum(tensor.nbytes for tensor in self.tensors.values())


def tiled(weight: CodedWeight, pack: Callable[..., None], arena: Arena) -> TiledWeight:
    """``pack`` is fq_pack. The order of the inputs, if there is one, is the caller's matter."""
    kind, block_bytes, halves = KINDS[weight.bits]
    out_size, in_size = weight.codes.shape
    assert in_size % BLOCK == 0 and weight.part_size * halves == BLOCK
    tiles = -(-out_size // TILE)
    codes = arena.empty((tiles, in_size // BLOCK, block_bytes), torch.uint8)
    numbers = {
        "scales": weight.scales, "parts": weight.parts, "minima": weight.minima, "min_parts": weight.min_parts,
    }  # fmt: skip
    tensors = {name: arena.copy(_by_tiles(tensor, tiles)) for name, tensor in numbers.items() if tensor is not None}
    if weight.bias is not None:
        tensors["bias"] = weight.bias.float().contiguous()
    shift = max(0, -(-weight.group_size // BLOCK) - 1).bit_length()
    header = _Matrix(
        codes.data_ptr(),
        *(tensors[name].data_ptr() if name in tensors else None for name in _POINTERS[1:]),
        *(kind, halves, weight.zero, shift, in_size, out_size),
    )
    plain = weight.codes.contiguous()
    pack(ctypes.byref(header), plain.data_ptr(), codes.data_ptr())
    return TiledWeight(codes, tensors, header)


def coded(weight: GroupedWeight) -> tuple[CodedWeight, Tensor | None] | None:
    """The same numbers, and the order in which the inputs stand, if it is another; None for groups that no block holds."""
    order = None
    if weight.group_of is not None:
        order = weight.group_of.argsort(stable=True)
    size = min(weight.group_size, weight.in_size)
    in_order = torch.arange(weight.in_size) // size
    exact = weight.scales.half().to(weight.scales.dtype).equal(weight.scales)
    if size % BLOCK or weight.in_size % size or not exact or bool(((weight.zeros < 0) | (weight.zeros > 255)).any()):
        return None
    if order is not None and weight.group_of is not None and not weight.group_of[order].equal(in_order):
        return None
    bytes_of = weight.codes.t().contiguous().view(torch.uint8)  # the lowest byte of a word comes first
    codes = torch.stack([bytes_of & 15, bytes_of >> 4], dim=-1).flatten(1) if weight.bits == 4 else bytes_of
    scales, zeros = weight.scales.t().half().contiguous(), weight.zeros.t().contiguous()
    middle = 2 ** (weight.bits - 1)
    symmetric = bool((zeros == middle).all())
    steps = size // BLOCK
    if steps & (steps - 1) and scales.shape[1] > 1:  # the kernel finds a block's scales by a shift
        scales, size = scales.repeat_interleave(steps, 1), BLOCK
    found = CodedWeight(
        codes=codes if order is None else codes[:, order],
        bits=weight.bits,
        zero=middle if symmetric else 0,
        scales=scales,
        group_size=size,
        part_size=BLOCK,
        minima=None if symmetric else -scales,
        min_parts=None if symmetric else zeros.to(torch.uint8).repeat_interleave(steps, 1),
        bias=weight.bias,
    )
    return found, order


class TiledProduct:
    """A Product (see kernels/__init__.py) of float32 activations, which are rounded to 16 bits in blocks of 32 inputs."""

    def __init__(
        self,
        weight: TiledWeight,
        order: Tensor | None,
        *,
        product: Callable[..., None],  # fq_packed_product
        silu_mul: Callable[[Tensor], Tensor],
    ) -> None:
        self._weight = weight
        self._order = order
        self._product = product
        self._silu_mul = silu_mul
        self._header = ctypes.byref(weight.header)
        self._out_size = weight.header.outputs
        self.num_bytes = weight.num_bytes + (0 if order is None else order.nbytes)

    def reads_norm(self, norm: Norm, x: Tensor) -> bool:
        return norm.weight.dtype in TYPES

    def plain(self, x: Tensor) -> Tensor:
        return self._of(x, None, PLAIN)

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self._of(x, norm, PLAIN)

    def gated_of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        if self._out_size % (2 * TILE):  # the second half begins within a tile
            return self._silu_mul(self.of_norm(x, norm))
        return self._of(x, norm, GATED)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        assert residual.is_contiguous()
        self._call(x, None, residual, ADDED)

    def _of(self, x: Tensor, norm: Norm | None, form: int) -> Tensor:
        out = torch.empty((x.shape[0], self._out_size // 2 if form == GATED else self._out_size))
        self._call(x, norm, out, form)
        return out

    def _call(self, x: Tensor, norm: Norm | None, out: Tensor, form: int) -> None:
        if self._order is not None:
            x = x.index_select(1, self._order)
            norm = None if norm is None else Norm(norm.weight[self._order], norm.eps)
        x = x.contiguous()
        assert x.dtype == torch.float32
        pointer, kind, eps = None, 0, 0.0
        if norm is not None:
            pointer, kind, eps = norm.weight.data_ptr(), TYPES[norm.weight.dtype], norm.eps
        self._product(self._header, x.data_ptr(), pointer, kind, eps, out.data_ptr(), x.shape[0], form)


def _by_tiles(numbers: Tensor, tiles: int) -> Tensor:
    """[out, groups] -> [tiles, groups, 16]"""
    out_size, groups = numbers.shape
    padded = torch.nn.functional.pad(numbers, (0, 0, 0, tiles * TILE - out_size))
    return padded.view(tiles, TILE, groups).transpose(1, 2)
