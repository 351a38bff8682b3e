"""The Ops table on an NVIDIA GPU: fused Triton kernels for few rows, cuBLAS and Triton together for many."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastqwen.kernels import (
    AttentionParts,
    DeltaParts,
    DeltaState,
    DenseWeight,
    ExpertsWeight,
    GroupedWeight,
    HeadShape,
    LayerCache,
    Norm,
    Product,
    ScaledWeight,
    StepTokens,
)
from fastqwen.kernels.cuda.nvrtc import CannotCompile
from fastqwen.kernels.cuda.packed_linear import PackedSpace, make_product
from fastqwen.kernels.limits import FUSED_ROWS, LIBRARY_ATTENTION_CAPABILITY, feed_forward_rows
from fastqwen.kernels.reference import ReferenceOps
from fastqwen.kernels.triton import attention, delta, delta_prompt, linear, pointwise, prefill
from fastqwen.kernels.triton.experts import add_experts, add_experts_of_one
from fastqwen.kernels.triton.launch import card_of
from fastqwen.kernels.triton.workspace import Workspace

log = logging.getLogger(__name__)

LIBRARY_STEP = 512


class TritonOps(ReferenceOps):
    """Weights and activations have one type. Scratch memory is made on first use, before any graph is captured."""

    name = "triton"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._card = card_of(device)
        # cuDNN's kernel reached 450 to 580 TFLOP/s on an H200 where ours, which reads the paged cache, reaches half of it;
        # before 8.0 ours has no tensor cores.
        self.library_prefill = self._card.capability >= LIBRARY_ATTENTION_CAPABILITY or not self._card.has_dots
        self.records_prompts = self._card.has_dots  # a library attends to a prompt only outside of recordings
        self._fused_rows = FUSED_ROWS if self._card.has_dots else 1
        self._linear_space = Workspace(device)
        self._streamed, self._streamed_attention = _streamed_if_they_run(device)
        self._decode_spaces: dict[HeadShape, attention.DecodeWorkspace] = {}
        self._counts: dict[int, Tensor] = {}

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        return pointwise.rms_norm(x, norm)

    def linear(self, x: Tensor, weight: DenseWeight) -> Tensor:
        if x.shape[0] > self._fused_rows:
            return functional.linear(x, weight.weight, weight.bias)
        return self._small(x, weight)

    def norm_linear(self, x: Tensor, norm: Norm, weight: DenseWeight) -> Tensor:
        if x.shape[0] > self._fused_rows:
            return self.linear(pointwise.rms_norm(x, norm), weight)
        return self._small(x, weight, norm=norm)

    def norm_gated_linear(self, x: Tensor, norm: Norm, weight: DenseWeight) -> Tensor:
        if x.shape[0] > self._fused_rows:
            return pointwise.silu_mul(self.norm_linear(x, norm, weight))
        return self._small(x, weight, norm=norm, gated=True)

    def linear_add(self, residual: Tensor, x: Tensor, weight: DenseWeight) -> None:
        if x.shape[0] <= self._fused_rows:
            self._small(x, weight, add_to=residual)
            return
        torch.addmm(residual, x, weight.weight.t(), out=residual)
        if weight.bias is not None:
            residual += weight.bias

    def _small(
        self,
        x: Tensor,
        weight: DenseWeight,
        *,
        norm: Norm | None = None,
        gated: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """Products of at most 64 rows. Of several rows the norm is a kernel of its own: every program would repeat it."""
        x = x.contiguous()
        if x.shape[0] == 1:
            return linear.gemv(x, weight, norm=norm, gated=gated, add_to=add_to)
        if norm is not None:
            x = pointwise.rms_norm(x, norm)
        early = self._streamed
        is_early = early is not None and early.is_faster(x, weight.weight, gated=gated)
        product = early.streamed_linear if early is not None and is_early else linear.skinny_linear
        return product(x, weight, self._linear_space, gated=gated, add_to=add_to)

    def packed(self, weight: GroupedWeight | ScaledWeight, dtype: torch.dtype) -> Product | None:
        return None if self._packed_space is None else make_product(weight, dtype, self._packed_space)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return pointwise.silu_mul(gate_up)

    def attend(self, qkv: Tensor, step: StepTokens, cache: LayerCache, parts: AttentionParts) -> Tensor:
        shape, decode, prompts = parts.shape, step.num_decode_rows, step.prompts
        out = torch.empty((qkv.shape[0], shape.num_heads * shape.head_dim), dtype=qkv.dtype, device=qkv.device)
        if decode:
            early = (one for one in self._streamed_attention if one.takes(qkv, cache, shape))
            kernels = next(early, attention)
            kernels.decode_attention(qkv[:decode], step, cache, parts, self._decode_space(shape), out=out)
        if prompts is None:
            return out
        # A recorded step does not know beforehand where its decode rows end: there the kernel looks.
        first = 0 if step.decode_count is not None else decode
        room = max([qkv.shape[0], *(begin + library_length(count) for begin, count in prompts.fresh)])
        q, k, v = pointwise.rope_and_cache(
            qkv, step, cache, parts, first_token=first, room=room, keep=bool(prompts.fresh)
        )
        prefill.prefill_attention(q, step, cache, parts, self._linear_space, out=out)
        if k is not None and v is not None:
            if not self._card.has_dots:  # there the library has no kernel for keys that several heads share
                k, v = (part.repeat_interleave(shape.group, dim=1) for part in (k, v))
            return fresh_prompts(q, k, v, prompts.fresh, out)
        return out

    def multiply_by_sigmoid(self, x: Tensor, gate: Tensor) -> None:
        delta.multiply_by_sigmoid(x, gate)

    def gated_delta(self, projected: Tensor, step: StepTokens, state: DeltaState, parts: DeltaParts) -> Tensor:
        size = (projected.shape[0], parts.shape.value_size)
        out = torch.empty(size, dtype=projected.dtype, device=projected.device)
        if step.num_decode_rows:
            delta.delta_step(projected[: step.num_decode_rows], step, state, parts, self._linear_space, out=out)
        if step.prompts is not None:
            delta_prompt.delta_prompts(projected, step, state, parts, out=out)
        return out

    def add_experts(self, out: Tensor, residual: Tensor, norm: Norm, experts: ExpertsWeight) -> None:
        router = DenseWeight(experts.router)
        if residual.shape[0] == 1:
            logits = self.norm_linear(residual, norm, router)
            add_experts_of_one(out, residual, norm, logits, experts)
            return
        x = pointwise.rms_norm(residual, norm)
        add_experts(out, x, self.linear(x, router), experts, self._expert_counts(experts.router.shape[0]))

    def feed_forward_rows(self, tokens: int, width: int) -> int:
        return feed_forward_rows(tokens, width)

    @cached_property
    def _packed_space(self) -> PackedSpace | None:
        try:
            return PackedSpace(self._device)
        except CannotCompile as error:
            log.warning("packed weights use plain torch, which is far slower: %s", error)
            return None

    def _expert_counts(self, num_experts: int) -> Tensor:
        if num_experts not in self._counts:
            self._counts[num_experts] = torch.zeros(num_experts, dtype=torch.int32, device=self._device)
        return self._counts[num_experts]

    def _decode_space(self, shape: HeadShape) -> attention.DecodeWorkspace:
        if shape not in self._decode_spaces:
            self._decode_spaces[shape] = attention.DecodeWorkspace(self._device, shape=shape)
        return self._decode_spaces[shape]


def _streamed_if_they_run(device: torch.device) -> tuple[ModuleType | None, tuple[ModuleType, ...]]:
    """The modules of products and of attention in Gluon, on a GPU with their instructions. Gluon is experimental and its
    names change between Triton's versions: where it does not run, nothing but speed is lost."""
    if card_of(device).capability[0] != 9:
        return None, ()
    try:
        from fastqwen.kernels.triton import streamed, streamed_attention, streamed_narrow, streamed_scalar

        for module in (streamed, streamed_attention, streamed_scalar, streamed_narrow):
            module.try_out(device)
    except Exception as error:
        log.warning("steps of few rows use slower kernels, the faster ones do not run here: %s", error)
        log.debug("why they do not run", exc_info=True)
        return None, ()
    return streamed, (streamed_attention, streamed_scalar, streamed_narrow)


