"""Matrices of 8-bit floating-point numbers as scaled.cpp reads them: as they lie in the file."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from fastqwen.kernels import Norm, ScaledWeight

SIGNATURES = {
    "fq_scaled_product": [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int],
}


class _Matrix(ctypes.Structure):
    """scaled.cpp's Scaled."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("numbers", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "height", "width")),
    ]


class ScaledProduct:
    """A Product (see kernels/__init__.py) of float32 activations. Nothing is rounded."""

    def __init__(
        self,
        weight: ScaledWeight,
        *,
        product: Callable[..., None],  # fq_scaled_product
        rms_norm: Callable[[Tensor, Norm], Tensor],
        silu_mul: Callable[[Tensor], Tensor],
    ) -> None:
        bias = None if weight.bias is None else weight.bias.float().contiguous()
        self._tensors = weight.numbers.contiguous(), weight.scales.contiguous(), bias
        self._matrix = _Matrix(
            *(None if tensor is None else tensor.data_ptr() for tensor in self._tensors),
            *(weight.in_size, weight.out_size, *weight.block),
        )
        self._header = ctypes.byref(self._matrix)
        self._product, self._rms_norm, self._silu_mul = product, rms_norm, silu_mul
        self.num_bytes = sum(tensor.nbytes for tensor in self._tensors if tensor is not None)

    def reads_norm(self, norm: Norm, x: Tensor) -> bool:
        return True

    def plain(self, x: Tensor) -> Tensor:
        out = torch.empty((x.shape[0], self._matrix.outputs))
        self._call(x, out, add=False)
        return out

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self.plain(self._rms_norm(x, norm))

    def gated_of_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return self._silu_mul(self.of_norm(x, norm))

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        assert residual.is_contiguous()
        self._call(x, residual, add=True)

    def _call(self, x: Tensor, out: Tensor, *, add: bool) -> None:
        x = x.contiguous()
        assert x.dtype == torch.float32 and x.shape[1] == self._matrix.inputs
        self._product(self._header, x.data_ptr(), out.data_ptr(), x.shape[0], add)
