"""The Ops table: every operation that a decoder needs, once per device.

reference.py   plain torch; the oracle for all others, and the way on a device that has no faster one
cpu/           C++, compiled on first use; one result for a row whatever else is in the batch
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, dtype


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the paged KV cache."""

    k: Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    v: Tensor  # like k


@dataclass(frozen=True)
class AttentionBatch:
    """Where the flat tokens of a step belong. A row is one sequence's share of the step; rows of one token come first."""

    positions: Tensor  # int32 [tokens]
    cos_sin: Tensor  # float32 [tokens, head_dim]: cosines of head_dim/2 frequencies, then sines
    q_scale: Tensor | None  # float32 [tokens], logN's factor; None if the model has none
    token_tables: Tensor  # int32 [tokens]: the line of block_tables that a token's sequence has
    table_rows: Tensor  # int32 [rows]: the same for each row
    row_starts: Tensor  # int32 [rows + 1]: tokens row_starts[r] to row_starts[r + 1] are row r's
    context_lens: Tensor  # int32 [rows]: tokens of the row's sequence in the cache, this step's included
    block_tables: Tensor  # int32 [slots, blocks]
    cache_slots: Tensor  # int64 [tokens]: block * block_size + offset, where the token's key and value go
    num_decode_rows: int  # leading rows with exactly one token
    max_row_tokens: int
    # (first token, count) of the rows behind those, if all of them are whole prompts with nothing in the cache before
    whole_prompts: tuple[tuple[int, int], ...] = ()

    @cached_property
    def beyond_decode(self) -> AttentionBatch:
        """The same step's per-token tensors without those of the leading one-token rows."""
        first = self.num_decode_rows
        return replace(
            self,
            positions=self.positions[first:],
            cos_sin=self.cos_sin[first:],
            q_scale=None if self.q_scale is None else self.q_scale[first:],
            cache_slots=self.cache_slots[first:],
        )


@dataclass(frozen=True)
class HeadShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class GptqWeight:
    """A matrix of whole numbers packed along the inputs, 32 / bits to a word, the lowest bits first.

    weight[o, i] = scales[group(i), o] * (code[i, o] - zeros[group(i), o])
    """

    codes: Tensor  # int32 [in * bits / 32, out]
    scales: Tensor  # floating point [groups, out]
    zeros: Tensor  # int16 [groups, out]
    group_of: Tensor | None  # int64 [in]; None: inputs are grouped in their order
    bits: int
    group_size: int

    @property
    def in_size(self) -> int:
        return self.codes.shape[0] * 32 // self.bits

    @property
    def out_size(self) -> int:
        return self.codes.shape[1]


class Ops(Protocol):
    """All matrices of weights are [out, in]. ``residual`` is changed in place where a comment says so.

    Activations have ``activation_dtype(weights)``; sums are float32 at least.
    """

    name: str

    def activation_dtype(self, weights_dtype: dtype) -> dtype: ...

    def embed(self, ids: Tensor, table: Tensor) -> Tensor: ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def norm_linear(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor: ...

    def norm_gated_linear(
        self, x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor: ...

    def linear_add(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None: ...

    def gptq_linear(self, x: Tensor, weight: GptqWeight, bias: Tensor | None = None) -> Tensor: ...

    def silu_mul(self, gate_up: Tensor) -> Tensor: ...

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
    ) -> Tensor: ...

    def add_experts(
        self, residual: Tensor, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, *, top_k: int, normalize: bool
    ) -> None: ...
