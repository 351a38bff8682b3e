"""The Ops table: every operation that a decoder needs, once per device, and the records that operations take.

reference.py   plain torch; the oracle for all others, and the way on a device that has no faster one
cpu/           C++, compiled on first use; one result for a row whatever else is in the batch
triton/        fused kernels for NVIDIA GPUs
cuda/          CUDA C++ for them: products with packed weights
limits.py      sizes that kernels set aside or choose by, for whoever must know them without torch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, dtype


# ---- a step ----


@dataclass(frozen=True)
class PromptTiles:
    """The tokens behind the decode rows, cut into tiles for the GPU's prompt kernel.

    ``fresh`` are (first token, count) of rows at the end of the step that have nothing in the cache before them: a
    library's kernel may attend to them instead, and they have no tiles then.
    """

    tiles: Tensor  # int32 [tiles, 4]: first token, number of tokens (0: not used), first position, slot
    height: int  # the most tokens that a tile has
    fresh: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class StepTokens:
    """A step's flat tokens, and where they belong. Every layer and every linear sees it.

    A row is one sequence's share of the step. Rows stand in the order that ScheduledBatch promises, rows of one token
    first. A slot is a running sequence's place in whatever is kept for each: block tables, a layer's state.
    """

    positions: Tensor  # int32 [tokens]
    slots: Tensor  # int32 [tokens]: the slot of each token's sequence
    row_starts: Tensor  # int32 [rows + 1]: the step's tokens row_starts[r] to row_starts[r + 1] are row r's
    cos_sin: Tensor  # float32 [tokens, rotary_dim]: cosines of rotary_dim / 2 frequencies, then sines
    q_scale: Tensor | None  # float32 [tokens], logN's factor; None if the model has none
    block_tables: Tensor  # int32 [slots, blocks]: each sequence's blocks of the paged cache, in order
    num_decode_rows: int  # leading rows with exactly one token; with ``decode_count``, the most that there may be
    prompts: PromptTiles | None = None  # for the GPU; None if there are decode rows only
    decode_count: Tensor | None = None  # int32 [1]: how many decode rows a recorded step has this time
    first: int = 0  # where a part's first token stands in its step
    held: Tensor | None = None  # int32 [rows]: tokens that a row's slot holds already in states of fixed size

    def part(self, start: int, stop: int) -> StepTokens:
        """Tokens ``start`` to ``stop`` of these. ``row_starts`` still counts the whole step's tokens."""
        if start == 0 and stop >= self.positions.shape[0]:
            return self
        tokens = slice(start, stop)
        return replace(
            self,
            positions=self.positions[tokens],
            slots=self.slots[tokens],
            cos_sin=self.cos_sin[tokens],
            q_scale=None if self.q_scale is None else self.q_scale[tokens],
            first=self.first + start,
        )


# ---- what a layer keeps of the sequences ----


@dataclass(frozen=True)
class StateRoom:
    """How much a layer's state must hold. ``num_blocks`` and ``num_slots`` count the spare ones, which pad a step;
    ``num_slots`` counts as well those in which copies of states are kept for the prefix cache."""

    num_blocks: int
    block_size: int  # tokens
    num_slots: int
    cache_dtype: dtype  # of keys and values; the arithmetic's type is the model's
    device: torch.device


class LayerState(Protocol):
    """What a layer keeps between steps: blocks of the paged cache, or something of fixed size for each slot."""

    def of_slot(self, slot: int) -> Sequence[Tensor]:
        """Views of all that is kept for a slot in place; what lies in blocks is not."""


@dataclass(frozen=True)
class LayerCache:
    """One layer's part of the paged KV cache, in its own type: kernels raise what they load to the arithmetic's.

    Types of 8 bits (int8, float8_e4m3fn) have a scale for each head of each token: a stored number stands for number * scale,
    and the largest of a head is the type's largest. Keys are spread before (reference.py), and so are the queries.
    """

    k: Tensor  # [num_blocks, kv_heads, block_size, head_dim]
    v: Tensor  # like k
    k_scale: Tensor | None = None  # float16 [num_blocks, kv_heads, block_size]
    v_scale: Tensor | None = None

    def of_slot(self, slot: int) -> Sequence[Tensor]:
        return ()


@dataclass(frozen=True)
class DeltaState:
    """What a layer with a gated delta rule keeps for each slot.

    A slot's numbers mean something only if StepTokens.held says that its row has tokens there. ``inputs`` is a ring: what the
    convolution read at position p stands in line p modulo the number of taps.
    """

    memory: Tensor  # float32 [slots, value_heads, key_dim, value_dim]
    inputs: Tensor  # [slots, taps, channels], in the activations' type

    def of_slot(self, slot: int) -> Sequence[Tensor]:
        return self.memory[slot], self.inputs[slot]


# ---- weights ----


@dataclass(frozen=True)
class Norm:
    """x / rms(x) * weight. Root Mean Square Layer Normalization, arXiv 1910.07467."""

    weight: Tensor  # [size]
    eps: float


