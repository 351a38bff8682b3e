"""GGUF files, versions 2 and 3: metadata and tensors. A file is not trusted: each count is checked before it is believed.

Layout (ggml's docs/gguf.md): magic, version, number of tensors and of metadata entries; the entries (key, type, value); the
tensors' names, dimensions, types and offsets; padding; the tensors' bytes. Everything is little endian.
"""

from __future__ import annotations

import mmap
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import msgspec
import numpy as np

from fastqwen.errors import BadCheckpoint, ModelNotFound, Unsupported
from fastqwen.text_files import HEAD_BYTES, what_head_is
from fastqwen.weights.gguf_types import OTHER_TYPE_NAMES, TYPES, Bytes, Split, TensorType, dequantize

if TYPE_CHECKING:
    from torch import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUM_TENSORS_AT = 8  # behind magic number and version
NO_GGUF = "is not a GGUF file: it does not begin with 'GGUF'"
SPLIT_NAME = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)
DEFAULT_ALIGNMENT = 32
QUANTIZATION_VERSION = 2  # of the packed types' layouts

# Far above any real file. They bound what a small lie in a large file can make us hold as Python objects.
MAX_METADATA_ENTRIES = 2**16
MAX_TENSORS = 2**17
MAX_LIST_ITEMS = 2**22  # strings and inner arrays, over the whole file
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4
MAX_ALIGNMENT = 2**20
MAX_PARTS = 1000

MIN_ENTRY_BYTES = 8 + 4 + 1  # an empty key, a type, a one-byte value
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, a type, an offset
MIN_STRING_BYTES = 8
MIN_ARRAY_BYTES = 4 + 8

BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GgufTensor(msgspec.Struct, frozen=True):
    type: TensorType
    shape: tuple[int, ...]  # slowest dimension first, as torch has it; the file has it the other way round
    offset_bytes: int  # from the start of the file
    num_bytes: int


class GgufFile:
    """A mapped GGUF file, or all parts of one that was split, by the first of them.

    ``metadata`` has numbers, bools, strings; arrays of numbers are numpy arrays (views of the file), others are lists.
    Raises ModelNotFound, BadCheckpoint for a damaged file, Unsupported for a variant or tensor type that we cannot read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = _read_part(path)
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
    data = _map(path)
    cursor = _Cursor(path, data)
    _, num_entries = _read_header(cursor)
    metadata = _read_metadata(cursor, num_entries)
    if metadata.get("split.count", 1) > 1:
        raise Unsupported(f"{path} is one of several parts: its metadata do not stand alone, merge the parts first")
    head = bytearray(data[: cursor.position])
    head[NUM_TENSORS_AT : NUM_TENSORS_AT + 8] = bytes(8)
    return bytes(head)


def short(value: object) -> str:
    """One line for an error message, whatever the file says."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _FilePart(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: Bytes


def _read_part(path: Path) -> _FilePart:
    mapped = _map(path)
    cursor = _Cursor(path, mapped)
    num_tensors, num_entries = _read_header(cursor)
    metadata = _read_metadata(cursor, num_entries)
    tensors = _read_tensors(cursor, num_tensors, _alignment(cursor, metadata))
    return _FilePart(metadata, tensors, np.frombuffer(mapped, dtype=np.uint8))


def _other_parts(path: Path, first: _FilePart) -> Iterator[_FilePart]:
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
        part = _read_part(path.with_name(other))
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


