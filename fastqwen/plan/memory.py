"""The model of memory: what one GPU must hold, term by term. Every term follows from sizes and the engine's profile."""

from __future__ import annotations

from math import ceil

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.model_config import ModelConfig
from fastqwen.plan.facts import DTYPE_BYTES, KERNELS_PER_LAYER, DeviceFacts, EngineProfile
from fastqwen.plan.weights import (
    check_num_gpus,
    kv_heads_per_gpu,
    largest_unpacked_bytes,
    num_dense_layers,
    num_tensors,
    weights_bytes,
)

KV_CACHE_DTYPES = ("auto", "fp8", "fp8_e4m3", "fp8_e5m2", "int8")
UNKNOWN_MULTIPROCESSORS = 132


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is to hold: the wishes that memory depends on."""

    dtype: str
    max_model_len: int
    concurrency: int = 1
    num_gpus: int = 1
    kv_cache_dtype: str = "auto"
    eager: bool = False
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one GPU."""

    weights: int
    kv_cache: int
    activations: int  # the step's buffers between the layers
    sampler: int
    workspace: int  # unpacked weights, laid-out context, split attention
    state: int  # token ids and block tables of all sequences
    graphs: int
    runtime: int  # context, kernels, libraries
    collectives: int
    rounding: int
    kv_bytes_per_token: int
    num_gpus: int

    @property
    def total(self) -> int:
        """What one GPU must hold."""
        return self.kv_cache + self.fixed

    @property
    def fixed(self) -> int:
        """All but the cache."""
        return (
            self.weights
            + self.activations
            + self.sampler
            + self.workspace
            + self.state
            + self.graphs
            + self.runtime
            + self.collectives
            + self.rounding
        )

    @property
    def total_all_gpus(self) -> int:
        return self.total * self.num_gpus


def kv_bytes_per_token(model: ModelConfig, dtype: str, *, num_gpus: int = 1, kv_cache_dtype: str = "auto") -> int:
    """Keys and values of all layers, on one GPU. int8 has a float16 scale for each head's key and value."""
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise BadConfig(f"--kv-cache-dtype is {kv_cache_dtype!r}; possible: {', '.join(KV_CACHE_DTYPES)}")
    heads = kv_heads_per_gpu(model, num_gpus)
    per_head = model.head_dim * (DTYPE_BYTES[dtype] if kv_cache_dtype == "auto" else 1)
    if kv_cache_dtype == "int8":
        per_head += 2
    return 2 * model.num_layers * heads * per_head


def predict(model: ModelConfig, load: Load, profile: EngineProfile, facts: DeviceFacts) -> Need:
    """Raises BadConfig for a number of GPUs that cannot be."""
    check_num_gpus(model, load.num_gpus)
    gpus, element = load.num_gpus, DTYPE_BYTES[load.dtype]
    per_token = kv_bytes_per_token(model, load.dtype, num_gpus=gpus, kv_cache_dtype=load.kv_cache_dtype)
    block_size = load.block_size or profile.block_size
    blocks_each = ceil(load.max_model_len / block_size)
    max_num_seqs = max(load.concurrency, load.max_num_seqs or profile.max_num_seqs)
    step = step_tokens(load, profile)
    rows = min(max_num_seqs, step) if profile.step_tokens is not None else max_num_seqs
    graphs = 0 if load.eager else profile.graph_batches * model.num_layers * KERNELS_PER_LAYER
    return Need(
        weights=weights_bytes(model, load.dtype, gpus),
        kv_cache=load.concurrency * blocks_each * block_size * per_token,
        activations=step * activation_bytes_per_token(model, gpus, element),
        sampler=rows * model.vocab_size * profile.sampler_bytes,
        workspace=_workspace(model, load, profile, element),
        state=4 * max_num_seqs * (load.max_model_len + 1 + blocks_each),
        graphs=graphs * profile.graph_node_bytes,
        runtime=profile.library_bytes
        + profile.context_bytes_per_multiprocessor * (facts.multiprocessors or UNKNOWN_MULTIPROCESSORS),
        collectives=profile.collective_bytes if gpus > 1 else 0,
        rounding=num_tensors(model) * profile.rounding_bytes,
        kv_bytes_per_token=per_token,
        num_gpus=gpus,
    )


def step_tokens(load: Load, profile: EngineProfile) -> int:
    """Tokens of the longest step: a chunk, or a whole prompt where the engine does not cut prompts."""
    longest = max(load.max_model_len, profile.least_step_tokens)
    if profile.step_tokens is None:
        return longest
    chunk = load.max_num_batched_tokens or profile.step_tokens
    return min(chunk, max(longest, load.concurrency * load.max_model_len))


def activation_bytes_per_token(model: ModelConfig, num_gpus: int, element: int) -> int:
    """The larger of what lives together in attention and in the feed-forward part, and the step's own tables.

    Residual, normed input and output have the model's full width on every GPU; the rest is split.
    """
    hidden = model.hidden_size
    queries = model.q_size // num_gpus
    keys_values = 2 * kv_heads_per_gpu(model, num_gpus) * model.head_dim
    attention = 3 * hidden + (queries + keys_values) + 2 * queries  # q, k, v; rotated q; what attention returns
    feed_forward = 0
    if num_dense_layers(model):
        feed_forward = 3 * hidden + 3 * ceil(model.intermediate_size / num_gpus)  # gate and up; their product
    if model.moe is not None:
        moe = model.moe
        chosen = moe.experts_per_token * (3 * ceil(moe.expert_size / num_gpus) + hidden)
        shared = 3 * ceil(moe.shared_size / num_gpus)
        router = ceil(4 * moe.num_experts / element)  # float32
        feed_forward = max(feed_forward, 3 * hidden + chosen + shared + router)
    tables = 4 * model.head_dim + 6 * 8  # cosines and sines in float32; ids, positions, rows, slots
    return max(attention, feed_forward) * element + tables


def _workspace(model: ModelConfig, load: Load, profile: EngineProfile, element: int) -> int:
    gpus = load.num_gpus
    unpacked = largest_unpacked_bytes(model, gpus, element)
    if not profile.gathers_context:
        return unpacked
    heads = model.num_heads // gpus
    context = 2 * load.max_model_len * kv_heads_per_gpu(model, gpus) * model.head_dim * element  # of one layer
    sums = 4 * step_tokens(load, profile) * heads  # a softmax sum for each token and head
    return unpacked + context + sums
