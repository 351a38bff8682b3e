"""GGUF files: their metadata, their tensors' numbers, and the parts of one that was split."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.weights.gguf_reader import FilePart, GgufTensor, read_head, read_part, short
from fastqwen.weights.gguf_types import Bytes, Split, dequantize

if TYPE_CHECKING:
    from torch import Tensor

SPLIT_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)
QUANTIZATION_VERSION = 2  # of the packed types' layouts
MAX_PARTS = 1000


class GgufFile:
    """A mapped GGUF file, or all parts of one that was split, by the first of them.

    ``metadata`` has numbers, bools, strings; arrays of numbers are numpy arrays (views of the file), others are lists.
    Raises ModelNotFound, BadCheckpoint for a damaged file, Unsupported for a variant or tensor type that we cannot read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = read_part(path)
        self.metadata = first.metadata
        self.tensors = dict(first.tensors)
        self._home = dict.fromkeys(first.tensors, first.data)  # the bytes of the part that has a tensor
        for other in _other_parts(path, first):
            self.tensors.update(other.tensors)
            self._home.update(dict.fromkeys(other.tensors, other.data))
        self._check_quantization_version()

    def read(self, name: str) -> Tensor:
        """The tensor: a read-only view of the file for F32, F16 and BF16, float32 for packed types."""
        tensor = self.tensors[name]
        return self._decode(self._home[name], tensor, tensor.offset_bytes, tensor.shape)

    def read_part(self, name: str, index: int) -> Tensor:
        """``read(name)[index]``, without unpacking the rest."""
        tensor = self.tensors[name]
        assert len(tensor.shape) > 1 and 0 <= index < tensor.shape[0]
        part_bytes = tensor.num_bytes // tensor.shape[0]
        start = tensor.offset_bytes + index * part_bytes
        return self._decode(self._home[name], tensor, start, tensor.shape[1:])

    def split(self, name: str, index: int | None = None) -> Split | None:
        """A packed tensor's codes and what they mean, or those of its part ``index``; None for one of plain numbers."""
        tensor = self.tensors[name]
        if tensor.type.split is None:
            return None
        start, num_bytes = tensor.offset_bytes, tensor.num_bytes
        if index is not None:
            assert 0 <= index < tensor.shape[0]
            num_bytes //= tensor.shape[0]
            start += index * num_bytes
        data = self._home[name][start : start + num_bytes]
        return tensor.type.split(data.reshape(-1, tensor.type.block_bytes))

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a packed matrix, float32 [rows, columns]; nothing else of the file is read."""
        import torch

        tensor = self.tensors[name]
        height, width = tensor.shape
        data = self._home[name][tensor.offset_bytes : tensor.offset_bytes + tensor.num_bytes].reshape(height, -1)
        return torch.from_numpy(dequantize(tensor.type, data[rows])).view(-1, width)

    @staticmethod
    def _decode(home: Bytes, tensor: GgufTensor, start: int, shape: tuple[int, ...]) -> Tensor:
        import torch  # only here, so that the planner can read a GGUF's sizes without it

        dense = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.type.name)
        data = home[start : start + tensor.type.num_bytes(prod(shape))]
        if dense is None:
            return torch.from_numpy(dequantize(tensor.type, data)).view(shape)
        if start % dense.itemsize:
            data = data.copy()  # only possible with an alignment below the element's size
        with warnings.catch_warnings():
            # torch cannot mark a tensor read-only and says so; TensorFile.read promises no more than that.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
            return torch.from_numpy(data).view(dense).view(shape)

    def _check_quantization_version(self) -> None:
        version = self.metadata.get("general.quantization_version", QUANTIZATION_VERSION)
        packed = any(tensor.type.block_elements > 1 for tensor in self.tensors.values())
        if packed and version != QUANTIZATION_VERSION:
            raise Unsupported(
                f"{self.path}: general.quantization_version is {short(version)}, supported is {QUANTIZATION_VERSION}; "
                "convert the model again with a current tool"
            )


def without_tensors(path: Path) -> bytes:
    """A GGUF file of this one's metadata alone, for who needs the tokenizer and not the weights. Raises as GgufFile does."""
    metadata, head = read_head(path)
    if metadata.get("split.count", 1) > 1:
        raise Unsupported(f"{path} is one of several parts: its metadata do not stand alone, merge the parts first")
    return head


def _other_parts(path: Path, first: FilePart) -> Iterator[FilePart]:
    """Of a file that llama.cpp's gguf-split made: NAME-00001-of-00003.gguf and so on."""
    count = first.metadata.get("split.count")
    if count in (None, 0, 1):
        return
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None or not isinstance(count, int) or count != int(name["count"]) or count > MAX_PARTS:
        raise BadCheckpoint(
            f"{path} is one part of a model that was split in {short(count)}, but is not called so "
            "(NAME-00001-of-00002.gguf), which says where the others are"
        )
    names = [f"{name['name']}-{number:05d}-of-{count:05d}{name['end']}" for number in range(1, count + 1)]
    if int(name["number"]) != 1 or first.metadata.get("split.no", 0) != 0:
        raise BadCheckpoint(f"{path} is a later part of a split model: give the first one, {path.with_name(names[0])}")
    missing = [other for other in names if not path.with_name(other).is_file()]
    if missing:
        raise BadCheckpoint(
            f"{path}: {len(missing)} of its {count} parts are missing, the first is {missing[0]}; fetch it into the same folder"
        )
    seen = set(first.tensors)
    for number, other in enumerate(names[1:], 1):
        part = read_part(path.with_name(other))
        if part.metadata.get("split.no") != number or part.metadata.get("split.count") != count:
            raise BadCheckpoint(
                f"{path.with_name(other)} is not part {number + 1} of {count} of {path.name}, as its name says"
            )
        if not seen.isdisjoint(part.tensors):
            raise BadCheckpoint(
                f"{path.with_name(other)}: tensor {short(min(seen & part.tensors.keys()))} is in two parts"
            )
        seen |= part.tensors.keys()
        yield part
    total = first.metadata.get("split.tensors.count", len(seen))
    if total != len(seen):
        raise BadCheckpoint(f"{path}: its parts have {len(seen)} tensors, split.tensors.count is {short(total)}")
