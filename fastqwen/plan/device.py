"""What a device lets an engine have: its type of numbers, and its share of the memory."""

from __future__ import annotations

from fastqwen import quant
from fastqwen.errors import BadConfig
from fastqwen.model_config import ModelConfig
from fastqwen.plan.facts import GIB, DeviceFacts
from fastqwen.plan.memory import Need

CPU_KV_BYTES = 4 * GIB
MIN_BF16_CAPABILITY = (8, 0)


def choose_dtype(wished: str, model: ModelConfig, facts: DeviceFacts) -> tuple[str, list[str]]:
    """``auto`` is bfloat16 where the device computes it, else float16, and says so. Raises BadConfig."""
    has_bf16 = facts.kind == "cpu" or (facts.compute_capability or (0, 0)) >= MIN_BF16_CAPABILITY
    if wished == "bfloat16" and not has_bf16:
        major, minor = facts.compute_capability or (0, 0)
        raise BadConfig(
            f"{facts.name} has compute capability {major}.{minor}, bfloat16 needs 8.0 or more: use --dtype float16"
        )
    if wished != "auto":
        return wished, []
    if model.dtype == "float32" and facts.kind == "cpu":
        return "float32", []
    preferred = quant.preferred_dtype(model.quantization)
    if preferred is not None and facts.kind == "cuda":
        return preferred, []
    if has_bf16:
        return "bfloat16", []
    return "float16", [f"{facts.name} does not compute in bfloat16, so float16 is used"]


def budget_bytes(need: Need, facts: DeviceFacts, utilization: float) -> int:
    """What the engine may take: its share of a GPU less what others hold; on a CPU a cache of bounded size."""
    if facts.kind == "cpu":
        return need.fixed + max(0, min(CPU_KV_BYTES, (facts.free_bytes - need.weights) // 2))
    return int(facts.total_bytes * utilization) - (facts.total_bytes - facts.free_bytes)
