"""Each packed type against the gguf package's own unpacking, bit by bit."""

from __future__ import annotations

import tracemalloc

import gguf
import numpy as np
import pytest

from fastqwen.weights import gguf_types
from fastqwen.weights.gguf_types import TYPES, TensorType, dequantize
from tests.weights.gguf_writer import TYPE_IDS, random_tensor


def unpack(type_name: str, data: bytes) -> np.ndarray:
    return dequantize(TYPES[TYPE_IDS[type_name]], np.frombuffer(data, dtype=np.uint8))


@pytest.mark.parametrize("number", TYPES, ids=lambda number: TYPES[number].name)
def test_every_type_is_bit_equal(number: int) -> None:
    tensor = random_tensor(TYPES[number].name, (3, 5, 512), seed=number)
    expected = gguf.quants.dequantize(np.frombuffer(tensor.data, np.uint8), gguf.GGMLQuantizationType(number))
    got = unpack(tensor.type_name, tensor.data)
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got.view(np.uint32), expected.reshape(-1).view(np.uint32))


@pytest.mark.parametrize("number", TYPES, ids=lambda number: TYPES[number].name)
def test_sizes_are_the_formats(number: int) -> None:
    kind = TYPES[number]
    assert gguf.GGMLQuantizationType(number).name == kind.name
    assert gguf.GGML_QUANT_SIZES[number] == (kind.block_elements, kind.block_bytes)


@pytest.mark.parametrize("type_name", ["Q4_1", "Q6_K"])
def test_the_chunk_size_does_not_show(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor(type_name, (7, 512))
    whole = unpack(type_name, tensor.data)
    monkeypatch.setattr(gguf_types, "CHUNK_ELEMENTS", 600)  # no whole number of blocks, and a rest at the end
    np.testing.assert_array_equal(unpack(type_name, tensor.data), whole)


@pytest.mark.parametrize("number", TYPES, ids=lambda number: TYPES[number].name)
def test_memory_stays_near_the_output(number: int) -> None:
    tensor = random_tensor(TYPES[number].name, (4096, 4096))
    tracemalloc.start()
    out_bytes = unpack(tensor.type_name, tensor.data).nbytes
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1.1 * out_bytes


def test_the_names_of_refused_types_are_right() -> None:
    names = {number: gguf.GGMLQuantizationType(number).name for number in gguf_types.OTHER_TYPE_NAMES}
    assert names == gguf_types.OTHER_TYPE_NAMES


def test_whole_blocks_only() -> None:
    kind: TensorType = TYPES[TYPE_IDS["Q4_K"]]
    assert kind.num_bytes(512) == 288
    with pytest.raises(AssertionError):
        kind.num_bytes(100)
