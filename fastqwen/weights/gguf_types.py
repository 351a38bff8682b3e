"""Tensor types of GGUF files: how many bytes a block of elements takes, and how to make numbers of it.

A packed tensor is a row of equal blocks. A block holds its elements' small integers and, as float16, what to scale and
shift them with; the K types cover 256 elements with smaller integer scales inside. ``split`` of a type takes
``blocks`` (uint8 [blocks, block bytes]) apart; all numbers are little endian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
SmallInts = npt.NDArray[np.int8]
Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]

# Temporaries stay in the processor's cache, and beside the output they cost next to nothing.
CHUNK_ELEMENTS = 2**18

_PAIR_SHIFTS: Bytes = np.array([[0], [2], [4], [6]], dtype=np.uint8)  # four 2-bit fields of a byte, lowest first
_BIT_SHIFTS: Bytes = np.arange(8, dtype=np.uint8)[:, None]


class Split(NamedTuple):
    """(code - zero) * (scale * part) + minimum * min_part; parts are those of a block's groups of elements."""

    codes: Bytes  # [blocks, groups, elements of a group]
    zero: int
    scale: Halves  # [blocks, 1]
    part: SmallInts | None = None  # [blocks, groups]
    minimum: Halves | None = None  # [blocks, 1]
    min_part: Bytes | None = None  # [blocks, groups]


class TensorType(NamedTuple):
    name: str
    block_elements: int
    block_bytes: int
    split: Callable[[Bytes], Split] | None = None  # None: plain numbers
    bits: int = 0  # of a code

    def num_bytes(self, num_elements: int) -> int:
        """``num_elements`` must be whole blocks."""
        assert num_elements % self.block_elements == 0
        return num_elements // self.block_elements * self.block_bytes


