"""Tensor types of GGUF files: how many bytes a block of elements takes, and how to make float32 of it.

A packed tensor is a row of equal blocks. A block holds its elements' small integers and, as float16, what to scale and
shift them with; the K types cover 256 elements with smaller integer scales inside. Each function below takes
``blocks`` (uint8 [blocks, block bytes]) and writes ``out`` (float32 [blocks, block elements]); all numbers are little endian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Temporaries stay in the processor's cache, and beside the output they cost next to nothing.
CHUNK_ELEMENTS = 2**18

_PAIR_SHIFTS: Bytes = np.array([[0], [2], [4], [6]], dtype=np.uint8)  # four 2-bit fields of a byte, lowest first
_BIT_SHIFTS: Bytes = np.arange(8, dtype=np.uint8)[:, None]


class TensorType(NamedTuple):
    name: str
    block_elements: int
    block_bytes: int
    unpack: Callable[[Bytes, Floats], None]

    def num_bytes(self, num_elements: int) -> int:
        """``num_elements`` must be whole blocks."""
        assert num_elements % self.block_elements == 0
        return num_elements // self.block_elements * self.block_bytes


def dequantize(kind: TensorType, data: Bytes) -> Floats:
    """float32 [elements] from ``data`` (uint8 [bytes], whole blocks). What a file's NaN or infinite scale makes, stays."""
    blocks = data.reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_elements), dtype=np.float32)
    step = max(1, CHUNK_ELEMENTS // kind.block_elements)
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            kind.unpack(blocks[start : start + step], out[start : start + step])
    return out.reshape(-1)


def _float32(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.copy().view("<f4")


def _float16(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks.copy().view("<f2")


def _bfloat16(blocks: Bytes, out: Floats) -> None:
    out.view("<u4")[:] = blocks.copy().view("<u2").astype(np.uint32) << 16


def _half(blocks: Bytes, start: int) -> Floats:
    """The float16 at byte ``start`` of each block, as float32 [blocks, 1]."""
    field: Any = blocks[:, start : start + 2].copy().view("<f2")
    return field.astype(np.float32)  # type: ignore[no-any-return]


def _nibbles(packed: Bytes) -> Bytes:
    """[..., n] -> [..., 2, n]: all low halves, then all high halves."""
    return np.stack((packed & 15, packed >> 4), axis=-2)


def _bits32(blocks: Bytes, start: int) -> Bytes:
    """The 32 bits from byte ``start`` on, lowest first, as [blocks, 32] of 0 or 1."""
    return np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")


def _q4_0(blocks: Bytes, out: Floats) -> None:
    """scale (2 bytes), 16 bytes of nibbles; values are q - 8."""
    np.subtract(_nibbles(blocks[:, 2:18]).reshape(out.shape), np.float32(8), out=out)
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    """scale, minimum (2 bytes each), 16 bytes of nibbles."""
    np.multiply(_nibbles(blocks[:, 4:20]).reshape(out.shape), _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    """scale, 32 fifth bits (4 bytes), 16 bytes of nibbles; values are q - 16."""
    q = _nibbles(blocks[:, 6:22]).reshape(out.shape) | _bits32(blocks, 2) << 4
    np.subtract(q, np.float32(16), out=out)
    out *= _half(blocks, 0)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    """scale, minimum, 32 fifth bits (4 bytes), 16 bytes of nibbles."""
    q = _nibbles(blocks[:, 8:24]).reshape(out.shape) | _bits32(blocks, 4) << 4
    np.multiply(q, _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    """scale, 32 signed bytes."""
    np.multiply(blocks[:, 2:34].view(np.int8), _half(blocks, 0), out=out)


def _pairs(packed: Bytes) -> Bytes:
    """The 2-bit fields of two runs of 32 bytes, [blocks, 64] -> [blocks, 2, 4, 32]: a run's lowest fields come first."""
    return (packed.reshape(-1, 2, 1, 32) >> _PAIR_SHIFTS) & np.uint8(3)


def _q2_k(blocks: Bytes, out: Floats) -> None:
    """16 bytes of (4-bit scale, 4-bit minimum), 64 bytes of pairs, scale and minimum of these; groups of 16."""
    scales = blocks[:, :16]
    groups = out.reshape(-1, 16, 16)
    scale = _half(blocks, 80) * (scales & 15)
    np.multiply(_pairs(blocks[:, 16:80]).reshape(groups.shape), scale[:, :, None], out=groups)
    groups -= (_half(blocks, 82) * (scales >> 4))[:, :, None]


def _q3_k_scales(packed: Bytes) -> Bytes:
    """16 six-bit scales from 12 bytes: 8 bytes of low nibbles, then 4 bytes of upper pairs."""
    low = _nibbles(packed[:, :8]).reshape(-1, 16)
    high = ((packed[:, None, 8:12] >> _PAIR_SHIFTS) & np.uint8(3)).reshape(-1, 16)
    return low | (high << np.uint8(4))


def _q3_k(blocks: Bytes, out: Floats) -> None:
    """256 third bits (32 bytes), 64 bytes of pairs, 12 bytes of scales, their scale; values are q - 4, groups of 16."""
    groups = out.reshape(-1, 16, 16)
    high = (blocks[:, None, :32] >> _BIT_SHIFTS & 1).reshape(-1, 2, 4, 32)
    q = (_pairs(blocks[:, 32:96]) | high << 2).reshape(groups.shape)
    scale = _half(blocks, 108) * (_q3_k_scales(blocks[:, 96:108]) - np.float32(32))
    np.subtract(q, np.float32(4), out=groups)
    groups *= scale[:, :, None]


def _q4_k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight six-bit scales and minima from 12 bytes. The last four of each keep their upper bits above the first four's."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((first & 63, third & 15 | first >> 6 << 4), axis=1)
    minima = np.concatenate((second & 63, third >> 4 | second >> 6 << 4), axis=1)
    return scales, minima


def _scale_shift(q: Bytes, blocks: Bytes, out: Floats) -> None:
    """Q4_K and Q5_K begin alike: scale and minimum (2 bytes each), 12 bytes of scales; groups of 32."""
    groups = out.reshape(-1, 8, 32)
    scales, minima = _q4_k_scales(blocks[:, 4:16])
    np.multiply(q, (_half(blocks, 0) * scales)[:, :, None], out=groups)
    groups -= (_half(blocks, 2) * minima)[:, :, None]


def _q4_k(blocks: Bytes, out: Floats) -> None:
    """Then 128 bytes of nibbles: 32 bytes hold two groups."""
    q = _nibbles(blocks[:, 16:144].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    _scale_shift(q, blocks, out)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    """Then 32 bytes whose bit g is group g's fifth bit, and 128 bytes of nibbles as in Q4_K."""
    q = _nibbles(blocks[:, 48:176].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    q |= (blocks[:, None, 16:48] >> _BIT_SHIFTS & 1) << 4
    _scale_shift(q, blocks, out)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """128 bytes of nibbles, 64 of upper pairs, 16 signed scales, their scale; values are q - 32, groups of 16."""
    groups = out.reshape(-1, 16, 16)
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    q = (low | _pairs(blocks[:, 128:192]) << 4).reshape(groups.shape)
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8)
    np.subtract(q, np.float32(32), out=groups)
    groups *= scale[:, :, None]


TYPES = {
    0: TensorType("F32", 1, 4, _float32),
    1: TensorType("F16", 1, 2, _float16),
    2: TensorType("Q4_0", 32, 18, _q4_0),
    3: TensorType("Q4_1", 32, 20, _q4_1),
    6: TensorType("Q5_0", 32, 22, _q5_0),
    7: TensorType("Q5_1", 32, 24, _q5_1),
    8: TensorType("Q8_0", 32, 34, _q8_0),
    10: TensorType("Q2_K", 256, 84, _q2_k),
    11: TensorType("Q3_K", 256, 110, _q3_k),
    12: TensorType("Q4_K", 256, 144, _q4_k),
    13: TensorType("Q5_K", 256, 176, _q5_k),
    14: TensorType("Q6_K", 256, 210, _q6_k),
    30: TensorType("BF16", 1, 2, _bfloat16),
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
