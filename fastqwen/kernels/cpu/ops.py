"""The Ops table on a CPU: C++ kernels through ctypes. Activations are float32 whatever the weights are."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastqwen.kernels import AttentionParts, DenseWeight, HeadShape, LayerCache, Norm, StepTokens
from fastqwen.kernels.reference import ReferenceOps

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "fq_linear": [_P, _P, _P, _P, _L, _L, _L, _I, _I],
    "fq_rms_norm": [_P, _P, _P, _L, _L, _F, _I],
    "fq_silu_mul": [_P, _P, _L, _L],
    "fq_rope_and_cache": [_P, _L, _P, _P, _P, _P, _P, _L, _P, _P, _F, _P, _P, _P, _L, _L, _L, _L, _L, _L, _I, _I],
    "fq_attention": [_P, _P, _P, _P, _P, _P, _L, _P, _L, _L, _L, _L, _L, _L, _L, _I],
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

    def linear(self, x: Tensor, weight: DenseWeight) -> Tensor:
        out = torch.empty((x.shape[0], weight.weight.shape[0]))
        self._call_linear(x, weight, out, accumulate=0)
        return out

    def linear_add(self, residual: Tensor, x: Tensor, weight: DenseWeight) -> None:
        assert residual.is_contiguous()
        self._call_linear(x, weight, residual, accumulate=1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, double = gate_up.shape
        out = torch.empty((rows, double // 2))
        self._calls["fq_silu_mul"](gate_up.data_ptr(), out.data_ptr(), rows, double // 2)
        return out

    def attend(self, qkv: Tensor, step: StepTokens, cache: LayerCache, parts: AttentionParts) -> Tensor:
        if cache.k.dtype not in _TYPES:  # the plain ops know every type of cache
            return super().attend(qkv, step, cache, parts)
        tokens, shape, window = qkv.shape[0], parts.shape, parts.window or 0
        assert qkv.stride(1) == 1 and cache.k_scale is None
        q = torch.empty((tokens, shape.num_heads * shape.head_dim))
        out = torch.empty_like(q)
        caches = cache.k.data_ptr(), cache.v.data_ptr()
        places = _places(step)
        sizes = _sizes(shape, cache)
        norms = _pointer(parts.q_norm), _pointer(parts.k_norm), parts.eps
        norm_type = 0 if parts.q_norm is None else _TYPES[parts.q_norm.dtype]
        turns = step.cos_sin.data_ptr(), _pointer(step.q_scale)
        self._calls["fq_rope_and_cache"](
            qkv.data_ptr(), qkv.stride(0), *turns, *places, *norms, *caches, q.data_ptr(), tokens, *sizes, norm_type,
            _TYPES[cache.k.dtype],
        )  # fmt: skip
        self._calls["fq_attention"](
            q.data_ptr(), *caches, *places, out.data_ptr(), tokens, window, *sizes, _TYPES[cache.k.dtype]
        )
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


def _places(step: StepTokens) -> tuple[int, int, int, int]:
    tables = step.block_tables
    return step.positions.data_ptr(), step.slots.data_ptr(), tables.data_ptr(), tables.shape[1]


def _sizes(shape: HeadShape, cache: LayerCache) -> tuple[int, ...]:
    return shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rotary_dim, cache.k.shape[2]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
