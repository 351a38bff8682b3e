"""Every op in plain torch: written to be obviously right, and the oracle that every fast op is tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastqwen.kernels import AttentionBatch, GptqWeight, HeadShape, LayerCache

UNPACKED_BYTES = 8 * 2**20  # of a packed matrix, unpacked at a time


class ReferenceOps:
    """Norms, rotations, softmax and sums in float32; matrix products in the weights' type."""

    name = "reference"

    def activation_dtype(self, weights_dtype: torch.dtype) -> torch.dtype:
        return weights_dtype

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """ids int32 [tokens], table [vocab, hidden] -> [tokens, hidden]"""
        return functional.embedding(ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., size] / rms(x) * weight [size]. Root Mean Square Layer Normalization, arXiv 1910.07467."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide.to(x.dtype) * weight).to(x.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in], weight [out, in] -> [tokens, out]"""
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """linear(rms_norm(x))"""
        return self.linear(self.rms_norm(x, norm, eps), weight, bias)

    def norm_gated_linear(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """silu(gate) * up of linear(rms_norm(x)); the first half of weight's rows is gate, the second up"""
        return self.silu_mul(self.norm_linear(x, norm, eps, weight, bias))

    def linear_add(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """residual += linear(x), in place"""
        residual += self.linear(x, weight, bias)

    def gptq_linear(self, x: Tensor, weight: GptqWeight, bias: Tensor | None = None) -> Tensor:
        """x [tokens, in] -> [tokens, out]. A few output columns are unpacked at a time, so that memory stays small."""
        out = torch.empty((x.shape[0], weight.out_size), dtype=x.dtype, device=x.device)
        width = max(1, UNPACKED_BYTES // (4 * weight.in_size))
        for start in range(0, weight.out_size, width):
            stop = min(start + width, weight.out_size)
            part = None if bias is None else bias[start:stop]
            out[:, start:stop] = self.linear(x, gptq_unpack(weight, start, stop).to(x.dtype), part)
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2 * size] -> silu(first half) * second half, [tokens, size]"""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

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
        """attention(rope_and_cache(qkv)): [tokens, (heads + 2 kv_heads) * head_dim] -> [tokens, heads * head_dim]"""
        q = self.rope_and_cache(qkv, batch, cache, shape, q_norm, k_norm, eps)
        return self.attention(q, batch, cache, shape, window)

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
        """qkv [tokens, (heads + 2 kv_heads) * head_dim]: normalise heads, rotate q and k, write k and v to the cache.

        Returns q [tokens, heads, head_dim]. The rotation pairs dimension i with i + head_dim/2 (RoFormer, arXiv
        2104.09864, in the half-split layout that all Qwen and Llama checkpoints use).
        """
        tokens = qkv.shape[0]
        heads = qkv.view(tokens, -1, shape.head_dim)
        q, k, v = heads.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        q, k = _rotate(q, batch.cos_sin), _rotate(k, batch.cos_sin)
        if batch.q_scale is not None:
            q = q * batch.q_scale[:, None, None]
        block_size = cache.k.shape[2]
        assert batch.rows is not None
        block, offset = batch.rows.cache_slots // block_size, batch.rows.cache_slots % block_size
        cache.k[block, :, offset] = k.to(cache.k.dtype)
        cache.v[block, :, offset] = v.to(cache.v.dtype)
        return q.to(qkv.dtype)

    def attention(
        self, q: Tensor, batch: AttentionBatch, cache: LayerCache, shape: HeadShape, window: int | None
    ) -> Tensor:
        """q [tokens, heads, head_dim] over the paged cache, causal -> [tokens, heads * head_dim]

        A token at position p sees positions p - window + 1 to p, or all up to p without a window.
        """
        out = torch.empty_like(q)
        block_size = cache.k.shape[2]
        group = shape.num_heads // shape.num_kv_heads
        assert batch.rows is not None
        starts = batch.rows.starts.tolist()
        for row, context in enumerate(batch.rows.context_lens.tolist()):
            if starts[row] == starts[row + 1]:
                continue
            table = batch.block_tables[batch.rows.tables[row], : -(-context // block_size)].long()
            k = cache.k[table].transpose(1, 2).reshape(-1, shape.num_kv_heads, shape.head_dim)[:context].float()
            v = cache.v[table].transpose(1, 2).reshape(-1, shape.num_kv_heads, shape.head_dim)[:context].float()
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            row_q = q[starts[row] : starts[row + 1]].float()
            scores = torch.einsum("qhd,khd->hqk", row_q, k) * shape.head_dim**-0.5
            distance = batch.positions[starts[row] : starts[row + 1], None] - torch.arange(context, device=q.device)
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[starts[row] : starts[row + 1]] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
        return out.flatten(1)

    def add_experts(
        self,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        router: Tensor,
        gate_up: Tensor,
        down: Tensor,
        *,
        top_k: int,
        normalize: bool,
    ) -> None:
        """residual += sum over each token's top_k experts of weight * MLP_expert(x), in place, x = rms_norm(residual)

        residual [tokens, hidden], router [experts, hidden], gate_up [experts, 2 * size, hidden], down [experts, hidden,
        size]. Weights are the experts' probabilities, ``normalize``d to a sum of 1 or not.
        """
        x = self.rms_norm(residual, norm, eps)
        logits = self.linear(x, router)
        chances, expert_ids = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1)
        if normalize:
            chances = chances / chances.sum(-1, keepdim=True)
        weights = chances.to(x.dtype).float()
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in expert_ids.unique().tolist():
            token, choice = (expert_ids == expert).nonzero(as_tuple=True)
            hidden = self.silu_mul(self.linear(x[token], gate_up[expert]))
            result = self.linear(hidden, down[expert])
            out.index_add_(0, token, result.float() * weights[token, choice, None])
        residual += out.to(x.dtype)

    def feed_forward_rows(self, tokens: int, width: int) -> int:
        """How many of a step's tokens to take through the feed-forward part at once, ``width`` numbers each."""
        return tokens


def gptq_unpack(weight: GptqWeight, start: int, stop: int) -> Tensor:
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


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
