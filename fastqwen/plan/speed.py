"""How fast decoding can be: a step must read the weights and the cache once, and compute on both."""

from __future__ import annotations

import msgspec

from fastqwen.model_config import ModelConfig
from fastqwen.plan.facts import KERNELS_PER_LAYER, DeviceFacts
from fastqwen.plan.memory import Load, kv_bytes_per_token
from fastqwen.plan.weights import num_parameters, read_bytes

# Of one H200's data sheet: reading reached 4.12 of 4.8 TB/s, large products 775 of 989 TFLOP/s.
BEST_BANDWIDTH = 4.12 / 4.8
BEST_COMPUTE = 775 / 989
# cuBLAS' product of one row with a 4096 x 4096 matrix reached 2.66 TB/s there.
USUAL_BANDWIDTH = 2.66 / 4.8
NODE_S = 1.1e-6  # a node in a CUDA graph
LAUNCH_S = 7.1e-6  # a launch without one, or one that waits for the host
ALL_REDUCE_S = 10e-6  # two a layer: a message through all GPUs, mostly waiting


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Output tokens per second of all sequences together: what a good and what a usual engine reaches."""

    batch: int
    context_tokens: int
    low: float
    high: float


def decode_speed(model: ModelConfig, load: Load, slow: DeviceFacts, fast: DeviceFacts, *, batch: int) -> Speed | None:
    """With sequences that are half as long as planned. None if the device's bandwidth is unknown."""
    if slow.bandwidth_gb_s is None or fast.bandwidth_gb_s is None:
        return None
    context = max(1, load.max_model_len // 2)
    kernels = model.num_layers * KERNELS_PER_LAYER
    waits = 2 * model.num_layers * ALL_REDUCE_S if load.num_gpus > 1 else 0.0
    best = _step_s(model, load, fast, batch, context, BEST_BANDWIDTH) + kernels * NODE_S + waits
    usual = _step_s(model, load, slow, batch, context, USUAL_BANDWIDTH)
    usual += kernels * LAUNCH_S + waits
    return Speed(batch=batch, context_tokens=context, low=batch / usual, high=batch / best)


def _step_s(
    model: ModelConfig, load: Load, facts: DeviceFacts, batch: int, context_tokens: int, efficiency: float
) -> float:
    per_token = kv_bytes_per_token(model, load.dtype, num_gpus=load.num_gpus, kv_cache_dtype=load.kv_cache_dtype)
    weights = read_bytes(model, load.dtype, load.num_gpus, batch)
    assert facts.bandwidth_gb_s is not None
    reading = (weights + batch * context_tokens * per_token) / (facts.bandwidth_gb_s * 1e9 * efficiency)
    if facts.matmul_tflops is None:
        return reading
    attention = 2 * 2 * model.num_layers * model.q_size * context_tokens
    operations = batch * (2 * num_parameters(model, active=True) + attention) / load.num_gpus
    return max(reading, operations / (facts.matmul_tflops * 1e12 * BEST_COMPUTE))
