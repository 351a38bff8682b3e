"""Checkpoints of llm-compressor and its like (the format is described in vllm-project/compressed-tensors): of theirs, FP8
weights with one scale for a matrix, for each output, or for each block."""

from __future__ import annotations

from typing import Any

from fastqwen.errors import BadCheckpoint, Unsupported
from fastqwen.model_config import Fields, short
from fastqwen.quant import tell_unknown
from fastqwen.quant.fp8 import SCALES, Fp8, Scheme

FORMATS = ("float-quantized", "naive-quantized")
# How activations were scaled, and which modules stayed as they were, which the tensors show.
SILENT = frozenset((
    "quant_method", "ignore", "quantization_status", "global_compression_ratio", "kv_cache_scheme", "version",
    "transform_config", "sparsity_config",
))  # fmt: skip


def from_config(config: dict[str, Any], source: str) -> Fp8:
    """Raises Unsupported for what is not FP8, BadCheckpoint for a value that cannot be."""
    fields = Fields(config, f"{source}: quantization_config")
    for key in ("transform_config", "sparsity_config"):  # they change what the numbers mean
        value = fields.get(key)
        if isinstance(value, dict) and value and value.get("format") != "dense":
            raise Unsupported(f"{fields.source}: {key} {short(value)} is not supported")
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()) or not groups:
        raise BadCheckpoint(f"{fields.source}: config_groups is {short(groups)}, expected an object of objects")
    schemes = {_scheme(group, fields) for group in groups.values()}
    if len(schemes) > 1:
        raise Unsupported(f"{fields.source}: config_groups store modules in different ways, which is not supported")
    tell_unknown(fields, SILENT)
    return Fp8(schemes.pop(), tuple(fields.notices))


def _scheme(group: dict[str, Any], fields: Fields) -> Scheme:
    layout = group.get("format") or fields.get("format")
    weights = Fields(group.get("weights") or {}, f"{fields.source}: weights of config_groups")
    kind, bits = weights.get("type"), weights.get("num_bits")
    if layout not in FORMATS or kind != "float" or bits != 8:
        raise Unsupported(
            f"{fields.source}: format {short(layout)} with weights of type {short(kind)} and {short(bits)} bits is not "
            f"supported; supported: float of 8 bits in {' or '.join(FORMATS)}"
        )
    weights.require("symmetric", (True,))
    weights.require("dynamic", (False,))
    strategy, block = weights.get("strategy"), weights.get("block_structure")
    if strategy == "tensor":
        return Scheme(None, None, SCALES)
    if strategy == "channel":
        return Scheme(1, None, SCALES)
    if (
        strategy == "block"
        and isinstance(block, list)
        and len(block) == 2
        and all(type(n) is int and n > 0 for n in block)
    ):
        return Scheme(block[0], block[1], SCALES)
    raise Unsupported(
        f"{weights.source}: strategy {short(strategy)} with block_structure {short(block)} is not supported; supported: "
        "tensor, channel, and block with two whole numbers"
    )
