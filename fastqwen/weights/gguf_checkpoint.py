"""A GGUF's tensors as a checkpoint, under the names of fastqwen/models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastqwen import models
from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.kernels import CodedWeight
from fastqwen.model_config import ModelConfig
from fastqwen.models.names import Names
from fastqwen.sharding import Part
from fastqwen.weights.gguf_config import GATE_UP, NAMES, ROPE_FACTORS
from fastqwen.weights.gguf_file import GgufFile
from fastqwen.weights.gguf_reader import short
from fastqwen.weights.gguf_types import Split, TensorType

if TYPE_CHECKING:
    from torch import Tensor

MAX_TENSOR_NAMES = 2**20  # one per expert and matrix; the largest Qwen3-MoE has some 36 thousand


class _Place(NamedTuple):
    tensor: str  # the GGUF's name for it
    shape: tuple[int, ...]
    expert: int | None = None  # its index in a stacked tensor
    half: int | None = None  # of gate and up in one
    rotary_heads: int | None = None  # the rows of each of so many heads are interleaved


class GgufCheckpoint:
    """A TensorFile. Raises Unsupported for tensors that the architecture does not have: they would change the answers."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        self._file = file
        self._places: dict[str, _Place] = {}
        for name, place in _places(file, config):
            self._places[name] = place
            if len(self._places) > MAX_TENSOR_NAMES:
                raise BadCheckpoint(f"{file.path}: more than {MAX_TENSOR_NAMES} matrices, which no real model has")
        self._refuse_unknown_tensors(config.model_type)

    def names(self) -> list[str]:
        return list(self._places)

    def location(self, name: str) -> str:
        return str(self._file.path)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """A packed tensor is unpacked as a whole."""
        from fastqwen.weights.source import cut  # needs torch, and reading a configuration does not

        place = self._places[name]
        if place.expert is not None:
            matrix = self._file.read_part(place.tensor, place.expert)
            return cut(matrix if place.half is None else matrix.chunk(2)[place.half], part)
        tensor = self._file.read(place.tensor)
        if place.rotary_heads is not None:
            tensor = _halves(tensor, place.rotary_heads)
        return cut(tensor.view(place.shape), part)

    def codes(self, name: str) -> CodedWeight | None:
        """None: plain numbers."""
        place = self._places[name]
        kind = self._file.tensors[place.tensor].type
        found = self._file.split(place.tensor, place.expert)
        if found is None:
            return None
        if place.half is not None:  # gate and up of an expert are one matrix in the file
            both = _coded(found, kind, (2 * place.shape[0], place.shape[1]))
            return _each(both, lambda one: one.chunk(2)[place.half or 0])
        coded = _coded(found, kind, place.shape)
        heads = place.rotary_heads
        return coded if heads is None else _each(coded, lambda one: _halves(one, heads))

    def rows(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """Some rows of a packed matrix, ids [n] -> float32 [n, columns]; None: it holds plain numbers."""
        place = self._places[name]
        if self._file.tensors[place.tensor].type.split is None:
            return None
        return lambda ids: self._file.read_rows(place.tensor, ids.tolist())

    def _refuse_unknown_tensors(self, model_type: str) -> None:
        known = {place.tensor for place in self._places.values()} | {ROPE_FACTORS}
        unknown = [name for name in self._file.tensors if name not in known]
        if unknown:
            raise Unsupported(
                f"{self._file.path}: {len(unknown)} tensors have no place in a {model_type} model, "
                f"the first is {short(unknown[0])}"
            )


def _coded(found: Split, kind: TensorType, shape: tuple[int, ...]) -> CodedWeight:
    """A block's groups side by side, as rows of a matrix."""
    import torch

    def rows(numbers: np.ndarray[Any, Any] | None) -> Tensor | None:
        return None if numbers is None else torch.from_numpy(np.ascontiguousarray(numbers)).view(shape[0], -1)

    codes, scales = rows(found.codes), rows(found.scale)
    assert codes is not None and scales is not None
    return CodedWeight(
        codes=codes,
        bits=kind.bits,
        zero=found.zero,
        scales=scales,
        group_size=kind.block_elements,
        part_size=found.codes.shape[2],
        parts=rows(found.part),
        minima=rows(found.minimum),
        min_parts=rows(found.min_part),
    )


def _each(coded: CodedWeight, change: Callable[[Tensor], Tensor]) -> CodedWeight:
    """All tensors, whose rows are those of the matrix, changed alike."""
    tensors: dict[str, Any] = {
        name: getattr(coded, name) for name in ("codes", "scales", "parts", "minima", "min_parts")
    }
    tensors = {name: one if one is None else change(one) for name, one in tensors.items()}
    return replace(coded, **tensors)


def _halves(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows [heads, pairs, 2] to [heads, 2, pairs]: from the rotation of neighbours to that of a head's halves."""
    pairs = tensor.shape[0] // num_heads // 2
    return tensor.view(num_heads, pairs, 2, -1).transpose(1, 2).reshape(tensor.shape)


def _places(file: GgufFile, config: ModelConfig) -> Iterator[tuple[str, _Place]]:
    """Our name and its place for all that the model has and the file holds; what it lacks, a reader will miss by name."""
    ours: Names = models.find(config.model_type).NAMES
    for field in ("embed", "final_norm", "head"):
        tensor = f"{getattr(NAMES, field)}.weight"
        if tensor in file.tensors:
            yield f"{getattr(ours, field)}.weight", _Place(tensor, file.tensors[tensor].shape)
    for layer in range(config.num_layers):
        for field, suffix in _layer_fields(config, layer):
            prefix, gguf_prefix = ours.layer.format(layer=layer), NAMES.layer.format(layer=layer)
            both = f"{NAMES.layer.format(layer=layer)}{GATE_UP}.weight"
            if field == "expert_gate_up" and both in file.tensors:
                yield from _halves_of_experts(file, config, ours.layer.format(layer=layer), ours.expert_gate_up, both)
            for name, gguf_name in zip(_tuple(getattr(ours, field)), _tuple(getattr(NAMES, field)), strict=True):
                if (tensor := f"{gguf_prefix}{gguf_name}{suffix}") in file.tensors:
                    yield from _places_of(file, config, f"{prefix}{name}{suffix}", tensor)


def _halves_of_experts(
    file: GgufFile, config: ModelConfig, prefix: str, names: tuple[str, str], tensor: str
) -> Iterator[tuple[str, _Place]]:
    shape = file.tensors[tensor].shape
    if config.moe is None or len(shape) != 3 or shape[0] != config.moe.num_experts or shape[1] % 2:
        raise BadCheckpoint(f"{file.path}: tensor {tensor} has shape {list(shape)}, expected two matrices per expert")
    for expert in range(shape[0]):
        for half, name in enumerate(names):
            place = _Place(tensor, (shape[1] // 2, shape[2]), expert, half)
            yield f"{prefix}{name.format(expert=expert)}.weight", place


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _layer_fields(config: ModelConfig, layer: int) -> list[tuple[str, str]]:
    """The fields of Names that this layer has, each with a suffix."""
    weights = ["attention_norm", "qkv", "o", "mlp_norm"]
    weights += ["q_norm", "k_norm"] if config.qk_norm else []
    biases = ["qkv"] if config.qkv_bias else []
    biases += ["o"] if config.o_bias else []
    if config.moe is None or not config.is_sparse(layer):
        weights += ["gate_up", "down"]
        biases += ["gate_up", "down"] if config.mlp_bias else []
    else:
        weights += ["router", "expert_gate_up", "expert_down"]
        weights += ["shared_gate_up", "shared_down", "shared_gate"] if config.moe.shared_size else []
    return [(field, ".weight") for field in weights] + [(field, ".bias") for field in biases]


def _places_of(file: GgufFile, config: ModelConfig, name: str, tensor: str) -> Iterator[tuple[str, _Place]]:
    shape = file.tensors[tensor].shape
    gguf_name = tensor.split(".")[2]
    if "{expert}" in name:
        if config.moe is None or len(shape) != 3 or shape[0] != config.moe.num_experts:
            raise BadCheckpoint(f"{file.path}: tensor {tensor} has shape {list(shape)}, expected one matrix per expert")
        for expert in range(shape[0]):
            yield name.format(expert=expert), _Place(tensor, shape[1:], expert)
    elif gguf_name == NAMES.shared_gate and len(shape) == 1:
        yield name, _Place(tensor, (1, *shape))
    elif config.model_type == "llama" and gguf_name in NAMES.qkv[:2]:
        heads = config.num_heads if gguf_name == NAMES.qkv[0] else config.num_kv_heads
        if shape[0] != heads * config.head_dim:
            raise BadCheckpoint(
                f"{file.path}: tensor {tensor} has {shape[0]} rows for {heads} heads of {config.head_dim}"
            )
        yield name, _Place(tensor, shape, rotary_heads=heads)
    else:
        yield name, _Place(tensor, shape)
