"""The model of memory: what one GPU must hold, term by term. Every term follows from sizes and the engine's profile."""

from __future__ import annotations

import functools
from math import ceil

import msgspec

from fastqwen.config import KV_CACHE_DTYPES
from fastqwen.errors import BadConfig
from fastqwen.kernels.limits import (
    CACHE_SCALE_BYTES,
    DECODE_PARTS,
    DECODE_ROWS,
    DOTS_CAPABILITY,
    FUSED_ROWS,
    LIBRARY_ATTENTION_CAPABILITY,
    MAX_BENT,
    PACKED_SUMS,
    PACKED_TILES,
    PLAIN_BYTES,
    SPLIT_BLOCKS,
    SPLIT_PARTS,
    WISH_WORDS,
    graph_batches,
    graph_tokens,
)
from fastqwen.model_config import ModelConfig
from fastqwen.plan.buffers import Sizes, graph_buffers, most_taken
from fastqwen.plan.facts import (
    CUBLAS_BYTES,
    CUBLAS_CAPABILITY,
    DTYPE_BYTES,
    FASTQWEN_GPU,
    GRAPH_NODE_BYTES,
    KERNELS_PER_LAYER,
    OLD_CUBLAS_BYTES,
    DeviceFacts,
    EngineProfile,
)
from fastqwen.plan.states import bytes_of_slot
from fastqwen.plan.steps import step_tokens as usual_step_tokens
from fastqwen.plan.weights import (
    as_held,
    largest_unpacked_bytes,
    num_dense_layers,
    num_parameters,
    num_tensors,
    rounding_of_weights,
    weights_bytes,
)

UNKNOWN_MULTIPROCESSORS = 132
FIXED_TERMS = (
    "weights", "activations", "sampler", "workspace", "state", "states", "graphs", "runtime", "collectives", "rounding",
)  # fmt: skip


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine is to hold: the wishes that memory depends on."""

    dtype: str
    max_model_len: int
    concurrency: int = 1
    num_gpus: int = 1
    kv_cache_dtype: str = "auto"
    enforce_eager: bool = False
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    max_state_snapshots: int | None = None


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes on one GPU."""

    weights: int
    kv_cache: int
    activations: int  # the step's buffers between the layers
    sampler: int
    workspace: int  # unpacked weights, laid-out context, split attention
    state: int  # token ids and block tables of all sequences
    states: int  # what layers of fixed state keep of the wished sequences
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
        return sum(getattr(self, term) for term in FIXED_TERMS)

    @property
    def total_all_gpus(self) -> int:
        return self.total * self.num_gpus


def kv_bytes_per_token(model: ModelConfig, dtype: str, *, num_gpus: int = 1, kv_cache_dtype: str = "auto") -> int:
    """Keys and values of all layers, on one GPU. Numbers of 8 bits have a scale for each head's key and value."""
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise BadConfig(f"--kv-cache-dtype is {kv_cache_dtype!r}; possible: {', '.join(KV_CACHE_DTYPES)}")
    local = model.local(num_gpus)
    name = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
    if name in DTYPE_BYTES:
        return local.kv_bytes_per_token(DTYPE_BYTES[name])
    return local.kv_bytes_per_token(1, CACHE_SCALE_BYTES)


def predict(model: ModelConfig, load: Load, profile: EngineProfile, facts: DeviceFacts) -> Need:
    """Raises BadConfig for a number of GPUs that cannot be."""
    model = as_held(model, facts)
    gpus, element = load.num_gpus, DTYPE_BYTES[load.dtype]
    per_token = kv_bytes_per_token(model, load.dtype, num_gpus=gpus, kv_cache_dtype=load.kv_cache_dtype)
    block_size = load.block_size or profile.block_size
    blocks_each = ceil(load.max_model_len / block_size)
    max_num_seqs = max(load.concurrency, load.max_num_seqs or profile.max_num_seqs)
    same = _Same(model)
    common = {
        "weights": _weights(same, load.dtype, gpus, profile.keeps_file_layout),
        "kv_cache": load.concurrency * blocks_each * block_size * per_token,
        "states": _states(model, load, facts),
        "runtime": profile.library_bytes
        + profile.context_bytes_per_multiprocessor * (facts.multiprocessors or UNKNOWN_MULTIPROCESSORS),
        "collectives": profile.collective_bytes if gpus > 1 else 0,
        "kv_bytes_per_token": per_token,
        "num_gpus": gpus,
    }
    if profile.is_fastqwen_gpu:
        # Each sequence has a slot, and there is one for padding, whose block is padding as well.
        words = load.max_model_len + 2 + blocks_each + 1 + WISH_WORDS + 2 * MAX_BENT + 1
        slot = 4 * words + 2 * model.rotary_dim
        state = (max_num_seqs + 1) * slot + block_size * per_token
        tokens = load.max_num_batched_tokens or usual_step_tokens(_active_parameters(same), facts)
        capability = facts.compute_capability or LIBRARY_ATTENTION_CAPABILITY
        terms = _fastqwen_terms(same, load.dtype, gpus, tokens, max_num_seqs, capability, load.enforce_eager)
        return Need(**common, state=state, **terms)
    step = step_tokens(load, profile)
    rows = min(max_num_seqs, step) if profile.step_tokens is not None else max_num_seqs
    return Need(
        **common,
        activations=step * activation_bytes_per_token(model, gpus, element),
        sampler=rows * model.vocab_size * profile.sampler_bytes,
        workspace=largest_unpacked_bytes(model, gpus, element),
        state=4 * max_num_seqs * (load.max_model_len + 1 + blocks_each),
        graphs=0,
        rounding=num_tensors(model) * profile.rounding_bytes,
    )


