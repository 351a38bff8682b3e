"""The buffers of fastqwen's steps on a GPU, in the order in which the engine makes and drops them.

What is written here follows kernels/triton/ops.py, layers/ and runner/cuda_runner.py; bench/plan_check.py measures it.
"""

from __future__ import annotations

import functools

import msgspec

from fastqwen.kernels.limits import DELTA_CHUNK, FUSED_ROWS, LISTED, MAX_TOLD, SAMPLE_CHUNK, feed_forward_rows
from fastqwen.model_config import ModelConfig
from fastqwen.plan.allocator import Allocator
from fastqwen.plan.weights import num_dense_layers

LEAST_ROWS = 16  # fewer sampled rows are planned like so many: they are little beside the layers


class Sizes(msgspec.Struct, frozen=True):
    """What a layer's buffers depend on, for one GPU; ``element`` is the bytes of a number."""

    hidden: int
    queries: int
    keys: int  # of all key heads; values are as many
    rotary_dim: int
    inner: int  # of the dense feed-forward part, 0 if no layer has one
    experts: int
    chosen: int
    expert_inner: int
    shared_inner: int
    vocab: int
    element: int
    packed: bool  # linears are packed, so nothing is fused with them
    library_attention: bool
    gates: int = 0  # of attention
    delta_width: int = 0  # numbers that a delta layer projects a token to; 0 if no layer is one
    delta_values: int = 0
    delta_scratch: int = 0  # what it keeps of a prompt's token between its kernels

    @classmethod
    def of(cls, model: ModelConfig, num_gpus: int, element: int, *, library_attention: bool) -> Sizes:
        local = model.local(num_gpus)
        moe = local.moe
        return cls(
            hidden=local.hidden_size,
            queries=local.q_size,
            keys=local.kv_size,
            rotary_dim=local.rotary_dim,
            inner=local.intermediate_size if num_dense_layers(model) else 0,
            experts=moe.num_experts if moe is not None else 0,
            chosen=moe.experts_per_token if moe is not None else 0,
            expert_inner=moe.expert_size if moe is not None else 0,
            shared_inner=moe.shared_size if moe is not None else 0,
            vocab=model.vocab_size,
            element=element,
            packed=model.quantization is not None,
            library_attention=library_attention
            and any(model.window(layer) is None for layer in range(model.num_layers)),
            gates=local.q_size if model.attention_gate else 0,
            **_delta_sizes(local),
        )


def _delta_sizes(local: ModelConfig) -> dict[str, int]:
    delta = local.delta
    if delta is None:
        return {}
    heads = delta.num_value_heads
    return {
        "delta_width": delta.channels + delta.value_size + 2 * heads,
        "delta_values": delta.value_size,
        # normalised queries and keys; what a chunk's triangular system gives, and its products of queries and keys
        "delta_scratch": 2 * delta.key_size + delta.value_size + heads * (delta.key_dim + DELTA_CHUNK),
    }


class Taken(msgspec.Struct, frozen=True):
    """Bytes: ``layers`` live at once in the layers, ``total`` with sampling, ``reserved`` of the GPU for them."""

    layers: int
    total: int
    reserved: int


