"""How many bytes a GPU's share of the weights takes, from config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from typing import Any

import msgspec

from fastqwen import quant
from fastqwen.errors import Unsupported
from fastqwen.model_config import Fields, ModelConfig
from fastqwen.plan.allocator import rounded_up_bytes
from fastqwen.plan.facts import DTYPE_BYTES, DeviceFacts
from fastqwen.sharding import VOCAB_UNIT, even_size

PLAIN_BYTES = 2  # of a number in the files that are quantized while they are loaded


class Matrix(msgspec.Struct, frozen=True):
    """``count`` equal matrices of a layer or of the model, as one GPU holds them."""

    count: int
    inputs: int
    outputs: int
    bias: bool = False
    packed: bool = True  # what a quantized checkpoint stores packed
    expert: bool = False  # of many; the engine holds those of a layer as one tensor
    unpacked: bool = False  # an expert that the device cannot multiply by as it is packed
    read_share: float = 1.0  # share that one token's step reads: experts are read as they are chosen

    @property
    def entries(self) -> int:
        return self.inputs * self.outputs


def num_dense_layers(model: ModelConfig) -> int:
    return model.num_layers - (len(model.moe.sparse_layers) if model.moe is not None else 0)


def matrices(model: ModelConfig, num_gpus: int = 1) -> Iterator[Matrix]:
    local, hidden, layers = model.local(num_gpus), model.hidden_size, model.num_layers
    with_attention = len(model.attention_layers)
    gates = local.q_size if model.attention_gate else 0
    yield Matrix(with_attention, hidden, local.q_size + 2 * local.kv_size + gates, model.qkv_bias)
    yield Matrix(with_attention, local.q_size, hidden, model.o_bias)
    if local.delta is not None:
        delta = local.delta
        yield Matrix(len(delta.layers), hidden, delta.channels + delta.value_size)
        yield Matrix(len(delta.layers), hidden, 2 * delta.num_value_heads, packed=False)
        yield Matrix(len(delta.layers), delta.value_size, hidden)
        yield Matrix(len(delta.layers), delta.taps, delta.channels, packed=False)
    dense = num_dense_layers(model)
    if dense:
        yield from _mlp(dense, hidden, local.intermediate_size, model.mlp_bias)
    moe = local.moe
    if moe is not None:
        sparse = layers - dense
        share = moe.experts_per_token / moe.num_experts
        yield Matrix(sparse, hidden, moe.num_experts, packed=False)
        unpacked = not (model.packs_experts and num_gpus == 1)
        yield from _mlp(sparse * moe.num_experts, hidden, moe.expert_size, False, share, unpacked)
        if moe.shared_size:
            yield from _mlp(sparse, hidden, moe.shared_size, False)
            yield Matrix(sparse, hidden, 1, packed=False)


def tables(model: ModelConfig, num_gpus: int = 1) -> Iterator[Matrix]:
    """The embedding, of which a step reads a row a token, and the head, unless it is the same tensor; or a classifier."""
    rows = even_size(model.vocab_size, num_gpus, VOCAB_UNIT)
    head_packed = bool((model.quantization or {}).get("lm_head"))
    if model.classifier is not None:
        yield Matrix(1, model.hidden_size, rows, packed=False, read_share=0.0)
        yield Matrix(1, model.hidden_size, len(model.classifier.labels), packed=False)
    elif model.tie_word_embeddings:
        yield Matrix(1, model.hidden_size, rows, packed=False)
    else:
        yield Matrix(1, model.hidden_size, rows, packed=False, read_share=0.0)
        yield Matrix(1, model.hidden_size, rows, packed=head_packed)


def matrix_bytes(matrix: Matrix, quantization: dict[str, Any] | None, element: int, *, as_in_file: bool = False) -> int:
    """One matrix with its bias: as the engine holds it, or as a file does."""
    bias = matrix.outputs * element if matrix.bias else 0
    if quantization is None or not matrix.packed:
        return matrix.entries * element + bias
    if as_in_file or quant.method_word(quantization) not in quant.supported():
        return _bytes_in_file(matrix, quantization) + bias
    method = quant.find(quantization, "config.json")
    held = method.held_bytes(matrix.inputs, matrix.outputs, element=element, is_expert=matrix.unpacked)
    # Every linear of a GPTQ checkpoint has a bias, even where the model has none.
    has_bias = matrix.bias or (quant.method_word(quantization) in ("gptq", "auto_round") and not matrix.expert)
    return held + (matrix.outputs * element if has_bias else 0)


def _bytes_in_file(matrix: Matrix, quantization: dict[str, Any]) -> int:
    """Codes, scales, zeros and order, without a bias that the model has; of a method that the engine does not have yet,
    too."""
    method = quant.method_word(quantization)
    if method == "online":
        return matrix.entries * PLAIN_BYTES
    if method not in quant.supported():
        raise Unsupported(
            f"the planner knows no quantization method {method!r}; it knows {', '.join(quant.supported())}"
        )
    if method not in ("gptq", "auto_round", "awq"):  # held as it is stored
        found = quant.find(quantization, "config.json")
        return found.held_bytes(matrix.inputs, matrix.outputs, element=2, is_expert=False)
    fields = Fields(quantization, "quantization_config")
    bits = fields.int("bits", default=4, high=16)
    group = fields.int("group_size", default=128, low=-1)
    groups = ceil(matrix.inputs / group) if group > 0 else 1
    packed = matrix.entries * bits // 8 + groups * matrix.outputs * 2 + groups * matrix.outputs * bits // 8
    if method == "awq":
        return packed
    # The order of the inputs; and a bias of 16 bits, where the model has none as well.
    return packed + 4 * matrix.inputs + (0 if matrix.bias else matrix.outputs * 2)


def weights_bytes(model: ModelConfig, dtype: str, num_gpus: int = 1, *, as_in_file: bool = False) -> int:
    """What one GPU holds, or a CPU."""
    if keeps_packed(model, dtype, num_gpus):
        return model.packed_bytes or 0
    element = DTYPE_BYTES[dtype]
    parts = (*matrices(in_type(model, dtype), num_gpus), *tables(model, num_gpus))
    held = sum(m.count * matrix_bytes(m, model.quantization, element, as_in_file=as_in_file) for m in parts)
    return held + _norm_entries(model) * (DTYPE_BYTES["float32"] if model.norms_around_one else element)


def as_held(model: ModelConfig, facts: DeviceFacts) -> ModelConfig:
    """As the device holds it: only on a CPU, by our kernels, do a GGUF file's weights and other files' packed experts stay
    packed."""
    if facts.kind == "cpu" and not facts.unpacks:
        return msgspec.structs.replace(model, packs_experts=True)
    return msgspec.structs.replace(model, packed_bytes=None)


def in_type(model: ModelConfig, dtype: str) -> ModelConfig:
    """In float32 experts are unpacked."""
    return msgspec.structs.replace(model, packs_experts=model.packs_experts and dtype != "float32")


def keeps_packed(model: ModelConfig, dtype: str, num_gpus: int) -> bool:
    """In float32 nothing is rounded, so all is unpacked; so are the parts of several processes."""
    return model.packed_bytes is not None and dtype != "float32" and num_gpus == 1


def rounding_of_weights(model: ModelConfig, dtype: str, num_gpus: int = 1) -> int:
    """What the allocator adds: large tensors have memory of their own, in steps of 2 MiB. A layer's experts are one tensor."""
    element, added = DTYPE_BYTES[dtype], 0
    for matrix in (*matrices(in_type(model, dtype), num_gpus), *tables(model, num_gpus)):
        together = model.moe.num_experts if matrix.expert and model.moe is not None else 1
        size = together * matrix_bytes(matrix, model.quantization, element)
        added += matrix.count // together * (rounded_up_bytes(size) - size)
    return added


