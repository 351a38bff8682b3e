"""What stands in a GGUF file, versions 2 and 3: metadata, and where tensors are. A file is not trusted: each count is
checked before it is believed.

Layout (ggml's docs/gguf.md): magic, version, number of tensors and of metadata entries; the entries (key, type, value); the
tensors' names, dimensions, types and offsets; padding; the tensors' bytes. Everything is little endian.
"""

from __future__ import annotations

import mmap
import struct
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np

from fastqwen.errors import BadCheckpoint, ModelNotFound, Unsupported
from fastqwen.text_files import HEAD_BYTES, is_safetensors, what_head_is
from fastqwen.weights.gguf_types import OTHER_TYPE_NAMES, TYPES, Bytes, TensorType
from fastqwen.weights.refusals import check_finished

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUM_TENSORS_AT = 8  # behind magic number and version
NO_GGUF = "is not a GGUF file: it does not begin with 'GGUF'"
OLDER = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # ggml, ggmf, ggjt, ggla: llama.cpp's formats until August 2023
FETCH = "; if its download was cut off, fetch this file again"
DEFAULT_ALIGNMENT = 32

# Far above any real file. They bound what a small lie in a large file can make us hold as Python objects.
MAX_METADATA_ENTRIES = 2**16
MAX_TENSORS = 2**17
MAX_LIST_ITEMS = 2**22  # strings and inner arrays, over the whole file
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4
MAX_ALIGNMENT = 2**20

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


def short(value: object) -> str:
    """One line for an error message, whatever the file says."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class FilePart(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: Bytes


def read_part(path: Path) -> FilePart:
    """A start asks a file for its sizes, its tensors and its tokenizer: what was just read is not read again."""
    try:
        now = path.stat()
    except OSError:
        return _read_part(path, ())  # says what is wrong with it
    return _read_part(path, (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))


@lru_cache(maxsize=1)
def _read_part(path: Path, identity: tuple[int, ...]) -> FilePart:
    mapped = _map(path)
    cursor = _Cursor(path, mapped)
    num_tensors, num_entries = _read_header(cursor)
    metadata = _read_metadata(cursor, num_entries)
    tensors = _read_tensors(cursor, num_tensors, _alignment(cursor, metadata))
    return FilePart(metadata, tensors, np.frombuffer(mapped, dtype=np.uint8))


def read_head(path: Path) -> tuple[dict[str, Any], bytes]:
    """The metadata, and the bytes of a file that has them and no tensors."""
    data = _map(path)
    cursor = _Cursor(path, data)
    _, num_entries = _read_header(cursor)
    metadata = _read_metadata(cursor, num_entries)
    head = bytearray(data[: cursor.position])
    head[NUM_TENSORS_AT : NUM_TENSORS_AT + 8] = bytes(8)
    return metadata, bytes(head)


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
            self.fail(
                f"{what} needs {num_bytes} bytes at byte {start}, but the file has only {self.size - start} more{FETCH}"
            )
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
            self.fail(f"{what} is {count}, but the file has only {left} bytes more{FETCH}")
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
                    self.fail(f"string {len(found)} of {what} reaches beyond the end of the file{FETCH}")
                found.append(data[start:position].decode("utf-8"))
        except struct.error:
            self.fail(f"the file ends within {what}{FETCH}")
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
    check_finished(path)
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: mmap refuses an empty file
        raise BadCheckpoint(f"{path} cannot be read: {error}") from None


def _read_header(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries."""
    start = cursor.take(4, "the magic number")
    if cursor.data[start : start + 4] != MAGIC:
        raise _no_gguf(cursor.path, cursor.data[:HEAD_BYTES])
    version = cursor.u32("the version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
            raise Unsupported(f"{cursor.path}: this is a big-endian GGUF file; only little-endian ones are supported")
        raise Unsupported(f"{cursor.path}: GGUF version {version} is not supported; supported: 2, 3")
    num_tensors = cursor.count("the number of tensors", min_item_bytes=MIN_TENSOR_BYTES, limit=MAX_TENSORS)
    what = "the number of metadata entries"
    return num_tensors, cursor.count(what, min_item_bytes=MIN_ENTRY_BYTES, limit=MAX_METADATA_ENTRIES)


def _no_gguf(path: Path, head: bytes) -> BadCheckpoint:
    if head.startswith(OLDER):
        return Unsupported(f"{path} is in a format from before GGUF, which is not read: convert the model again")
    if is_safetensors(head):
        return BadCheckpoint(
            f"{path} is a safetensors file under a name of GGUF: give the folder of the model it belongs to"
        )
    return BadCheckpoint(f"{path} {what_head_is(head) or NO_GGUF}")


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
            cursor.fail(f"tensor {short(name)} ends at byte {end}, but the file has {cursor.size}{FETCH}")
