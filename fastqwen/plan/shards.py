"""What is held or computed twice, or for nothing, where a model's sizes do not divide by the number of its shards."""

from __future__ import annotations

from collections.abc import Iterator

from fastqwen.model_config import ModelConfig
from fastqwen.plan.weights import num_dense_layers


def uneven_sizes(model: ModelConfig, count: int) -> list[str]:
    """One line, or none where all divide."""
    found = [f"{what} as {held} instead of {size} ({held / size - 1:+.0%})" for what, size, held in _held(model, count)]
    return [f"--tensor-parallel-size {count}: all shards together hold {', '.join(found)}"] if found else []


def _held(model: ModelConfig, count: int) -> Iterator[tuple[str, int, int]]:
    """What, its size, and the sum over all shards, where they differ. The vocabulary's few lines are left out."""
    local = model.local(count)
    sizes = [("heads", model.num_heads, local.num_heads), ("key-value heads", model.num_kv_heads, local.num_kv_heads)]
    if num_dense_layers(model):
        sizes.append(("feed-forward size", model.intermediate_size, local.intermediate_size))
    if model.moe is not None and local.moe is not None:
        sizes.append(("expert size", model.moe.expert_size, local.moe.expert_size))
        if model.moe.shared_size:
            sizes.append(("shared expert size", model.moe.shared_size, local.moe.shared_size))
    if model.delta is not None and local.delta is not None:
        sizes += [
            ("linear attention's key heads", model.delta.num_key_heads, local.delta.num_key_heads),
            ("linear attention's value heads", model.delta.num_value_heads, local.delta.num_value_heads),
        ]
    for what, size, of_one in sizes:
        if count * of_one != size:
            yield what, size, count * of_one
