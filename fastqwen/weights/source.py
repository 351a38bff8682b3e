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
        self.num_bytes = 0  # of all tensors that were handed out, in the type that they were asked for
        self._file = file
        self._names = set(file.names())

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str, shape: tuple[int, ...], *, keep_type: bool = False) -> Tensor:
        """A floating-point tensor in this model's type, or in the file's own one."""
        found = self.raw(name, shape)
        if not found.is_floating_point():
            raise BadCheckpoint(
                f"{self._file.location(name)}: tensor {name} holds {_type_name(found)}, expected floating-point numbers"
            )
        found = found.to(device=self.device, dtype=found.dtype if keep_type else self.dtype)
        if not bool(torch.isfinite(found).all()):
            raise BadCheckpoint(f"{self._file.location(name)}: tensor {name} contains NaN or infinity")
        self.num_bytes += found.nbytes
        return found

    def words(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """An int32 tensor on this model's device."""
        found = self.raw(name, shape)
        if found.dtype != torch.int32:
            raise BadCheckpoint(
                f"{self._file.location(name)}: tensor {name} holds {_type_name(found)}, expected 32-bit whole numbers"
            )
        self.num_bytes += found.nbytes
        return found.to(self.device)

    def fault(self, name: str, what: str) -> BadCheckpoint:
        """The error for a tensor whose values cannot be right."""
        return BadCheckpoint(f"{self._file.location(name)}: tensor {name} {what}")

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

    def tensor(self, name: str, shape: tuple[int, ...], *, keep_type: bool = False) -> Tensor:
        dtype = torch.float16 if keep_type else self.dtype
        out = torch.empty(shape, dtype=dtype, device=self.device)
        self.num_bytes += out.nbytes
        if len(shape) == 1 and not name.endswith(".bias"):
            return out.fill_(1.0)
        spread = 2e-4 if name.endswith(".scales") else 0.02  # scales are multiplied by codes of up to 8 bits
        return out.normal_(0.0, spread, generator=self._generator)

    def words(self, name: str, shape: tuple[int, ...]) -> Tensor:
        out = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.num_bytes += out.nbytes
        if name.endswith(".g_idx"):
            return out
        return out.random_(-(2**31), 2**31 - 1, generator=self._generator)

    def raw(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.tensor(name, shape)