def read_bytes(model: ModelConfig, dtype: str, num_gpus: int, batch: int) -> float:
    """What one decoding step of ``batch`` sequences reads of one GPU's weights.

    Of E experts, a layer with n tokens that choose k each touches E * (1 - (1 - k/E)^n) on average.
    """
    element = DTYPE_BYTES[dtype]
    total = 0.0
    for matrix in (*matrices(in_type(model, dtype), num_gpus), *tables(model, num_gpus)):
        share = 1 - (1 - matrix.read_share) ** batch if 0 < matrix.read_share < 1 else matrix.read_share
        total += share * matrix.count * matrix_bytes(matrix, model.quantization, element)
    if keeps_packed(model, dtype, num_gpus):
        plain = msgspec.structs.replace(model, packed_bytes=None)
        total *= weights_bytes(model, dtype, num_gpus) / weights_bytes(plain, dtype, num_gpus)
    return total


def num_parameters(model: ModelConfig, *, active: bool = False) -> int:
    """All of them, or those that one token's step multiplies with."""
    total = 0.0
    for matrix in (*matrices(model), *tables(model)):
        share = matrix.read_share if active else 1.0
        total += share * matrix.count * (matrix.entries + (matrix.outputs if matrix.bias else 0))
    return round(total) + (0 if active else _norm_entries(model))


def _norm_entries(model: ModelConfig) -> int:
    of_attention = 2 * model.head_dim if model.qk_norm else 0
    delta = model.delta
    in_deltas = len(delta.layers) * (2 * delta.num_value_heads + delta.value_dim) if delta is not None else 0
    of_blocks = (2 * model.num_layers + 1) * model.hidden_size
    return of_blocks + len(model.attention_layers) * of_attention + in_deltas


def largest_unpacked_bytes(model: ModelConfig, num_gpus: int, element: int) -> int:
    """The largest matrix as plain numbers: quantized products of many rows unpack it first."""
    if model.quantization is None:
        return 0
    return max(m.entries for m in matrices(model, num_gpus) if m.packed) * element


def num_tensors(model: ModelConfig) -> int:
    """Large tensors that the engine allocates: of each layer four matrices (experts lie in two) and two of the cache."""
    return model.num_layers * (4 + 2) + 2


def _mlp(
    count: int, hidden: int, size: int, bias: bool, expert_share: float | None = None, unpacked: bool = False
) -> Iterator[Matrix]:
    expert, share = expert_share is not None, 1.0 if expert_share is None else expert_share
    yield Matrix(count, hidden, 2 * size, bias, expert=expert, unpacked=unpacked, read_share=share)
    yield Matrix(count, size, hidden, bias, expert=expert, unpacked=unpacked, read_share=share)
