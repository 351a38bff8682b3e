"""How fast decoding can be: a step must read the weights and the cache once, and compute on both."""

from __future__ import annotations

import msgspec

from fastqwen import quant
from fastqwen.model_config import ModelConfig
from fastqwen.plan.facts import KERNELS_PER_LAYER, DeviceFacts
from fastqwen.plan.generations import generation_of, has_fast_packed
from fastqwen.plan.memory import Load, kv_bytes_per_token
from fastqwen.plan.states import bytes_of_slot
from fastqwen.plan.weights import as_held, num_parameters, read_bytes

MATMUL_SHARE = 775 / 989  # of one H200's data sheet: what large products reached
NODE_S = 1.1e-6  # a node in a CUDA graph
LAUNCH_S = 7.1e-6  # a launch without one
ALL_REDUCE_S = 10e-6  # two a layer: a message through all GPUs, mostly waiting
# Of what a CPU copies (host.measure_bandwidth), a step of one sequence reads so much: docs/planner.md.
CPU_READ = (0.3, 1.0)
CPU_BASIS = "from how fast this machine copies memory"


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Output tokens per second of all sequences together, from the least to the most that is expected; ``basis`` says
    from what."""

    batch: int
    context_tokens: int
    low: float
    high: float
    basis: str

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


def decode_speed(model: ModelConfig, load: Load, slow: DeviceFacts, fast: DeviceFacts, *, batch: int) -> Speed | None:
    """With sequences that are half as long as planned. None where nothing is known that it could be derived from."""
    low, high = _read_share(slow), _read_share(fast)
    if low is None or high is None or not has_fast_packed(quant.method_word(model.quantization), fast):
        return None
    if slow.kind == "cpu" and batch > 1:
        return None  # then products bound it, of whose speed nothing is known
    context = max(1, load.max_model_len // 2)
    kernels = model.num_layers * KERNELS_PER_LAYER if slow.kind == "cuda" else 0
    waits = 2 * model.num_layers * ALL_REDUCE_S if load.num_gpus > 1 else 0.0
    waits += kernels * (LAUNCH_S if load.enforce_eager else NODE_S)
    best = _step_s(model, load, fast, batch, context, high[1]) + waits
    usual = _step_s(model, load, slow, batch, context, low[0]) + waits
    return Speed(batch=batch, context_tokens=context, low=batch / usual, high=batch / best, basis=_basis(slow, fast))


def _basis(slow: DeviceFacts, fast: DeviceFacts) -> str:
    if slow.kind == "cpu":
        return CPU_BASIS
    found = list(dict.fromkeys(generation_of(facts.compute_capability).basis for facts in (slow, fast)))
    return f"{slow.name} to {fast.name}, {', '.join(found)}" if slow.name != fast.name else found[0]


def _read_share(facts: DeviceFacts) -> tuple[float, float] | None:
    """Lowest and highest, of the bandwidth in ``facts``."""
    if facts.bandwidth_gb_s is None:
        return None
    return CPU_READ if facts.kind == "cpu" else generation_of(facts.compute_capability).read


def _step_s(model: ModelConfig, load: Load, facts: DeviceFacts, batch: int, context_tokens: int, share: float) -> float:
    per_token = kv_bytes_per_token(model, load.dtype, num_gpus=load.num_gpus, kv_cache_dtype=load.kv_cache_dtype)
    weights = read_bytes(as_held(model, facts), load.dtype, load.num_gpus, batch)
    assert facts.bandwidth_gb_s is not None
    states = 2 * batch * bytes_of_slot(model, load.dtype, facts, num_gpus=load.num_gpus)  # read and written
    reading = (weights + states + batch * context_tokens * per_token) / (facts.bandwidth_gb_s * 1e9 * share)
    if facts.matmul_tflops is None:
        return reading
    attention = 2 * 2 * len(model.attention_layers) * model.q_size * context_tokens
    operations = batch * (2 * num_parameters(model, active=True) + attention) / load.num_gpus
    return max(reading, operations / (facts.matmul_tflops * 1e12 * MATMUL_SHARE))
