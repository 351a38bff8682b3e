"""The GGUF reader: what it reads, and above all what it refuses before it has cost anything."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fastqwen.errors import BadCheckpoint, ModelNotFound, Unsupported
from fastqwen.weights.gguf_file import GgufFile
from tests.weights.gguf_writer import Packed, Typed, gguf_bytes, random_tensor, text, write_gguf

METADATA: dict[str, Any] = {
    "general.architecture": "qwen2",
    "bytes": Typed(9, [Typed(0, 1), Typed(0, 255)]),
    "short": Typed(3, -5),
    "long": Typed(10, 2**63),
    "float": 0.5,
    "double": Typed(12, 0.1),
    "flag": True,
    "flags": [True, False, True],
    "words": ["", "a", "Ġword", "汉字"],
    "ids": [3, 1, 2],
    "nested": [[1, 2], [3]],
    "empty": [],
}
TENSORS = {
    "dense": random_tensor("F32", (4, 6)),
    "half": random_tensor("F16", (10,)),
    "brain": random_tensor("BF16", (2, 3, 5)),
    "packed": random_tensor("Q4_1", (4, 3, 64)),
    "blocks": random_tensor("Q6_K", (2, 512)),
}


def opened(path: Path, raw: bytes) -> GgufFile:
    path.write_bytes(raw)
    return GgufFile(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("version", [2, 3])
def test_metadata(path: Path, version: int) -> None:
    metadata = GgufFile(write_gguf(path, METADATA, TENSORS, version=version)).metadata
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
    nested = [part.tolist() for part in plain.pop("nested")]
    assert nested == [[1, 2], [3]]
    assert plain == {
        "general.architecture": "qwen2",
        "bytes": [1, 255],
        "short": -5,
        "long": 2**63,
        "float": 0.5,
        "double": 0.1,
        "flag": True,
        "flags": [True, False, True],
        "words": ["", "a", "Ġword", "汉字"],
        "ids": [3, 1, 2],
        "empty": [],
    }
    assert plain["flag"] is True


def test_the_gguf_package_reads_the_same(path: Path) -> None:
    ours = GgufFile(write_gguf(path, {"general.architecture": "qwen2", "words": ["a", "b"], "n": 7}, TENSORS))
    theirs = gguf.GGUFReader(path)
    assert theirs.fields["words"].contents() == ours.metadata["words"]
    assert theirs.fields["n"].contents() == ours.metadata["n"]
    assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert found.offset_bytes == tensor.data_offset
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(found.shape)
        np.testing.assert_array_equal(ours.read(tensor.name).float().numpy(), expected)


def test_dense_tensors_are_views_and_packed_ones_float32(path: Path) -> None:
    file = GgufFile(write_gguf(path, {}, TENSORS))
    kinds = {"dense": torch.float32, "half": torch.float16, "brain": torch.bfloat16, "packed": torch.float32}
    for name, dtype in kinds.items():
        assert file.read(name).dtype == dtype
    base = file._home["half"].__array_interface__["data"][0]
    assert file.read("half").data_ptr() == base + file.tensors["half"].offset_bytes


@pytest.mark.parametrize("name", ["dense", "brain", "packed", "blocks"])
def test_a_part_is_the_part_of_the_whole(path: Path, name: str) -> None:
    file = GgufFile(write_gguf(path, {}, TENSORS))
    whole = file.read(name)
    for index in range(len(whole)):
        assert torch.equal(file.read_part(name, index), whole[index])


def test_an_alignment_below_the_element_size(path: Path) -> None:
    tensors = {"odd": random_tensor("F16", (3,)), "dense": random_tensor("F32", (5,))}
    file = GgufFile(write_gguf(path, {"general.alignment": 1}, tensors, alignment=1))
    for name, tensor in tensors.items():
        dtype = {"F16": "<f2", "F32": "<f4"}[tensor.type_name]
        assert file.read(name).tolist() == np.frombuffer(tensor.data, dtype).tolist()


def test_a_tensor_outlives_its_file(path: Path) -> None:
    tensor = GgufFile(write_gguf(path, {}, TENSORS)).read("dense")
    path.unlink()
    assert torch.isfinite(tensor).all()


def header(tensors: int, entries: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def tensor_info(dims: tuple[int, ...] = (32,), *, kind: int = 0, offset: int = 0, name: str = "t") -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def one_tensor(info: bytes, data_bytes: int = 128) -> bytes:
    head = header(1, 0) + info
    return head + bytes(-len(head) % 32 + data_bytes)


def array(kind: int, length: int, key: str = "key") -> bytes:
    return text(key) + struct.pack("<IIQ", 9, kind, length)


REFUSED = {
    "empty": (b"", "cannot be read"),
    "other magic": (b"GGML" + bytes(60), "does not begin with 'GGUF'"),
    "cut in the header": (header(0, 0)[:20], "the number of metadata entries needs 8 bytes at byte 16"),
    "49 bytes, huge array": (header(0, 1) + array(4, 2**34, "k"), "the length of 'k' is 17179869184, but"),
    "huge string array": (header(0, 1) + array(8, 2**40) + bytes(64), "the length of 'key' is 1099511627776"),
    "huge number of tensors": (header(2**60, 0) + bytes(64), "the number of tensors is 1152921504606846976"),
    "huge number of entries": (header(0, 2**60) + bytes(64), "the number of metadata entries is"),
    "huge string": (
        header(0, 1) + struct.pack("<Q", 2**62) + bytes(8),
        "the key of metadata entry 0 needs 461168601842",
    ),
    "unknown value type": (header(0, 1) + text("key") + struct.pack("<IQ", 13, 0), "unknown value type 13"),
    "unknown element type": (header(0, 1) + array(13, 1) + bytes(8), "unknown value type 13"),
    "deep nesting": (header(0, 1) + array(9, 1) + struct.pack("<IQ", 9, 1) * 50, "nests arrays more than 4 deep"),
    "bool of 2": (header(0, 1) + text("key") + struct.pack("<IB", 7, 2), "neither 0 nor 1"),
    "no UTF-8": (header(0, 1) + text("key") + struct.pack("<I", 8) + text(b"\xff"), "'key' is not valid UTF-8"),
    "no UTF-8 in a list": (gguf_bytes({"key": ["a", b"\xff"]}, {}), "string 1 of 'key' is not valid UTF-8"),
    "list cut off": (header(0, 1) + array(8, 2) + text("a" * 10), "the file ends within 'key'"),
    "list beyond the end": (header(0, 1) + array(8, 1) + struct.pack("<Q", 99), "reaches beyond the end"),
    "key twice": (header(0, 2) + 2 * (text("key") + struct.pack("<II", 4, 1)), "metadata key 'key' is there twice"),
    "tensor twice": (header(2, 0) + tensor_info() * 2 + bytes(512), "tensor 't' is there twice"),
    "alignment of 0": (gguf_bytes({"general.alignment": 0}, {}), "general.alignment is 0"),
    "alignment of 24": (gguf_bytes({"general.alignment": 24}, {}), "general.alignment is 24"),
    "alignment is text": (gguf_bytes({"general.alignment": "32"}, {}), "general.alignment is '32'"),
    "no dimensions": (one_tensor(tensor_info(())), "has 0 dimensions, expected 1 to 4"),
    "five dimensions": (one_tensor(tensor_info((1,) * 5)), "has 5 dimensions"),
    "a dimension of 0": (one_tensor(tensor_info((32, 0))), "impossible shape [0, 32]"),
    "overflowing shape": (one_tensor(tensor_info((2**32, 2**32))), "impossible shape"),
    "half a block": (one_tensor(tensor_info((48,), kind=8)), "has rows of 48, which Q8_0 cannot hold"),
    "unaligned": (one_tensor(tensor_info((8,), offset=8)), "not a multiple of the alignment 32"),
    "beyond the end": (one_tensor(tensor_info((33,))), "fetch this file again"),
    "far beyond the end": (one_tensor(tensor_info(offset=2**63)), "fetch this file again"),
    "no data": (header(1, 0) + tensor_info(), "fetch this file again"),
    "overlap": (header(2, 0) + tensor_info() + tensor_info(name="u", offset=32) + bytes(512), "'t' and 'u' overlap"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damage_is_refused_by_name(path: Path, case: str) -> None:
    raw, problem = REFUSED[case]
    with pytest.raises(BadCheckpoint) as caught:
        opened(path, raw)
    message = str(caught.value)
    assert str(path) in message
    assert problem in message
    assert "\n" not in message
    assert not isinstance(caught.value, Unsupported)


UNSUPPORTED = {
    "version 1": (header(0, 0, version=1), "GGUF version 1 is not supported"),
    "version 4": (header(0, 0, version=4), "GGUF version 4 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "IQ4_XS": (one_tensor(tensor_info((256,), kind=23)), "tensor 't' has the type IQ4_XS"),
    "type 200": (one_tensor(tensor_info(kind=200)), "tensor 't' has the unknown type 200"),
    "old layouts": (
        gguf_bytes({"general.quantization_version": 1}, {"t": random_tensor("Q4_0", (32,))}),
        "general.quantization_version is 1",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_we_cannot_read_is_named(path: Path, case: str) -> None:
    raw, problem = UNSUPPORTED[case]
    with pytest.raises(Unsupported) as caught:
        opened(path, raw)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_place_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(BadCheckpoint, match="is not a file"):
        GgufFile(tmp_path)


def test_list_items_are_bounded_over_the_whole_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastqwen.weights.gguf_reader.MAX_LIST_ITEMS", 5)
    assert opened(path, gguf_bytes({"a": ["x"] * 3, "b": ["y"] * 2}, {})).metadata["b"] == ["y", "y"]
    with pytest.raises(BadCheckpoint, match="the length of 'b' is 3, more than the 2"):
        opened(path, gguf_bytes({"a": ["x"] * 3, "b": ["y"] * 3}, {}))


def test_a_newline_in_a_name_does_not_break_the_line(path: Path) -> None:
    tensor = Packed("F32", (2,), bytes(4))  # half of its bytes
    with pytest.raises(BadCheckpoint) as caught:
        GgufFile(write_gguf(path, {}, {"evil\nname": tensor}))
    assert "\n" not in str(caught.value)


def test_a_models_sizes_are_read_without_torch() -> None:
    code = "import sys, fastqwen.weights.gguf_checkpoint, fastqwen.text.gguf_tokenizer; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"tjgg", "from before GGUF"), (b"lmgg", "from before GGUF"), (bytes(600), "nothing but zeros"),
        (b"PK\x03\x04", "can run code"), (b'\x40\0\0\0\0\0\0\0{"a":1}', "is a safetensors file"), (b"what?", "is not a GGUF file"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_says_what_it_is(path: Path, start: bytes, words: str) -> None:
    path.write_bytes(start + bytes(600))
    with pytest.raises(BadCheckpoint, match=words) as caught:
        GgufFile(path)
    assert str(path) in str(caught.value)


def test_a_download_that_has_not_ended(path: Path) -> None:
    (path.parent / f"{path.name}.aria2").write_bytes(b"x")
    path.write_bytes(b"GGUF")
    with pytest.raises(BadCheckpoint, match="unfinished download"):
        GgufFile(path)


def test_a_file_that_changed_is_read_again(path: Path) -> None:
    """What was just read is not read again, as long as it is the same."""
    first = GgufFile(write_gguf(path, METADATA, TENSORS))
    assert GgufFile(path).metadata is first.metadata
    os.utime(path, ns=(1, 1))
    assert GgufFile(path).metadata is not first.metadata