def library_length(num_tokens: int) -> int:
    """The length for which the library is asked. It spends 50 ms on each new one (cuDNN on an H200), so there are few."""
    return -(-num_tokens // LIBRARY_STEP) * LIBRARY_STEP


def fresh_prompts(q: Tensor, k: Tensor, v: Tensor, fresh: Sequence[tuple[int, int]], out: Tensor) -> Tensor:
    """Attention among each fresh prompt's own tokens, by torch; prompts of equal, even length in one call.

    q [room, heads, dim], k, v [room, kv_heads, dim] -> out [tokens, heads * dim], which may be another tensor. What
    stands behind a prompt's end, up to the even length, is computed as well: no earlier token sees it, and nobody reads it.
    """
    kinds = SDPBackend
    backends = [kinds.CUDNN_ATTENTION, kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.MATH]
    with sdpa_kernel(backends, set_priority=True):
        for begin, count, number in _alike(fresh):
            length = library_length(count)
            rows, shape = slice(begin, begin + number * length), (number, length)
            wide_q, wide_k, wide_v = (part[rows].unflatten(0, shape).transpose(1, 2) for part in (q, k, v))
            found = functional.scaled_dot_product_attention(
                wide_q, wide_k, wide_v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
            found = found.transpose(1, 2).flatten(2).flatten(0, 1)[: number * count]
            if found.shape == out.shape:
                return found
            out[begin : begin + number * count] = found
    return out


def _alike(fresh: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first token, length, number) of prompts that the library can take together."""
    for (count, even), group in itertools.groupby(fresh, lambda one: (one[1], one[1] == library_length(one[1]))):
        prompts = list(group)
        if even:
            yield prompts[0][0], count, len(prompts)
        else:
            yield from ((begin, count, 1) for begin, _ in prompts)