def most_taken(
    model: ModelConfig, num_gpus: int, element: int, tokens: int, rows: int, *, library_attention: bool
) -> Taken:
    """For any number of sampled rows up to the next power of two; a share of a model never takes more than a larger one.

    Both hold of what is needed, but for odd cases not of what the allocator happens to keep: so it is said here.
    """
    sizes = Sizes.of(model, num_gpus, element, library_attention=library_attention)
    count = LEAST_ROWS
    found = largest_steps(sizes, tokens, count)
    while count < rows:
        count *= 2
        larger = largest_steps(sizes, tokens, count)
        found = Taken(larger.layers, larger.total, max(larger.reserved, found.reserved))
    if num_gpus > 1 and num_gpus % 2 == 0:
        fewer = most_taken(model, num_gpus // 2, element, tokens, rows, library_attention=library_attention)
        return Taken(*(min(getattr(found, name), getattr(fewer, name)) for name in Taken.__struct_fields__))
    return found


@functools.lru_cache(maxsize=4096)
def largest_steps(sizes: Sizes, tokens: int, rows: int) -> Taken:
    """Steps of ``tokens`` prompt tokens, as one whole prompt and as a piece of a longer one, and ``rows`` that sample."""
    memory = Allocator()
    for whole in (True, False):
        _prompt_step(memory, sizes, tokens, rows, whole=whole)
    layers = memory.most_allocated
    # Two such steps are in flight, and their sampler may have penalties and log-probabilities to compute.
    for _ in range(2):
        _prompt_step(memory, sizes, tokens, rows, whole=False, adjusted=True)
    return Taken(layers=layers, total=memory.most_allocated, reserved=memory.reserved)


@functools.lru_cache(maxsize=4096)
def graph_buffers(sizes: Sizes, batches: tuple[int, ...], prompts: tuple[int, ...], max_num_seqs: int) -> int:
    """Bytes of the pool that all graphs share; none of them owns what it leaves behind, so the largest decide."""
    memory = Allocator()
    steps = [(max(prompts), min(max(prompts), max_num_seqs), False)] if prompts else []
    steps.append((max(batches), max(batches), True))
    for tokens, rows, decode in sorted(steps, reverse=True):
        memory.take("residual", tokens * sizes.hidden * sizes.element)
        memory.take("cos_sin", tokens * sizes.rotary_dim * 4)
        _layer(memory, sizes, tokens, whole=False, fused=decode and tokens <= FUSED_ROWS)
        _logits(memory, sizes, rows)
        memory.drop("logits", "residual", "cos_sin")
    return memory.reserved


def _prompt_step(
    memory: Allocator, sizes: Sizes, tokens: int, rows: int, *, whole: bool, adjusted: bool = False
) -> None:
    memory.take("cos_sin", tokens * sizes.rotary_dim * 4)
    memory.take("residual", tokens * sizes.hidden * sizes.element)
    for _ in range(2):  # the second layer finds what the first one left
        _layer(memory, sizes, tokens, whole=whole, fused=False)
    _logits(memory, sizes, rows)
    if adjusted:
        _adjusted_logits(memory, sizes, rows)
    memory.drop("logits", "residual", "cos_sin")


def _layer(memory: Allocator, sizes: Sizes, tokens: int, *, whole: bool, fused: bool) -> None:
    _attention(memory, sizes, tokens, whole=whole, fused=fused)
    if sizes.delta_width:
        _delta(memory, sizes, tokens, fused=fused)
    if sizes.experts:
        _experts(memory, sizes, tokens)
    if sizes.inner:
        _mlp(memory, sizes, tokens, fused=fused)


def _attention(memory: Allocator, sizes: Sizes, tokens: int, *, whole: bool, fused: bool) -> None:
    number = tokens * sizes.element
    memory.take("normed", number * sizes.hidden)
    memory.take("qkv", number * (sizes.queries + 2 * sizes.keys + sizes.gates))
    memory.drop("normed")
    memory.take("attended", number * sizes.queries)
    if not fused:  # a decode step rotates and stores within the kernel
        if whole and sizes.library_attention:
            memory.take("q", number * sizes.queries)
            memory.take("k", number * sizes.keys)
            memory.take("v", number * sizes.keys)
            memory.take("found", number * sizes.queries)
            memory.drop("k", "v", "found")
        else:
            memory.take("q", number * sizes.queries)
        memory.drop("q")
    _added(memory, sizes, number)
    memory.drop("qkv", "attended")


def _delta(memory: Allocator, sizes: Sizes, tokens: int, *, fused: bool) -> None:
    number = tokens * sizes.element
    memory.take("normed", number * sizes.hidden)
    memory.take("projected", number * sizes.delta_width)
    memory.drop("normed")
    memory.take("out", number * sizes.delta_values)
    if not fused:
        memory.take("scratch", number * sizes.delta_scratch)
        memory.drop("scratch")
    _added(memory, sizes, number)
    memory.drop("projected", "out")


def _mlp(memory: Allocator, sizes: Sizes, tokens: int, *, fused: bool) -> None:
    number = feed_forward_rows(tokens, 2 * sizes.inner) * sizes.element
    memory.take("normed", number * sizes.hidden)
    if fused and not sizes.packed:
        memory.take("product", number * sizes.inner)
        memory.drop("normed")
    else:
        memory.take("gate_up", number * 2 * sizes.inner)
        memory.drop("normed")
        memory.take("product", number * sizes.inner)
        memory.drop("gate_up")
    _added(memory, sizes, number)
    memory.drop("product")


def _experts(memory: Allocator, sizes: Sizes, tokens: int) -> None:
    number = tokens * sizes.element
    memory.take("normed", number * sizes.hidden)
    memory.take("router", number * sizes.experts)
    memory.take("chosen", tokens * sizes.chosen * 4)
    memory.take("shares", tokens * sizes.chosen * 4)
    memory.take("members", tokens * sizes.experts * 4)
    memory.take("product", number * sizes.chosen * sizes.expert_inner)
    memory.take("parts", number * sizes.chosen * sizes.hidden)
    memory.drop("parts", "product", "members", "shares", "chosen", "router")
    if sizes.shared_inner:
        memory.take("gate_up", number * 2 * sizes.shared_inner)
        memory.take("product", number * sizes.shared_inner)
        memory.drop("gate_up")
        memory.take("down", number * sizes.hidden)
        memory.drop("product")
        memory.take("weighted", number * sizes.hidden)
        memory.drop("down", "weighted")
    memory.drop("normed")


def _added(memory: Allocator, sizes: Sizes, number: int) -> None:
    """A product that is added to the residual: in place, but for packed weights."""
    if sizes.packed:
        memory.take("added", number * sizes.hidden)
        memory.drop("added")


def _logits(memory: Allocator, sizes: Sizes, rows: int) -> None:
    """``logits`` stay: to drop them is the caller's."""
    memory.take("last", rows * sizes.hidden * sizes.element)
    memory.take("normed", rows * sizes.hidden * sizes.element)
    memory.take("logits", rows * sizes.vocab * sizes.element)
    memory.drop("normed", "last")
    chunks = rows * -(-sizes.vocab // SAMPLE_CHUNK)
    sizes_of = {"parts": 4 * chunks * (4 + 2 * LISTED), "told": 4 * chunks * (4 + 2 * MAX_TOLD)}
    for name, size in sizes_of.items():
        memory.take(name, size)
    memory.drop(*sizes_of)


def _adjusted_logits(memory: Allocator, sizes: Sizes, rows: int) -> None:
    """Penalties and log-probabilities: the model's own logits are kept until the step's tokens are known."""
    entries = rows * sizes.vocab
    memory.take("gathered", entries * sizes.element)
    memory.take("raw", entries * 4)  # the step before still has its own: its name is taken anew once this one exists
    memory.drop("gathered")
    memory.take("adjusted", entries * 4)
    memory.drop("adjusted")
    memory.take("logprobs", entries * 4)
    memory.take("mask", entries)
    memory.drop("logprobs", "mask")
