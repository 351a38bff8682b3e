"""The Ops table on an NVIDIA GPU: fused Triton kernels for few rows, cuBLAS and Triton together for many."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastqwen.kernels import AttentionBatch, HeadShape, LayerCache
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.kernels.triton import attention, experts, linear, pointwise

MAX_DECODE_PARTS = 16384


class TritonOps(ReferenceOps):
    """Weights and activations have one type. Scratch memory is made on first use, before any graph is captured."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # cuDNN's kernel reached 600 TFLOP/s on an H200 where ours, which reads the paged cache, reaches half of that.
        self._library_prefill = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._linear_space = linear.Workspace(device)
        self._decode_spaces: dict[HeadShape, attention.DecodeWorkspace] = {}

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return pointwise.rms_norm(x, weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[0] > linear.MAX_ROWS:
            return functional.linear(x, weight, bias)
        return linear.skinny_linear(x.contiguous(), weight, self._linear_space, bias=bias)

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[0] > linear.MAX_ROWS:
            return functional.linear(pointwise.rms_norm(x, norm, eps), weight, bias)
        return linear.skinny_linear(x.contiguous(), weight, self._linear_space, norm=norm, eps=eps, bias=bias)

    def norm_gated_linear(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        if x.shape[0] > linear.MAX_ROWS:
            return pointwise.silu_mul(functional.linear(pointwise.rms_norm(x, norm, eps), weight, bias))
        return linear.skinny_linear(
            x.contiguous(), weight, self._linear_space, norm=norm, eps=eps, bias=bias, gated=True
        )

    def linear_add(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if x.shape[0] <= linear.MAX_ROWS:
            linear.skinny_linear(x.contiguous(), weight, self._linear_space, bias=bias, add_to=residual)
            return
        torch.addmm(residual, x, weight.t(), out=residual)
        if bias is not None:
            residual += bias

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return pointwise.silu_mul(gate_up)

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
        return pointwise.rope_and_cache(qkv, batch, cache, shape, q_norm, k_norm, eps)

    def attend(
        self,
        qkv: Tensor,
        batch: AttentionBatch,
        cache: LayerCache,
        shape: HeadShape,
        *,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        window: int | None,
    ) -> Tensor:
        decode = batch.num_decode_rows
        out = torch.empty((qkv.shape[0], shape.num_heads * shape.head_dim), dtype=qkv.dtype, device=qkv.device)
        if decode:
            attention.decode_attention(
                qkv[:decode],
                batch,
                cache,
                shape,
                self._decode_space(shape),
                q_norm=q_norm,
                k_norm=k_norm,
                eps=eps,
                window=window,
                out=out,
            )
        if decode < qkv.shape[0]:
            rest = batch.beyond_decode
            if self._library_prefill and window is None and batch.whole_prompts:
                library_prefill(qkv, batch, cache, shape, q_norm, k_norm, eps, out)
                return out
            q = pointwise.rope_and_cache(qkv[decode:], rest, cache, shape, q_norm, k_norm, eps)
            attention.prefill_attention(
                q, batch, cache, shape, first_row=decode, first_token=decode, window=window, out=out
            )
        return out

    def add_experts(
        self, residual: Tensor, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int, normalize: bool
    ) -> None:
        experts.add_experts(residual, x, logits, gate_up, down, top_k=top_k, normalize=normalize)

    def _decode_space(self, shape: HeadShape) -> attention.DecodeWorkspace:
        if shape not in self._decode_spaces:
            self._decode_spaces[shape] = attention.DecodeWorkspace(
                self._device, max_rows=MAX_DECODE_ROWS, shape=shape, max_parts=MAX_DECODE_PARTS
            )
        return self._decode_spaces[shape]


def library_prefill(
    qkv: Tensor,
    batch: AttentionBatch,
    cache: LayerCache,
    shape: HeadShape,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """Rows that are whole prompts: attention by torch on their own keys and values, which also go to the cache."""
    first, dim, group = batch.num_decode_rows, shape.head_dim, shape.num_heads // shape.num_kv_heads
    qkv = qkv[first:]
    k = torch.empty((qkv.shape[0], shape.num_kv_heads, dim), dtype=qkv.dtype, device=qkv.device)
    q = pointwise.rope_and_cache(qkv, batch.beyond_decode, cache, shape, q_norm, k_norm, eps, k_out=k)
    v = qkv[:, (shape.num_heads + shape.num_kv_heads) * dim :].view(-1, shape.num_kv_heads, dim)
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        for begin, count in batch.whole_prompts:
            rows = slice(begin - first, begin - first + count)
            # Each query head gets a copy of its keys and values: the fast kernel knows no groups, and a copy is cheap.
            row_k, row_v = (part[rows].repeat_interleave(group, dim=1) for part in (k, v))
            row_q, row_k, row_v = (part.transpose(0, 1)[None] for part in (q[rows], row_k, row_v))
            found = functional.scaled_dot_product_attention(row_q, row_k, row_v, is_causal=True)
            out[begin : begin + count] = found[0].transpose(0, 1).flatten(1)


MAX_DECODE_ROWS = 2048