class _Cursor:
    """Walks through the file from its start. Nothing is built from a length before the bytes are known to be there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0
        self.size = len(data)
        self._items_left = MAX_LIST_ITEMS

    def fail(self, problem: str) -> NoReturn:
        raise BadCheckpoint(f"{self.path}: {problem}")

    def take(self, num_bytes: int, what: str) -> int:
        """Steps over ``num_bytes`` and returns where they start."""
        start = self.position
        if num_bytes > self.size - start:
            self.fail(f"{what} needs {num_bytes} bytes at byte {start}, but the file has only {self.size - start} more")
        self.position = start + num_bytes
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.take(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _U64.unpack_from(self.data, self.take(8, what))[0]
        return value

    def count(self, what: str, *, min_item_bytes: int, limit: int = 2**63 - 1) -> int:
        """A number of items of at least ``min_item_bytes`` each, that the rest of the file has room for."""
        count = self.u64(what)
        if count > limit:
            self.fail(f"{what} is {count}, more than the {limit} that any real file has")
        left = self.size - self.position
        if count > left // min_item_bytes:
            self.fail(f"{what} is {count}, but the file has only {left} bytes more")
        return count

    def string(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8")

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, depth=1)
        if kind == BOOL:
            return bool(self.bools(1, what)[0])
        return self.numbers(kind, 1, what)[0].item()

    def array(self, what: str, *, depth: int) -> Any:
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        kind = self.u32(f"the element type of {what}")
        length = f"the length of {what}"
        if kind == STRING:
            return self.strings(self.items(length, MIN_STRING_BYTES), what)
        if kind == ARRAY:
            return [self.array(what, depth=depth + 1) for _ in range(self.items(length, MIN_ARRAY_BYTES))]
        if kind == BOOL:
            return self.bools(self.count(length, min_item_bytes=1), what)
        return self.numbers(kind, self.count(length, min_item_bytes=1), what)

    def items(self, what: str, min_item_bytes: int) -> int:
        """A count of what becomes one Python object each."""
        count = self.count(what, min_item_bytes=min_item_bytes, limit=self._items_left)
        self._items_left -= count
        return count

    def strings(self, count: int, what: str) -> list[str]:
        # A vocabulary has half a million of them, so this is ``string`` without a call and a message for each.
        data, size, position, unpack = self.data, self.size, self.position, _U64.unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    self.fail(f"string {len(found)} of {what} reaches beyond the end of the file")
                found.append(data[start:position].decode("utf-8"))
        except struct.error:
            self.fail(f"the file ends within {what}")
        except UnicodeDecodeError:
            self.fail(f"string {len(found)} of {what} is not valid UTF-8")
        self.position = position
        return found

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray[Any, Any]:
        if kind not in NUMBERS:
            self.fail(f"{what} has the unknown value type {kind}")
        dtype = np.dtype(NUMBERS[kind])
        start = self.take(count * dtype.itemsize, what)
        return np.frombuffer(self.data, dtype=dtype, count=count, offset=start)

    def bools(self, count: int, what: str) -> np.ndarray[Any, Any]:
        raw = np.frombuffer(self.data, dtype=np.uint8, count=count, offset=self.take(count, what))
        if (raw > 1).any():
            self.fail(f"{what} is a bool, but neither 0 nor 1")
        return raw.astype(np.bool_)


def _map(path: Path) -> mmap.mmap:
    if not path.exists():
        raise ModelNotFound(f"{path} does not exist")
    if not path.is_file():
        raise BadCheckpoint(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: mmap refuses an empty file
        raise BadCheckpoint(f"{path} cannot be read: {error}") from None


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries."""
    start = cursor.take(4, "the magic number")
    if cursor.data[start : start + 4] != MAGIC:
        raise BadCheckpoint(f"{cursor.path} {what_head_is(cursor.data[:HEAD_BYTES]) or NO_GGUF}")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
            raise Unsupported(f"{cursor.path}: this is a big-endian GGUF file; only little-endian ones are supported")
        raise Unsupported(f"{cursor.path}: GGUF version {version} is not supported; supported: 2, 3")
    num_tensors = cursor.count("the number of tensors", min_item_bytes=MIN_TENSOR_BYTES, limit=MAX_TENSORS)
    what = "the number of metadata entries"
    return num_tensors, cursor.count(what, min_item_bytes=MIN_ENTRY_BYTES, limit=MAX_METADATA_ENTRIES)


def _read_metadata(cursor: _Cursor, num_entries: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(num_entries):
        key = cursor.string(f"the key of metadata entry {index}")
        if key in metadata:
            cursor.fail(f"metadata key {short(key)} is there twice")
        kind = cursor.u32(f"the type of {short(key)}")
        metadata[key] = cursor.value(kind, short(key))
    return metadata


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        cursor.fail(f"general.alignment is {short(value)}, expected a power of two up to {MAX_ALIGNMENT}")
    return value


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for index in range(num_tensors):
        name = cursor.string(f"the name of tensor {index}")
        if name in tensors:
            cursor.fail(f"tensor {short(name)} is there twice")
        tensors[name] = _read_tensor(cursor, name, alignment)
    data_start = -(-cursor.position // alignment) * alignment
    placed = {
        name: msgspec.structs.replace(tensor, offset_bytes=data_start + tensor.offset_bytes)
        for name, tensor in tensors.items()
    }
    _check_places(cursor, placed, data_start)
    return placed


def _read_tensor(cursor: _Cursor, name: str, alignment: int) -> GgufTensor:
    """With the offset as the file has it, from where the tensors' bytes start."""
    what = f"tensor {short(name)}"
    num_dims = cursor.u32(f"the number of dimensions of {what}")
    if not 1 <= num_dims <= MAX_DIMS:
        cursor.fail(f"{what} has {num_dims} dimensions, expected 1 to {MAX_DIMS}")
    shape = tuple(cursor.u64(f"the dimensions of {what}") for _ in range(num_dims))[::-1]
    if min(shape) < 1 or prod(shape) >= 2**63:
        cursor.fail(f"{what} has the impossible shape {list(shape)}")
    kind = _tensor_type(cursor, what)
    offset = cursor.u64(f"the offset of {what}")
    if offset % alignment:
        cursor.fail(f"{what} starts at {offset}, which is not a multiple of the alignment {alignment}")
    if shape[-1] % kind.block_elements:
        cursor.fail(
            f"{what} has rows of {shape[-1]}, which {kind.name} cannot hold: its blocks have {kind.block_elements}"
        )
    return GgufTensor(kind, shape, offset, kind.num_bytes(prod(shape)))


def _tensor_type(cursor: _Cursor, what: str) -> TensorType:
    number = cursor.u32(f"the type of {what}")
    if number in TYPES:
        return TYPES[number]
    name = OTHER_TYPE_NAMES.get(number)
    supported = ", ".join(kind.name for kind in TYPES.values())
    if name is None:
        raise Unsupported(f"{cursor.path}: {what} has the unknown type {number}; supported: {supported}")
    raise Unsupported(f"{cursor.path}: {what} has the type {name}, which is not supported; supported: {supported}")


def _check_places(cursor: _Cursor, tensors: dict[str, GgufTensor], data_start: int) -> None:
    """Each tensor lies within the file, and no two share bytes."""
    end, previous = data_start, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset_bytes):
        if tensor.offset_bytes < end:
            cursor.fail(f"tensors {short(previous)} and {short(name)} overlap")
        end, previous = tensor.offset_bytes + tensor.num_bytes, name
        if end > cursor.size:
            cursor.fail(f"tensor {short(name)} ends at byte {end}, but the file has {cursor.size}; is it cut off?")
