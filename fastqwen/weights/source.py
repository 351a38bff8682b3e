"""What a model is built from: named tensors of expected shapes, wherever they come from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastqwen.errors import BadCheckpoint


class TensorFile(Protocol):
    """A checkpoint on disk. ``location(name)`` is the file that an error about a tensor should name."""

    def names(self) -> list[str]: ...

    def location(self, name: str) -> str: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor:
        """The tensor in the file's own type, or float32 where that type is packed; a view of the file if possible."""


class Weights:
    """Tensors for one device and type. Raises BadCheckpoint, naming file and tensor, for what is missing or wrong."""

    def __init__(self, file: TensorFile, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._file = file
        self._names = set(file.names())

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A floating-point tensor in this model's type."""
        found = self.raw(name, shape).to(device=self.device, dtype=self.dtype)
        if not bool(torch.isfinite(found).all()):
            raise BadCheckpoint(f"{self._file.location(name)}: tensor {name} contains NaN or infinity")
        return found

    def raw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor in the file's own type, on the CPU, possibly a view of the mapped file."""
        if name not in self._names:
            raise BadCheckpoint(f"{self._file.location('')}: tensor {name} is missing")
        found = self._file.shape(name)
        if found != shape:
            raise BadCheckpoint(
                f"{self._file.location(name)}: tensor {name} has shape {list(found)}, config.json says {list(shape)}"
            )
        return self._file.read(name)


class DummyWeights(Weights):
    """Random weights of any shape, for benchmarks: small enough that no activation overflows."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator(device=device).manual_seed(seed)

    def has(self, name: str) -> bool:
        return not name.endswith((".bias", ".g_idx"))

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1 and not name.endswith(".bias"):
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        return out.normal_(0.0, 0.02, generator=self._generator)

    def raw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name.endswith((".qweight", ".qzeros")):
            return torch.randint(
                -(2**31), 2**31 - 1, shape, dtype=torch.int32, device=self.device, generator=self._generator
            )
        return self.tensor(name, shape)
