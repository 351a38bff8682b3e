"""Writes small GGUF files for tests, right ones and, since nothing is checked here, wrong ones."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastqwen.weights.gguf_types import TYPES

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TYPE_IDS = {kind.name: number for number, kind in TYPES.items()}


class Typed(NamedTuple):
    """A metadata value of a given type, where the type that Python's suggests is not the one to test."""

    kind: int
    value: Any


class Packed(NamedTuple):
    """A tensor's bytes; ``shape`` as torch has it."""

    type_name: str
    shape: tuple[int, ...]
    data: bytes


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def kind_of(value: Any) -> int:
    if isinstance(value, Typed):
        return value.kind
    kinds = {bool: 7, int: 5 if isinstance(value, int) and value < 0 else 4, float: 6, str: STRING, bytes: STRING}
    return kinds.get(type(value), ARRAY)


def encode(value: Any) -> bytes:
    kind = kind_of(value)
    plain = value.value if isinstance(value, Typed) else value
    if kind == STRING:
        return text(plain)
    if kind == ARRAY:
        inner = kind_of(plain[0]) if plain else 4
        return struct.pack("<IQ", inner, len(plain)) + b"".join(encode(item) for item in plain)
    return struct.pack("<" + FORMATS[kind], plain)


def random_tensor(type_name: str, shape: tuple[int, ...], seed: int = 0) -> Packed:
    """Random packed bytes whose float16 scales are finite."""
    kind = TYPES[TYPE_IDS[type_name]]
    rng = np.random.default_rng(seed)
    if kind.block_elements == 1:
        values = rng.normal(0.0, 0.02, shape).astype("<f4")
        raw = {"F32": values, "F16": values.astype("<f2"), "BF16": (values.view("<u4") >> 16).astype("<u2")}[type_name]
        return Packed(type_name, shape, raw.tobytes())
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // kind.block_elements, kind.block_bytes), dtype=np.uint8)
    starts = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,)}
    for start in starts.get(type_name, (0, 2)):
        blocks[:, start + 1] &= 0b1011_1111  # clears an exponent bit, so that no scale is infinite
    return Packed(type_name, shape, blocks.tobytes())


def gguf_bytes(
    metadata: dict[str, Any],
    tensors: dict[str, Packed],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += text(key) + struct.pack("<I", kind_of(value)) + encode(value)
    data = b""
    for name, tensor in tensors.items():
        data += bytes(-len(data) % alignment)
        dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        head += text(name) + dims + struct.pack("<IQ", TYPE_IDS[tensor.type_name], len(data))
        data += tensor.data
    return head + bytes(-len(head) % alignment) + data


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, Packed], **options: int) -> Path:
    path.write_bytes(gguf_bytes(metadata, tensors, **options))
    return path
