"""What a model is built from: named tensors of expected shapes, wherever they come from."""

from __future__ import annotations

import re
from typing import Protocol

import torch
from torch import Tensor

from fastqwen.errors import BadCheckpoint
from fastqwen.sharding import Part


class TensorFile(Protocol):
    """A checkpoint on disk. ``location(name)`` is the file that an error about a tensor should name."""

    def names(self) -> list[str]: ...

    def location(self, name: str) -> str: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """The tensor, or part of it, in the file's own type, or float32 where that type is packed; a view of the file if
        possible. Nothing else of the file is read; a part's lines behind the end are left out."""


class Weights:
    """Tensors for one device and type. Raises BadCheckpoint, naming file and tensor, for what is missing or wrong."""

    def __init__(self, file: TensorFile, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self.num_bytes = 0  # of all tensors that were handed out, in the type that they were asked for
        self._file = file
        self._names = set(file.names())
        self._read: set[str] = set()

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
        self.num_bytes += found.nbytes
        return found

    def words(self, name: str, shape: tuple[int, ...], *, part: Part | None = None) -> Tensor:
        """An int32 tensor on this model's device."""
        found = self.raw(name, shape, part)
        if found.dtype != torch.int32:
            raise self.fault(name, f"holds {_type_name(found)}, expected 32-bit whole numbers")
        self.num_bytes += found.nbytes
        return found.to(self.device)

    def is_same(self, name: str, other: str, shape: tuple[int, ...]) -> bool:
        """Whether two tensors of one shape hold the same numbers."""
        return torch.equal(self.raw(name, shape), self.raw(other, shape))

    def zeros(self, size: int) -> Tensor:
        """A vector that the checkpoint does not have, [size]"""
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    @staticmethod
    def lines(tensor: Tensor, part: Part) -> Tensor:
        """A part of a tensor that was read as a whole; lines behind its end are zeros."""
        return _with_zeros(cut(tensor, part), part)

    def fault(self, name: str, what: str) -> BadCheckpoint:
        """The error for a tensor that cannot be right."""
        return BadCheckpoint(f"{self._file.location(name)}: tensor {name} {what}")

    def raw(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """A tensor in the file's own type, on the CPU, possibly a view of the mapped file. ``shape`` is the whole one's."""
        if name not in self._names:
            raise self._missing(name)
        self._read.add(name)
        found = self._file.shape(name)
        if found != shape:
            raise self.fault(name, f"has shape {list(found)}, config.json says {list(shape)}")
        read = self._file.read(name, part)
        return read if part is None else _with_zeros(read, part)

    def _missing(self, name: str) -> BadCheckpoint:
        file = self._file.location(name)
        base = name.removesuffix(".weight")
        if f"{base}.qweight" in self._names:
            return BadCheckpoint(
                f"{file}: {base} is packed ({base}.qweight), which config.json does not say, or not supported there"
            )
        longer = next((other for other in self._names if other.endswith(f".{name}")), None)
        if longer is None:
            return BadCheckpoint(f"{file}: tensor {name} is missing")
        prefix = longer.removesuffix(name)
        return BadCheckpoint(
            f"{file}: tensor {name} is missing, but {longer} is there: the names have a foreign prefix {prefix!r}"
            f"{FOREIGN_PREFIXES.get(prefix, '')}; save the model again without it"
        )

    def unread(self) -> list[str]:
        """Tensors of the file that nobody asked for, but for those that are known to mean nothing."""
        return sorted(name for name in self._names - self._read if not KNOWN_EXTRAS.search(name))

    def location(self, name: str) -> str:
        return self._file.location(name)

    def is_zero(self, name: str) -> bool:
        return not bool(self._file.read(name).any())


# What other programs put in front of all names.
FOREIGN_PREFIXES = {
    "_orig_mod.": " (torch.compile's)",
    "module.": " (torch's DataParallel)",
    "base_model.model.": " (PEFT's)",
    "language_model.": " (a model with a vision part)",
}
# Buffers that older versions saved, which follow from config.json.
KNOWN_EXTRAS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(masked_bias|rope\.freqs)$")


def cut(tensor: Tensor, part: Part | None) -> Tensor:
    """The part's lines that the tensor has."""
    if part is None:
        return tensor
    size = tensor.shape[part.dim]
    pieces = [
        tensor.narrow(part.dim, start, min(stop, size) - start) for start, stop in part.ranges if start < size
    ] or [tensor.narrow(part.dim, 0, 0)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=part.dim)


def _with_zeros(found: Tensor, part: Part) -> Tensor:
    """What is behind the end of the file's tensor is the end of the part, too: ranges are in order."""
    missing = part.size - found.shape[part.dim]
    if not missing:
        return found
    shape = (*found.shape[: part.dim], missing, *found.shape[part.dim + 1 :])
    return torch.cat([found, torch.zeros(shape, dtype=found.dtype, device=found.device)], dim=part.dim)


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

    def unread(self) -> list[str]:
        return []

    def tensor(self, name: str, shape: tuple[int, ...], *, keep_type: bool = False, part: Part | None = None) -> Tensor:
        dtype = torch.float16 if keep_type else self.dtype
        out = torch.empty(shape if part is None else part.shape(shape), dtype=dtype, device=self.device)
        self.num_bytes += out.nbytes
        if len(shape) == 1 and not name.endswith(".bias"):
            return out.fill_(1.0)
        spread = 2e-4 if name.endswith(".scales") else 0.02  # scales are multiplied by codes of up to 8 bits
        return out.normal_(0.0, spread, generator=self._generator)

    def words(self, name: str, shape: tuple[int, ...], *, part: Part | None = None) -> Tensor:
        out = torch.zeros(shape if part is None else part.shape(shape), dtype=torch.int32, device=self.device)
        self.num_bytes += out.nbytes
        if name.endswith(".g_idx"):
            return out
        if name.endswith(".qzeros"):
            return out.fill_(0x77777777)  # the middle of 4 bits minus one: what most checkpoints hold
        return out.random_(-(2**31), 2**31 - 1, generator=self._generator)