@dataclass(frozen=True)
class DenseWeight:
    """One number per parameter."""

    weight: Tensor  # [out, in]
    bias: Tensor | None = None  # [out]


@dataclass(frozen=True)
class GroupedWeight:
    """A matrix of whole numbers packed along the inputs, 32 / bits to a word, the lowest bits first.

    weight[o, i] = scales[group(i), o] * (code[i, o] - zeros[group(i), o])
    """

    codes: Tensor  # int32 [in * bits / 32, out]
    scales: Tensor  # floating point [groups, out]
    zeros: Tensor  # int16 [groups, out]
    group_of: Tensor | None  # int64 [in]; None: inputs are grouped in their order
    bits: int
    group_size: int
    bias: Tensor | None = None  # [out]

    @property
    def in_size(self) -> int:
        return self.codes.shape[0] * 32 // self.bits

    @property
    def out_size(self) -> int:
        return self.codes.shape[1]


@dataclass(frozen=True)
class ScaledWeight:
    """A matrix of 8-bit floating-point numbers (e4m3, arXiv 2209.05433) with a scale for each block of them.

    weight[o, i] = numbers[o, i] * scales[o // block[0], i // block[1]]
    """

    numbers: Tensor  # float8_e4m3fn [out, in]
    scales: Tensor  # float32 [blocks of outputs, blocks of inputs]; the last block of either may be cut
    block: tuple[int, int]  # outputs, inputs
    bias: Tensor | None = None  # [out]

    @property
    def in_size(self) -> int:
        return self.numbers.shape[1]

    @property
    def out_size(self) -> int:
        return self.numbers.shape[0]


@dataclass(frozen=True)
class CodedWeight:
    """A matrix of small whole numbers, one a byte: what every packed type of GGUF is, and what a device packs anew.

    weight[o, i] = (code[o, i] - zero) * scales[o, i / group_size] * parts[o, i / part_size]
                   + minima[o, i / group_size] * min_parts[o, i / part_size]
    """

    codes: Tensor  # uint8 [out, in]
    bits: int  # that a code needs
    zero: int
    scales: Tensor  # float16 [out, groups]
    group_size: int  # 32 * 2^n; of one group for all, at least as many inputs as there are
    part_size: int  # 16 where codes have 2, 3 or 6 bits, else 32
    parts: Tensor | None = None  # int8 [out, in / part_size]
    minima: Tensor | None = None  # float16, like scales
    min_parts: Tensor | None = None  # uint8 [out, in / part_size]
    bias: Tensor | None = None  # [out]


class Product(Protocol):
    """A matrix as a device's own kernels read it, and the forms in which a decoder multiplies by it (see layers/linear.py)."""

    num_bytes: int

    def reads_norm(self, norm: Norm, x: Tensor) -> bool:
        """Whether the forms with a norm take this one beside such activations."""

    def plain(self, x: Tensor) -> Tensor: ...

    def of_norm(self, x: Tensor, norm: Norm) -> Tensor: ...

    def gated_of_norm(self, x: Tensor, norm: Norm) -> Tensor: ...

    def add_to(self, residual: Tensor, x: Tensor) -> None: ...


@dataclass(frozen=True)
class ExpertsWeight:
    """A layer's routed experts. The first half of an expert's gate_up rows is gate, the second up."""

    router: Tensor  # [experts, hidden]
    gate_up: Tensor  # [experts, 2 * size, hidden]
    down: Tensor  # [experts, hidden, size]
    top_k: int
    normalize: bool  # the chosen experts' chances are brought to a sum of 1


@dataclass(frozen=True)
class HeadShape:
    """Of the heads that this process computes. Of each head the leading ``rotary_dim`` numbers are rotated, i with
    i + rotary_dim / 2 (RoFormer, arXiv 2104.09864, in the half-split layout of all Qwen and Llama checkpoints)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def width(self) -> int:
        """Numbers of a token's queries, keys and values together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class AttentionParts:
    """What makes one layer's attention its own."""

    shape: HeadShape
    q_norm: Tensor | None = None  # [head_dim]: RMSNorm on each head's query before the rotation
    k_norm: Tensor | None = None  # [head_dim]; both or none
    eps: float = 0.0  # of these norms
    window: int | None = None  # a token sees that many positions, its own included; None: all before it


@dataclass(frozen=True)
class DeltaShape:
    """Of the heads that this process computes. Value head h reads the query and key of key head h // group."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def group(self) -> int:
        return self.num_value_heads // self.num_key_heads

    @property
    def key_size(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.num_value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Queries, keys and values, in this order."""
        return 2 * self.key_size + self.value_size

    @property
    def width(self) -> int:
        """Numbers of a token: the channels, then z, b and a, of which the latter two have one for each value head."""
        return self.channels + self.value_size + 2 * self.num_value_heads