def _states(model: ModelConfig, load: Load, facts: DeviceFacts) -> int:
    """Of as many sequences as are to run at once, the wished copies, and a slot that pads steps."""
    each = bytes_of_slot(model, load.dtype, facts, num_gpus=load.num_gpus)
    return each * (max(load.concurrency, load.max_num_seqs or 0) + 1 + (load.max_state_snapshots or 0))


class _Same:
    """A model as the key of a cache: it holds a dictionary, so it has no hash of its own, but nobody changes it."""

    __slots__ = ("model",)

    def __init__(self, model: ModelConfig) -> None:
        self.model = model

    def __hash__(self) -> int:
        return id(self.model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.model is self.model


@functools.lru_cache(maxsize=1024)
def _weights(same: _Same, dtype: str, num_gpus: int, as_in_file: bool) -> int:
    return weights_bytes(same.model, dtype, num_gpus, as_in_file=as_in_file)


@functools.lru_cache(maxsize=1024)
def _active_parameters(same: _Same) -> int:
    return num_parameters(same.model, active=True)


@functools.lru_cache(maxsize=1024)
def _fastqwen_terms(
    same: _Same,
    dtype: str,
    num_gpus: int,
    tokens: int,
    max_num_seqs: int,
    capability: tuple[int, int],
    eager: bool,
) -> dict[str, int]:
    """Steps, graphs, kernels' scratch and what the allocator keeps."""
    model, element = same.model, DTYPE_BYTES[dtype]
    by_library = capability >= LIBRARY_ATTENTION_CAPABILITY or capability < DOTS_CAPABILITY
    steps = most_taken(model, num_gpus, element, tokens, max_num_seqs, library_attention=by_library)
    cublas = CUBLAS_BYTES if capability >= CUBLAS_CAPABILITY else OLD_CUBLAS_BYTES
    graphs = 0
    if not eager:
        batches, prompts = graph_batches(max_num_seqs), graph_tokens(tokens)
        sizes = Sizes.of(model, num_gpus, element, library_attention=by_library)
        nodes = (len(batches) + len(prompts)) * model.num_layers * KERNELS_PER_LAYER
        graphs = nodes * GRAPH_NODE_BYTES + graph_buffers(sizes, batches, prompts, max_num_seqs)
        graphs += cublas if max(batches[-1], prompts[-1]) > FUSED_ROWS else 0
    kept = steps.reserved - steps.total
    in_steps = 2 * len(model.attention_layers) * FASTQWEN_GPU.rounding_bytes  # of the cache's tensors
    return {
        "activations": steps.layers,
        "sampler": steps.total - steps.layers,
        "workspace": cublas + _scratch(model, num_gpus),
        "graphs": graphs,
        "rounding": kept + rounding_of_weights(model, dtype, num_gpus) + in_steps,
    }


def _scratch(model: ModelConfig, num_gpus: int) -> int:
    """What kernels set aside once: parts of split products and split contexts; a piece of a packed matrix as plain numbers."""
    split = 4 * (SPLIT_PARTS + SPLIT_BLOCKS)
    local = model.local(num_gpus)
    group = max(1, local.num_heads // local.num_kv_heads)
    decode = 4 * (DECODE_PARTS * group * (model.head_dim + 2) + DECODE_ROWS * local.num_kv_heads)
    packed = PLAIN_BYTES + 4 * (2 * UNKNOWN_MULTIPROCESSORS * PACKED_SUMS + PACKED_TILES)
    return split + decode + (packed if model.quantization is not None else 0)


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
    local, hidden = model.local(num_gpus), model.hidden_size
    # q, k, v; rotated q; what attention returns
    gates = local.q_size if local.attention_gate else 0
    attention = 3 * hidden + (local.q_size + 2 * local.kv_size + gates) + 2 * local.q_size
    if local.delta is not None:
        delta = local.delta
        attention = max(attention, 2 * hidden + 3 * (delta.channels + delta.value_size))
    feed_forward = 0
    if num_dense_layers(model):
        feed_forward = 3 * hidden + 3 * local.intermediate_size  # gate and up; their product
    if local.moe is not None:
        moe = local.moe
        chosen = moe.experts_per_token * (3 * moe.expert_size + hidden)
        router = ceil(4 * moe.num_experts / element)  # float32
        feed_forward = max(feed_forward, 3 * hidden + chosen + 3 * moe.shared_size + router)
    tables = 4 * model.head_dim + 6 * 8  # cosines and sines in float32; ids, positions, rows, slots
    return max(attention, feed_forward) * element + tables
