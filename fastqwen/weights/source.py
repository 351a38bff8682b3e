"""What a model is built from: named tensors of expected shapes, wherever they come from."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fastqwen.errors import BadCheckpoint
from fastqwen.kernels import CodedWeight
from fastqwen.sharding import Part


class TensorFile(Protocol):
    """A checkpoint on disk. ``location(name)`` is the file that an error about a tensor should name."""

    def names(self) -> list[str]: ...

    def location(self, name: str) -> str: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """The tensor, or part of it, in the file's own type, or float32 where that type is packed; a view of the file if
        possible. Nothing else of the file is read."""


@runtime_checkable
class CodedFile(Protocol):
    """A TensorFile that may hold matrices as small whole numbers: see fastqwen/weights/gguf_checkpoint.py."""

    def codes(self, name: str) -> CodedWeight | None: ...

    def rows(self, name: str) -> Callable[[Tensor], Tensor] | None: ...


class Weights:
    """Tensors for one device and type. Raises BadCheckpoint, naming file and tensor, for what is missing or wrong."""

    _counting = threading.Lock()  # layers may be made side by side

    def __init__(self, file: TensorFile, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.num_bytes = 0  # of all tensors that were handed out, in the type that they were asked for
        self._file = file
        self._names = set(file.names())
        self._read: set[str] = set()

    def hand_out(self, num_bytes: int) -> None:
        with self._counting:
            self.num_bytes += num_bytes

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str, shape: tuple[int, ...], *, keep_type: bool = False, part: Part | None = None) -> Tensor:
        """A floating-point tensor in this model's type, or in the file's own one: all of it, or a part."""
        found = self.raw(name, shape, part)
        if not found.is_floating_point():
            raise self.fault(name, f"holds {_type_name(found)}, expected floating-point numbers")
        found = found.to(device=self.device, dtype=found.dtype if keep_type else self.dtype)
        if not _is_finite(found):
            raise self.fault(name, "contains NaN or infinity")
        self.hand_out(found.nbytes)
        return found

    def words(self, name: str, shape: tuple[int, ...], *, part: Part | None = None) -> Tensor:
        """An int32 tensor on this model's device."""
        found = self.raw(name, shape, part)
        if found.dtype != torch.int32:
            raise self.fault(name, f"holds {_type_name(found)}, expected 32-bit whole numbers")
        self.hand_out(found.nbytes)
        return found.to(self.device)

    def eighths(self, name: str, shape: tuple[int, ...], *, part: Part | None = None) -> Tensor:
        """A tensor of 8-bit floating-point numbers (float8_e4m3fn) on this model's device."""
        found = self.raw(name, shape, part)
        if found.dtype != torch.float8_e4m3fn:
            raise self.fault(name, f"holds {_type_name(found)}, expected float8_e4m3fn")
        found = found.to(self.device)
        if not _is_finite(found):
            raise self.fault(name, "contains NaN or infinity")
        self.hand_out(found.nbytes)
        return found

    def scales(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Scales of a matrix, float32; [1, 1] and [n, 1] may be [] or [1] and [n] in the file."""
        found = self.shape(name)
        short = shape[: 1 if shape[-1] == 1 else None]
        if found in (short, ()) and found != shape and math.prod(found) == math.prod(shape):
            return self.tensor(name, found, keep_type=True).float().view(shape)
        return self.tensor(name, shape, keep_type=True).float()

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises BadCheckpoint if there is no such tensor."""
        if name not in self._names:
            raise self._missing(name)
        return self._file.shape(name)

    def height(self, name: str) -> int | None:
        """A tensor's first size; None where it is made up, and has whichever is asked for."""
        return self.shape(name)[0]

    def codes(self, name: str, shape: tuple[int, int]) -> CodedWeight | None:
        """A matrix as small whole numbers; None where the file does not hold it so."""
        if not isinstance(self._file, CodedFile):
            return None
        self._check(name, shape)
        found = self._file.codes(name)
        if found is None:
            return None
        numbers = [one for one in (found.scales, found.minima) if one is not None]
        if not all(map(_is_finite, numbers)):
            raise self.fault(name, "contains NaN or infinity")
        return found

    def rows(self, name: str, shape: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
        """How to read some rows of a matrix that stays in its file, as float32; None where the file does not hold it so."""
        if not isinstance(self._file, CodedFile):
            return None
        self._check(name, shape)
        return self._file.rows(name)

    def is_same(self, name: str, other: str, shape: tuple[int, ...]) -> bool:
        """Whether two tensors of one shape hold the same numbers."""
        return torch.equal(self.raw(name, shape), self.raw(other, shape))

    def zeros(self, size: int) -> Tensor:
        """A vector that the checkpoint does not have, [size]"""
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    def fault(self, name: str, what: str) -> BadCheckpoint:
        """The error for a tensor that cannot be right."""
        return BadCheckpoint(f"{self._file.location(name)}: tensor {name} {what}")

    def raw(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """A tensor in the file's own type, on the CPU, possibly a view of the mapped file. ``shape`` is the whole one's."""
        self._check(name, shape)
        return self._file.read(name, part)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """That the file has such a tensor, which is read now."""
        found = self.shape(name)
        self._read.add(name)
        if found != shape:
            raise self.fault(name, f"has shape {list(found)}, config.json says {list(shape)}")

    def _missing(self, name: str) -> BadCheckpoint:
        file = self._file.location(name)
        base = name.removesuffix(".weight")
        if f"{base}.qweight" in self._names:
            return BadCheckpoint(
                f"{file}: {base} is packed ({base}.qweight), which config.json does not say, or not supported there"
            )
        longer = next((other for other in sorted(self._names) if other.endswith(f".{name}")), None)
        if longer is None:
            return BadCheckpoint(f"{file}: tensor {name} is missing{self._in_place_of(base)}")
        prefix = longer.removesuffix(name)
        return BadCheckpoint(
            f"{file}: tensor {name} is missing, but {longer} is there: the names have a foreign prefix {prefix!r}"
            f"{FOREIGN_PREFIXES.get(prefix, '')}; save the model again without it"
        )

    def _in_place_of(self, base: str) -> str:
        """What else a file may hold instead of a module's weight."""
        parent = base.rpartition(".")[0]
        joined = tuple(f"{parent}.{word}." for word in JOINED)
        for other in sorted(self._names):
            if other.startswith((f"{base}.base_layer.", f"{base}.lora_")):
                return f", but {other} is there: an adapter (LoRA) was saved that is not merged into the model; merge it first"
            if other.startswith((f"{base}.", *joined)) and not other.endswith(".bias"):
                return f", but {other} is there, which is another program's layout"
        return ""

    def unread(self) -> list[str]:
        """Tensors of the file that nobody asked for, but for those that are known to mean nothing."""
        return sorted(name for name in self._names - self._read if not KNOWN_EXTRAS.search(name))

    def location(self, name: str) -> str:
        return self._file.location(name)

    def skip(self, name: str) -> None:
        """Counts as read, for it changes nothing of what is computed, whether it is there or not."""
        self._read.add(name)

    def is_of_bytes(self, name: str) -> bool:
        """Whether a tensor is there and its numbers have 8 bits."""
        return self.has(name) and self._file.read(name).element_size() == 1

    def is_zero(self, name: str) -> bool:
        return not bool(self._file.read(name).float().any())


# What other programs call queries, keys and values, or gate and up, in one matrix.
JOINED = ("qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "W_pack", "qkv", "wqkv")
# What other programs put in front of all names.
FOREIGN_PREFIXES = {
    "_orig_mod.": " (torch.compile's)",
    "module.": " (torch's DataParallel)",
    "_fsdp_wrapped_module.": " (torch's FSDP)",
    "base_model.model.": " (PEFT's)",
    "language_model.": " (a model with a vision part)",
}
# Buffers that older versions saved, which follow from config.json; and what scales an 8-bit cache that others fill with keys
# and values as they are.
KNOWN_EXTRAS = re.compile(
    r"\.(k_scale|v_scale|[kv]_proj\.output_scale)$|rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(masked_bias|rope\.freqs)$"
)


def cut(tensor: Tensor, part: Part | None) -> Tensor:
    """A part of a tensor that is there as a whole, contiguous; a view of it where that can be."""
    if part is None:
        return tensor
    pieces = [_lines(tensor, part.dim, start, stop) for start, stop in part.ranges]
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=part.dim)


def _lines(tensor: Tensor, dim: int, start: int, stop: int) -> Tensor:
    if start >= 0:
        return tensor.narrow(dim, start, stop - start)
    return tensor.new_zeros((*tensor.shape[:dim], stop - start, *tensor.shape[dim + 1 :]))


def _is_finite(tensor: Tensor) -> bool:
    """torch has no arithmetic on numbers of 8 bits."""
    return bool(torch.isfinite(tensor.half() if tensor.element_size() == 1 else tensor).all())


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class DummyWeights(Weights):
    """Random weights of any shape, for benchmarks: small enough that no activation overflows."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype = dtype
        self.device = device
        self.num_bytes = 0
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def has(self, name: str) -> bool:
        return not name.endswith((".bias", ".g_idx"))

    def is_same(self, name: str, other: str, shape: tuple[int, ...]) -> bool:
        return True

    def codes(self, name: str, shape: tuple[int, int]) -> CodedWeight | None:
        return None

    def rows(self, name: str, shape: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
        return None

    def height(self, name: str) -> int | None:
        return None

    def unread(self) -> list[str]:
        return []

    def skip(self, name: str) -> None:
        pass

    def is_of_bytes(self, name: str) -> bool:
        return False

    def tensor(self, name: str, shape: tuple[int, ...], *, keep_type: bool = False, part: Part | None = None) -> Tensor:
        dtype = torch.float16 if keep_type else self.dtype
        out = torch.empty(shape if part is None else part.shape(shape), dtype=dtype, device=self.device)
        self.hand_out(out.nbytes)
        if len(shape) == 1 and not name.endswith(".bias"):
            return out.fill_(1.0)
        spread = 2e-4 if name.endswith(".scales") else 0.02  # scales are multiplied by codes of up to 8 bits
        return out.normal_(0.0, spread, generator=self._generator)

    def eighths(self, name: str, shape: tuple[int, ...], *, part: Part | None = None) -> Tensor:
        out = torch.empty(shape if part is None else part.shape(shape), dtype=torch.float16, device=self.device)
        out = out.normal_(0.0, 32.0, generator=self._generator).to(torch.float8_e4m3fn)
        self.hand_out(out.nbytes)
        return out

    def scales(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.full(shape, 6e-4, dtype=torch.float32, device=self.device)

    def words(self, name: str, shape: tuple[int, ...], *, part: Part | None = None) -> Tensor:
        out = torch.zeros(shape if part is None else part.shape(shape), dtype=torch.int32, device=self.device)
        self.hand_out(out.nbytes)
        if name.endswith(".g_idx"):
            return out
        if name.endswith(".qzeros"):
            return out.fill_(0x77777777)  # the middle of 4 bits minus one: what most checkpoints hold
        return out.random_(-(2**31), 2**31 - 1, generator=self._generator)
