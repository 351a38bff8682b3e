"""Every op in plain torch: written to be obviously right, and the oracle that every fast op is tested against."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastqwen.kernels import (
    AttentionParts,
    CodedWeight,
    DeltaParts,
    DeltaState,
    DenseWeight,
    ExpertsWeight,
    GroupedWeight,
    LayerCache,
    Norm,
    Product,
    ScaledWeight,
    StepTokens,
)
from fastqwen.kernels.limits import UNPACK_BYTES
from fastqwen.kernels.reference_delta import delta_of_row

LARGEST_CACHED = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
LEAST_CACHE_SCALE = 1e-6  # in float16; a head of zeros has it as well


class ReferenceOps:
    """Norms, rotations, softmax and sums in float32; matrix products in the weights' type."""

    name = "reference"

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        return functional.embedding(ids, table)

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
        if norm.weight.dtype == x.dtype:
            wide = wide.to(x.dtype)
        return (wide * norm.weight).to(x.dtype)

    def linear(self, x: Tensor, weight: DenseWeight) -> Tensor:
        bias = weight.bias
        return functional.linear(x, weight.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def settled(self, weight: DenseWeight) -> DenseWeight:
        return weight

    def norm_linear(self, x: Tensor, norm: Norm, weight: DenseWeight) -> Tensor:
        return self.linear(self.rms_norm(x, norm), weight)

    def norm_gated_linear(self, x: Tensor, norm: Norm, weight: DenseWeight) -> Tensor:
        return self.silu_mul(self.norm_linear(x, norm, weight))

    def linear_add(self, residual: Tensor, x: Tensor, weight: DenseWeight) -> None:
        residual += self.linear(x, weight)

    def grouped_linear(self, x: Tensor, weight: GroupedWeight) -> Tensor:
        return self._in_pieces(x, weight, lambda start, stop: unpack_grouped(weight, start, stop))

    def scaled_linear(self, x: Tensor, weight: ScaledWeight) -> Tensor:
        return self._in_pieces(x, weight, lambda start, stop: unpack_scaled(weight, start, stop))

    def _in_pieces(
        self, x: Tensor, weight: GroupedWeight | ScaledWeight, unpack: Callable[[int, int], Tensor]
    ) -> Tensor:
        """A few outputs are unpacked at a time, so that memory stays small."""
        out = torch.empty((x.shape[0], weight.out_size), dtype=x.dtype, device=x.device)
        width = max(1, UNPACK_BYTES // (4 * weight.in_size))
        for start in range(0, weight.out_size, width):
            stop = min(start + width, weight.out_size)
            bias = None if weight.bias is None else weight.bias[start:stop]
            out[:, start:stop] = self.linear(x, DenseWeight(unpack(start, stop).to(x.dtype), bias))
        return out

    def packed(self, weight: GroupedWeight | ScaledWeight, dtype: torch.dtype) -> Product | None:
        return None

    def takes_codes(self, dtype: torch.dtype) -> bool:
        return False

    def coded(self, weight: CodedWeight) -> Product:
        raise NotImplementedError("asked of ops that take codes")

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def attend(self, qkv: Tensor, step: StepTokens, cache: LayerCache, parts: AttentionParts) -> Tensor:
        return self.attention(self.rope_and_cache(qkv, step, cache, parts), step, cache, parts)

    def rope_and_cache(self, qkv: Tensor, step: StepTokens, cache: LayerCache, parts: AttentionParts) -> Tensor:
        """Normalise heads, rotate q and k, write k and v to the cache; q [tokens, heads, head_dim] is returned."""
        shape = parts.shape
        heads = qkv[:, : shape.width].unflatten(1, (-1, shape.head_dim))
        q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if parts.q_norm is not None and parts.k_norm is not None:
            q, k = self.rms_norm(q, Norm(parts.q_norm, parts.eps)), self.rms_norm(k, Norm(parts.k_norm, parts.eps))
        q, k = _rotate(q, step.cos_sin), _rotate(k, step.cos_sin)
        if step.q_scale is not None:
            q = q * step.q_scale[:, None, None]
        if cache.k_scale is not None:
            q, k = spread(q.float()), spread(k)
        block_size = cache.k.shape[2]
        block = step.block_tables[step.slots.long(), step.positions.long() // block_size].long()
        offset = step.positions.long() % block_size
        _store(cache.k, cache.k_scale, k, block, offset)
        _store(cache.v, cache.v_scale, v.float(), block, offset)
        return q.to(qkv.dtype)

    def attention(self, q: Tensor, step: StepTokens, cache: LayerCache, parts: AttentionParts) -> Tensor:
        """q [tokens, heads, head_dim] over the paged cache -> [tokens, heads * head_dim]"""
        out = torch.empty_like(q)
        for start, stop in itertools.pairwise(step.row_starts.tolist()):
            if start < stop:
                out[start:stop] = _attention_of_row(q[start:stop], step.part(start, stop), cache, parts)
        return out.flatten(1)

    def multiply_by_sigmoid(self, x: Tensor, gate: Tensor) -> None:
        x *= torch.sigmoid(gate)

    def gated_delta(self, projected: Tensor, step: StepTokens, state: DeltaState, parts: DeltaParts) -> Tensor:
        assert step.held is not None
        out = torch.empty((projected.shape[0], parts.shape.value_size), dtype=projected.dtype, device=projected.device)
        for held, (start, stop) in zip(step.held.tolist(), itertools.pairwise(step.row_starts.tolist()), strict=True):
            if start < stop:
                slot, position = int(step.slots[start]), int(step.positions[start])
                out[start:stop] = delta_of_row(projected[start:stop], slot, position, held, state, parts).flatten(1)
        return out

    def activation_dtype(self, weights: torch.dtype) -> torch.dtype:
        return weights

    def add_experts(self, out: Tensor, residual: Tensor, norm: Norm, experts: ExpertsWeight) -> None:
        x = self.rms_norm(residual, norm)
        logits = self.linear(x, DenseWeight(experts.router))
        chances, expert_ids = chosen_experts(logits, experts.top_k, experts.normalize)
        weights = chances.to(x.dtype).float()
        found = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in expert_ids.unique().tolist():
            token, choice = (expert_ids == expert).nonzero(as_tuple=True)
            hidden = self.silu_mul(self.linear(x[token], DenseWeight(experts.gate_up[expert])))
            result = self.linear(hidden, DenseWeight(experts.down[expert]))
            found.index_add_(0, token, result.float() * weights[token, choice, None])
        out += found.to(x.dtype)

    def feed_forward_rows(self, tokens: int, width: int) -> int:
        return tokens


def chosen_experts(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """A router's logits [tokens, experts] -> the largest chances, float32 [tokens, top_k], and whose they are, int64; with
    ``normalize`` brought to a sum of 1."""
    chances, expert_ids = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1)
    return chances / chances.sum(-1, keepdim=True) if normalize else chances, expert_ids


def unpack_grouped(weight: GroupedWeight, start: int, stop: int) -> Tensor:
    """Output columns ``start`` to ``stop`` as a plain matrix, float32 [stop - start, in]."""
    codes = weight.codes[:, start:stop].t().contiguous().view(torch.uint8)  # the lowest byte of a word comes first
    if weight.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    out = codes.float()  # [out, in]
    scales, zeros = weight.scales[:, start:stop].t().float(), weight.zeros[:, start:stop].t().float()
    if weight.group_of is not None:
        return out.sub_(zeros[:, weight.group_of]).mul_(scales[:, weight.group_of])
    for group, inputs in enumerate(out.split(weight.group_size, dim=1)):
        inputs.sub_(zeros[:, group, None]).mul_(scales[:, group, None])
    return out


def unpack_scaled(weight: ScaledWeight, start: int, stop: int) -> Tensor:
    """Outputs ``start`` to ``stop`` as a plain matrix, float32 [stop - start, in]."""
    height, width = weight.block
    lines = weight.scales[start // height : -(-stop // height)].repeat_interleave(height, 0)[start % height :]
    scales = lines[: stop - start].repeat_interleave(width, 1)[:, : weight.in_size]
    return weight.numbers[start:stop].float().mul_(scales)


def unpack_coded(weight: CodedWeight) -> Tensor:
    """As a plain matrix, float32 [out, in]."""
    in_size = weight.codes.shape[1]

    def spread(numbers: Tensor, size: int) -> Tensor:
        return numbers.float().repeat_interleave(size, dim=1)[:, :in_size]

    def spread_groups(numbers: Tensor) -> Tensor:
        return spread(numbers, min(weight.group_size, in_size))

    out = (weight.codes.float() - weight.zero) * spread_groups(weight.scales)
    if weight.parts is not None:
        out *= spread(weight.parts, weight.part_size)
    if weight.minima is not None:
        minima = spread_groups(weight.minima)
        out += minima if weight.min_parts is None else minima * spread(weight.min_parts, weight.part_size)
    return out


def round_to_blocks(x: Tensor, size: int = 32) -> Tensor:
    """x float32 [tokens, in] as products with coded weights see it, in float64: each ``size`` numbers are multiples of their
    largest / 32639, the most that two signed bytes hold evenly."""
    blocks: Tensor = x.unflatten(1, (-1, size))
    largest = blocks.abs().amax(-1, keepdim=True)
    # ``32639 / largest`` would be 32639 times a rounded reciprocal; the kernel divides
    inverse = torch.full_like(largest, 32639.0) / largest.clamp(min=1e-30)
    whole: Tensor = (blocks.double() * inverse.double()).round()
    return (whole * (largest / 32639).double()).flatten(1)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim]: its leading numbers turned by cos_sin [tokens, rotary_dim], float32"""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    turned, rest = x.float().tensor_split([cos_sin.shape[-1]], dim=-1)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def spread(heads: Tensor) -> Tensor:
    """[..., head_dim]: each head times a Walsh-Hadamard matrix, divided by the root of its size: sums of all its numbers with
    signs. Of a size that is no power of two, in pieces that are.

    Queries and keys that both are keep their products, and a key has no number any more that is far larger than the others and
    makes them coarse where all have one scale (QuaRot, arXiv 2404.00456).
    """
    piece = heads.shape[-1] & -heads.shape[-1]
    signs = torch.ones(1, 1, device=heads.device)
    while signs.shape[0] < piece:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    spread: Tensor = heads.unflatten(-1, (-1, piece)) @ (signs * piece**-0.5).to(heads.dtype)
    return spread.flatten(-2)


def _store(cache: Tensor, scales: Tensor | None, values: Tensor, block: Tensor, offset: Tensor) -> None:
    """values float32 [tokens, kv_heads, head_dim] into a half of a LayerCache; with scales the largest becomes the type's."""
    if scales is not None:
        most = LARGEST_CACHED[cache.dtype]
        scale = (values.abs().amax(-1) / most).clamp(min=LEAST_CACHE_SCALE).to(scales.dtype)
        scales[block, :, offset] = scale
        values = (values / scale.float()[..., None]).clamp(-most, most)
        values = values.round() if cache.dtype == torch.int8 else values
    cache[block, :, offset] = values.to(cache.dtype)


def _load(cache: Tensor, scales: Tensor | None, table: Tensor, context: int) -> Tensor:
    """The first ``context`` keys or values of the blocks in ``table``, float32 [context, kv_heads, head_dim]"""
    found = cache[table].float()
    if scales is not None:
        found = found * scales[table].float()[..., None]
    return found.transpose(1, 2).flatten(0, 1)[:context]


def _attention_of_row(q: Tensor, row: StepTokens, cache: LayerCache, parts: AttentionParts) -> Tensor:
    context, block_size = int(row.positions[-1]) + 1, cache.k.shape[2]
    table = row.block_tables[int(row.slots[0]), : -(-context // block_size)].long()
    k = _load(cache.k, cache.k_scale, table, context).repeat_interleave(parts.shape.group, dim=1)
    v = _load(cache.v, cache.v_scale, table, context).repeat_interleave(parts.shape.group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * parts.shape.head_dim**-0.5
    distance = row.positions[:, None] - torch.arange(context, device=q.device)
    hidden = distance < 0
    if parts.window is not None:
        hidden |= distance >= parts.window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