@dataclass(frozen=True)
class DeltaParts:
    """What makes one layer's gated delta rule its own."""

    shape: DeltaShape
    conv: Tensor  # [channels, taps], the last tap is the token's own
    decay: Tensor  # float32 [value_heads], below 0
    decay_bias: Tensor  # float32 [value_heads]
    norm: Norm  # float32 [value_dim], for every head


# ---- the table ----


class Ops(Protocol):
    """Everything that a decoder computes. All matrices of weights are [out, in].

    Activations (``x``, ``qkv``, ``residual`` and all results) are 2-dimensional with a row per token, and have the type of
    what ``embed`` gives: the C++ kernels compute in float32 whatever the weights are (beside bfloat16 weights with 16 bits of a
    fraction at least, beside packed ones with 16 bits in blocks), the others in the weights' type.
    Sums are float32 at least. No op changes its arguments but where it says so. ``residual`` is contiguous.
    """

    name: str

    def embed(self, ids: Tensor, table: Tensor) -> Tensor:
        """ids int32 [tokens], table [vocab, hidden] -> [tokens, hidden]"""

    def rms_norm(self, x: Tensor, norm: Norm) -> Tensor:
        """x [..., size] -> [..., size]"""

    def linear(self, x: Tensor, weight: DenseWeight) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""

    def settled(self, weight: DenseWeight) -> DenseWeight:
        """The same matrix where this device reads it fastest, possibly a copy, to be kept."""

    def norm_linear(self, x: Tensor, norm: Norm, weight: DenseWeight) -> Tensor:
        """linear(rms_norm(x))"""

    def norm_gated_linear(self, x: Tensor, norm: Norm, weight: DenseWeight) -> Tensor:
        """silu_mul(linear(rms_norm(x))): [tokens, in] -> [tokens, out / 2]"""

    def linear_add(self, residual: Tensor, x: Tensor, weight: DenseWeight) -> None:
        """residual [tokens, out] += linear(x), in place"""

    def grouped_linear(self, x: Tensor, weight: GroupedWeight) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""

    def scaled_linear(self, x: Tensor, weight: ScaledWeight) -> Tensor:
        """x [tokens, in] -> [tokens, out]"""

    def packed(self, weight: GroupedWeight | ScaledWeight, dtype: dtype) -> Product | None:
        """The same matrix for this device's own kernels; None: grouped_linear or scaled_linear computes with it as it is.
        ``dtype`` is the activations'."""

    def takes_codes(self, dtype: dtype) -> bool:
        """Whether this device computes with coded weights where the model's type is ``dtype``."""

    def coded(self, weight: CodedWeight) -> Product:
        """The same matrix for this device's own kernels, if it takes codes."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[tokens, 2 * size] -> silu(first half) * second half, [tokens, size]"""

    def attend(self, qkv: Tensor, step: StepTokens, cache: LayerCache, parts: AttentionParts) -> Tensor:
        """Normalise and rotate q and k, write k and v to the cache, attend, causally: -> [tokens, heads * head_dim]

        qkv [tokens, at least parts.shape.width]: queries, keys, values; more columns may follow, and are not read. The
        blocks of the step's tokens are changed in ``cache``. A q and k are rotated by the row of ``step.cos_sin``, q is
        multiplied by ``step.q_scale`` afterwards; scores are divided by sqrt(head_dim).
        """

    def multiply_by_sigmoid(self, x: Tensor, gate: Tensor) -> None:
        """x [tokens, size] *= sigmoid(gate), in place; gate [tokens, size] may be a part of wider rows"""

    def gated_delta(self, projected: Tensor, step: StepTokens, state: DeltaState, parts: DeltaParts) -> Tensor:
        """A gated delta rule over the rows' tokens: projected [tokens, at least parts.shape.width] -> [tokens, value_size]

        Gated Delta Networks, arXiv 2412.06464. Channels pass a causal convolution and SiLU; queries and keys are brought to
        length 1 (1e-6 under the root), queries divided by sqrt(key_dim). For each value head, with S its memory in ``state``:

            S = exp(decay * softplus(a + decay_bias)) * S;   S += k (sigmoid(b) * (v - k S));   o = q S

        and out is norm(o) * silu(z). A row goes on behind the tokens that ``step.held`` says its slot has. A row of one
        token that the slot holds already, as its last one, computes the same output again and leaves the state as it is.
        """

    def activation_dtype(self, weights: dtype) -> dtype:
        """What ``embed`` gives of a table of this type."""

    def add_experts(self, out: Tensor, residual: Tensor, norm: Norm, experts: ExpertsWeight) -> None:
        """out [tokens, hidden] += for each token the sum over its top_k experts of chance * MLP_expert(x), in place,
        where x = rms_norm(residual). ``out`` may be ``residual`` itself."""

    def feed_forward_rows(self, tokens: int, width: int) -> int:
        """How many of a step's tokens to take through the feed-forward part at once, ``width`` numbers each."""
