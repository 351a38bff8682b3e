"""The Ops table on a CPU: C++ kernels through ctypes. Activations are float32 whatever the weights are."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from fastqwen.kernels import (
    AttentionParts,
    CodedWeight,
    DenseWeight,
    GroupedWeight,
    LayerCache,
    Norm,
    Product,
    ScaledWeight,
    StepTokens,
)
from fastqwen.kernels.cpu import packed, scaled
from fastqwen.kernels.cpu.arena import Arena
from fastqwen.kernels.reference import ReferenceOps

_TYPES = packed.TYPES
_CACHE_TYPES = {**_TYPES, torch.int8: 3, torch.float8_e4m3fn: 4}  # in the order of vectors.h
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    **packed.SIGNATURES,
    **scaled.SIGNATURES,
    "fq_set_threads": [_I],
    "fq_linear": [_P, _P, _P, _P, _L, _L, _L, _I, _I],
    "fq_rms_norm": [_P, _P, _P, _L, _L, _F, _I],
    "fq_silu_mul": [_P, _P, _L, _L],
    "fq_attend": [
        _P,
        _L,
        _P,
        _P,
        _P,
        _P,
        _P,
        _L,
        _P,
        _P,
        _F,
        _I,
        _P,
        _P,
        _P,
        _P,
        _I,
        _P,
        _L,
        _L,
        _L,
        _L,
        _L,
        _L,
        _L,
    ],
}


class CpuOps(ReferenceOps):
    """Bits of a row's result do not depend on the other rows, nor on the number of threads."""

    name = "cpu"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._calls = {}
        for name, arguments in _SIGNATURES.items():
            call = getattr(library, name)
            call.argtypes, call.restype = arguments, None
            self._calls[name] = call
        self._linear = self._calls["fq_linear"]
        self._arena = Arena()
        self.set_threads(torch.get_num_threads())

    def set_threads(self, count: int) -> None:
        """How many compute, of the whole process."""
        self._calls["fq_set_threads"](count)

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return super().embed(ids, table).float()

    def activation_dtype(self, weights: torch.dtype) -> torch.dtype:
        return torch.float32

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._calls["fq_rms_norm"](
            x.data_ptr(),
            norm.weight.data_ptr(),
            out.data_ptr(),
            x.numel() // size,
            size,
            norm.eps,
            _TYPES[norm.weight.dtype],
        )
        return out

    def settled(self, weight: DenseWeight) -> DenseWeight:
        """In large pages; a mapped file's are small ones, and the system may take them back once they were copied."""
        return replace(weight, weight=self._arena.copy(weight.weight))

    def linear(self, x: Tensor, weight: DenseWeight) -> Tensor:
        out = torch.empty((x.shape[0], weight.weight.shape[0]))
        self._call_linear(x, weight, out, accumulate=0)
        return out

    def linear_add(self, residual: Tensor, x: Tensor, weight: DenseWeight) -> None:
        assert residual.is_contiguous()
        self._call_linear(x, weight, residual, accumulate=1)

    def packed(self, weight: GroupedWeight | ScaledWeight, dtype: torch.dtype) -> Product | None:
        if isinstance(weight, ScaledWeight):
            product = self._calls["fq_scaled_product"]
            return scaled.ScaledProduct(weight, product=product, rms_norm=self.rms_norm, silu_mul=self.silu_mul)
        if not self.takes_codes(dtype):
            return None
        found = packed.coded(weight)
        return None if found is None else self._product(*found)

    def takes_codes(self, dtype: torch.dtype) -> bool:
        """In float32 nothing is rounded, and these products round the activations."""
        return dtype != torch.float32

    def coded(self, weight: CodedWeight) -> Product:
        return self._product(weight, None)

    def _product(self, weight: CodedWeight, order: Tensor | None) -> Product:
        tiled = packed.tiled(weight, self._calls["fq_pack"], self._arena)
        product = self._calls["fq_packed_product"]
        return packed.TiledProduct(tiled, order, product=product, silu_mul=self.silu_mul)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, double = gate_up.shape
        out = torch.empty((rows, double // 2))
        self._calls["fq_silu_mul"](gate_up.data_ptr(), out.data_ptr(), rows, double // 2)
        return out

    def attend(self, qkv: Tensor, step: StepTokens, cache: LayerCache, parts: AttentionParts) -> Tensor:
        tokens, shape, tables = qkv.shape[0], parts.shape, step.block_tables
        assert qkv.stride(1) == 1
        out = torch.empty((tokens, shape.num_heads * shape.head_dim))
        self._calls["fq_attend"](
            qkv.data_ptr(), qkv.stride(0), step.cos_sin.data_ptr(), _pointer(step.q_scale),
            step.positions.data_ptr(), step.slots.data_ptr(), tables.data_ptr(), tables.shape[1],
            _pointer(parts.q_norm), _pointer(parts.k_norm), parts.eps,
            0 if parts.q_norm is None else _TYPES[parts.q_norm.dtype],
            cache.k.data_ptr(), cache.v.data_ptr(), _pointer(cache.k_scale), _pointer(cache.v_scale),
            _CACHE_TYPES[cache.k.dtype], out.data_ptr(), tokens, parts.window or 0,
            shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rotary_dim, cache.k.shape[2],
        )  # fmt: skip
        return out

    def _call_linear(self, x: Tensor, weight: DenseWeight, out: Tensor, accumulate: int) -> None:
        x, matrix, bias = x.contiguous(), weight.weight, weight.bias
        assert x.dtype == torch.float32 and matrix.is_contiguous() and x.shape[1] == matrix.shape[1]
        if bias is not None and bias.dtype != matrix.dtype:
            bias = bias.to(matrix.dtype)
        self._linear(
            x.data_ptr(), matrix.data_ptr(), _pointer(bias), out.data_ptr(), x.shape[0], matrix.shape[1],
            matrix.shape[0], _TYPES[matrix.dtype], accumulate,
        )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