def dequantize(kind: TensorType, data: Bytes) -> Floats:
    """float32 [elements] from ``data`` (uint8 [bytes], whole blocks). What a file's NaN or infinite scale makes, stays."""
    if kind.split is None:
        return _plain(kind, data)
    blocks = data.reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_elements), dtype=np.float32)
    step = max(1, CHUNK_ELEMENTS // kind.block_elements)
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            _join(kind.split(blocks[start : start + step]), out[start : start + step])
    return out.reshape(-1)


def _join(parts: Split, out: Floats) -> None:
    """out float32 [blocks, elements]"""
    groups = out.reshape(parts.codes.shape)
    scale = parts.scale.astype(np.float32)
    if parts.part is not None:
        scale = scale * parts.part
    if parts.zero:
        np.subtract(parts.codes, np.float32(parts.zero), out=groups)
        groups *= scale[:, :, None]
    else:
        np.multiply(parts.codes, scale[:, :, None], out=groups)
    if parts.minimum is not None:
        minimum = parts.minimum.astype(np.float32)
        groups += (minimum if parts.min_part is None else minimum * parts.min_part)[:, :, None]


def _plain(kind: TensorType, data: Bytes) -> Floats:
    numbers = np.frombuffer(data, dtype={"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[kind.name])
    if kind.name != "BF16":
        return numbers.astype(np.float32)
    out = numbers.astype(np.uint32)  # the upper halves of float32
    out <<= 16
    return out.view(np.float32)


def _half(blocks: Bytes, start: int) -> Halves:
    """The float16 at byte ``start`` of each block, as [blocks, 1]."""
    field: Any = blocks[:, start : start + 2].copy().view("<f2")
    return field  # type: ignore[no-any-return]


def _nibbles(packed: Bytes) -> Bytes:
    """[..., n] -> [..., 2, n]: all low halves, then all high halves."""
    out = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), dtype=np.uint8)
    np.bitwise_and(packed, 15, out=out[..., 0, :])
    np.right_shift(packed, 4, out=out[..., 1, :])
    return out


def _bits32(blocks: Bytes, start: int) -> Bytes:
    """The 32 bits from byte ``start`` on, lowest first, as [blocks, 1, 32] of 0 or 1."""
    return np.unpackbits(blocks[:, None, start : start + 4], axis=2, bitorder="little")


def _run(blocks: Bytes, start: int) -> Bytes:
    """16 bytes of nibbles as [blocks, 1, 32]"""
    return _nibbles(blocks[:, start : start + 16]).reshape(-1, 1, 32)


def _q4_0(blocks: Bytes) -> Split:
    """scale (2 bytes), 16 bytes of nibbles; values are q - 8."""
    return Split(_run(blocks, 2), 8, _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Split:
    """scale, minimum (2 bytes each), 16 bytes of nibbles."""
    return Split(_run(blocks, 4), 0, _half(blocks, 0), minimum=_half(blocks, 2))


def _q5_0(blocks: Bytes) -> Split:
    """scale, 32 fifth bits (4 bytes), 16 bytes of nibbles; values are q - 16."""
    return Split(_run(blocks, 6) | _bits32(blocks, 2) << np.uint8(4), 16, _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Split:
    """scale, minimum, 32 fifth bits (4 bytes), 16 bytes of nibbles."""
    return Split(_run(blocks, 8) | _bits32(blocks, 4) << np.uint8(4), 0, _half(blocks, 0), minimum=_half(blocks, 2))


def _q8_0(blocks: Bytes) -> Split:
    """scale, 32 signed bytes: with their highest bit turned over they are 128 more, and not negative."""
    return Split((blocks[:, 2:34] ^ np.uint8(128))[:, None], 128, _half(blocks, 0))


def _pairs(packed: Bytes) -> Bytes:
    """The 2-bit fields of two runs of 32 bytes, [blocks, 64] -> [blocks, 2, 4, 32]: a run's lowest fields come first."""
    return (packed.reshape(-1, 2, 1, 32) >> _PAIR_SHIFTS) & np.uint8(3)


def _q2_k(blocks: Bytes) -> Split:
    """16 bytes of (4-bit scale, 4-bit minimum), 64 bytes of pairs, scale and minimum of these; groups of 16."""
    scales, codes = blocks[:, :16], _pairs(blocks[:, 16:80]).reshape(-1, 16, 16)
    return Split(codes, 0, _half(blocks, 80), (scales & 15).view(np.int8), -_half(blocks, 82), scales >> np.uint8(4))


def _q3_k_scales(packed: Bytes) -> Bytes:
    """16 six-bit scales from 12 bytes: 8 bytes of low nibbles, then 4 bytes of upper pairs."""
    low = _nibbles(packed[:, :8]).reshape(-1, 16)
    high = ((packed[:, None, 8:12] >> _PAIR_SHIFTS) & np.uint8(3)).reshape(-1, 16)
    return low | (high << np.uint8(4))


def _q3_k(blocks: Bytes) -> Split:
    """256 third bits (32 bytes), 64 bytes of pairs, 12 bytes of scales, their scale; values are q - 4, groups of 16."""
    high = (blocks[:, None, :32] >> _BIT_SHIFTS & np.uint8(1)).reshape(-1, 2, 4, 32)
    codes = (_pairs(blocks[:, 32:96]) | high << np.uint8(2)).reshape(-1, 16, 16)
    return Split(codes, 4, _half(blocks, 108), _q3_k_scales(blocks[:, 96:108]).view(np.int8) - np.int8(32))


def _q4_k_scales(packed: Bytes) -> tuple[SmallInts, Bytes]:
    """Eight six-bit scales and minima from 12 bytes. The last four of each keep their upper bits above the first four's."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    return scales.view(np.int8), minima


def _scale_shift(codes: Bytes, blocks: Bytes) -> Split:
    """Q4_K and Q5_K begin alike: scale and minimum (2 bytes each), 12 bytes of scales; groups of 32."""
    scales, minima = _q4_k_scales(blocks[:, 4:16])
    return Split(codes, 0, _half(blocks, 0), scales, -_half(blocks, 2), minima)


def _q4_k(blocks: Bytes) -> Split:
    """Then 128 bytes of nibbles: 32 bytes hold two groups."""
    return _scale_shift(_nibbles(blocks[:, 16:144].reshape(-1, 4, 32)).reshape(-1, 8, 32), blocks)


def _q5_k(blocks: Bytes) -> Split:
    """Then 32 bytes whose bit g is group g's fifth bit, and 128 bytes of nibbles as in Q4_K."""
    codes = _nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    codes |= (blocks[:, None, 16:48] >> _BIT_SHIFTS & np.uint8(1)) << 4
    return _scale_shift(codes, blocks)


def _q6_k(blocks: Bytes) -> Split:
    """128 bytes of nibbles, 64 of upper pairs, 16 signed scales, their scale; values are q - 32, groups of 16."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    codes = (low | _pairs(blocks[:, 128:192]) << np.uint8(4)).reshape(-1, 16, 16)
    return Split(codes, 32, _half(blocks, 208), blocks[:, 192:208].view(np.int8))


TYPES = {
    0: TensorType("F32", 1, 4),
    1: TensorType("F16", 1, 2),
    2: TensorType("Q4_0", 32, 18, _q4_0, 4),
    3: TensorType("Q4_1", 32, 20, _q4_1, 4),
    6: TensorType("Q5_0", 32, 22, _q5_0, 5),
    7: TensorType("Q5_1", 32, 24, _q5_1, 5),
    8: TensorType("Q8_0", 32, 34, _q8_0, 8),
    10: TensorType("Q2_K", 256, 84, _q2_k, 2),
    11: TensorType("Q3_K", 256, 110, _q3_k, 3),
    12: TensorType("Q4_K", 256, 144, _q4_k, 4),
    13: TensorType("Q5_K", 256, 176, _q5_k, 5),
    14: TensorType("Q6_K", 256, 210, _q6_k, 6),
    30: TensorType("BF16", 1, 2),
}

# Only so that a refusal can say what the file uses.
OTHER_TYPE_NAMES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
}
