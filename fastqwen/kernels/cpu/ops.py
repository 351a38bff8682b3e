"""The Ops table on a CPU: C++ kernels through ctypes. Activations are float32 whatever the weights are."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastqwen.kernels import AttentionBatch, HeadShape, LayerCache
from fastqwen.kernels.reference import ReferenceOps

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "fq_linear": [_P, _P, _P, _P, _L, _L, _L, _I, _I],
    "fq_rms_norm": [_P, _P, _P, _L, _L, _F, _I],
    "fq_silu_mul": [_P, _P, _L, _L],
    "fq_rope_and_cache": [_P, _P, _P, _P, _P, _P, _F, _P, _P, _P, _L, _L, _L, _L, _L, _I, _I],
    "fq_attention": [_P, _P, _P, _P, _P, _P, _L, _P, _L, _L, _L, _L, _L, _L, _I],
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

    def activation_dtype(self, weights_dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return super().embed(ids, table).float()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._calls["fq_rms_norm"](
            x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.numel() // size, size, eps, _TYPES[weight.dtype]
        )
        return out

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = torch.empty((x.shape[0], weight.shape[0]))
        self._call_linear(x, weight, bias, out, accumulate=0)
        return out

    def linear_add(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        assert residual.is_contiguous()
        self._call_linear(x, weight, bias, residual, accumulate=1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, double = gate_up.shape
        out = torch.empty((rows, double // 2))
        self._calls["fq_silu_mul"](gate_up.data_ptr(), out.data_ptr(), rows, double // 2)
        return out

    def rope_and_cache(
        self,
        qkv: Tensor,
        batch: AttentionBatch,
        cache: LayerCache,
        shape: HeadShape,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
    ) -> Tensor:
        tokens = qkv.shape[0]
        assert batch.rows is not None
        q = torch.empty((tokens, shape.num_heads, shape.head_dim))
        self._calls["fq_rope_and_cache"](
            qkv.data_ptr(),
            batch.cos_sin.data_ptr(),
            _pointer(batch.q_scale),
            batch.rows.cache_slots.data_ptr(),
            _pointer(q_norm),
            _pointer(k_norm),
            eps,
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            q.data_ptr(),
            tokens,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            cache.k.shape[2],
            0 if q_norm is None else _TYPES[q_norm.dtype],
            _TYPES[cache.k.dtype],
        )
        return q

    def attention(
        self, q: Tensor, batch: AttentionBatch, cache: LayerCache, shape: HeadShape, window: int | None
    ) -> Tensor:
        out = torch.empty((q.shape[0], shape.num_heads * shape.head_dim))
        self._calls["fq_attention"](
            q.data_ptr(),
            cache.k.data_ptr(),
            cache.v.data_ptr(),
            batch.positions.data_ptr(),
            batch.token_tables.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            out.data_ptr(),
            q.shape[0],
            window or 0,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            cache.k.shape[2],
            _TYPES[cache.k.dtype],
        )
        return out

    def _call_linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, accumulate: int) -> None:
        x = x.contiguous()
        assert x.dtype == torch.float32 and weight.is_contiguous() and x.shape[1] == weight.shape[1]
        if bias is not None and bias.dtype != weight.dtype:
            bias = bias.to(weight.dtype)
        self._linear(
            x.data_ptr(),
            weight.data_ptr(),
            _pointer(bias),
            out.data_ptr(),
            x.shape[0],
            weight.shape[1],
            weight.shape[0],
            _TYPES[weight.dtype],
            accumulate,
        )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
