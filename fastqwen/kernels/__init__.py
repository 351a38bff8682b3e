"""The Ops table: every operation that a decoder needs, once per device.

reference.py   plain torch; the oracle for all others, and the way on a device that has no faster one
cpu/           C++, compiled on first use; one result for a row whatever else is in the batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor, dtype


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the paged KV cache."""

    k: Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    v: Tensor  # like k


@dataclass(frozen=True)
class RowSpans:
    """A step's rows, one sequence each, for kernels that go row by row or look up a token's place in the cache."""

    tables: Tensor  # int32 [rows]: each row's line of block_tables
    starts: Tensor  # int32 [rows + 1]: tokens starts[r] to starts[r + 1] are row r's
    context_lens: Tensor  # int32 [rows]: tokens of the row's sequence in the cache, this step's included
    cache_slots: Tensor  # int64 [tokens]: block * block_size + offset, where the token's key and value go


@dataclass(frozen=True)
class PromptTiles:
    """The tokens behind the decode rows, cut into tiles for the GPU's prompt kernel.

    ``fresh`` are (first token, count) of rows at the end of the step that have nothing in the cache before them: a
    library's kernel may attend to them instead, and they have no tiles then.
    """

    tiles: Tensor  # int32 [tiles, 4]: first token, number of tokens (0: not used), first position, line of block_tables
    height: int  # the most tokens that a tile has
    fresh: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class AttentionBatch:
    """Where the flat tokens of a step belong. A row is one sequence's share of the step; rows of one token come first."""

    positions: Tensor  # int32 [tokens]
    cos_sin: Tensor  # float32 [tokens, head_dim]: cosines of head_dim/2 frequencies, then sines
    q_scale: Tensor | None  # float32 [tokens], logN's factor; None if the model has none
    token_tables: Tensor  # int32 [tokens]: the line of block_tables that a token's sequence has
    block_tables: Tensor  # int32 [slots, blocks]
    num_decode_rows: int  # leading rows with exactly one token; with ``decode_count``, the most that there may be
    rows: RowSpans | None = None  # for the reference and the CPU
    prompts: PromptTiles | None = None  # for the GPU; None if there are decode rows only
    decode_count: Tensor | None = None  # int32 [1]: how many decode rows a recorded step has this time


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
    ) -> None: ...

    def feed_forward_rows(self, tokens: int, width: int) -> int: ...
