"""What the engine is given: from a model's sizes, the user's wishes and a device's facts. The same code on paper and at start."""

from __future__ import annotations

import msgspec

from fastqwen import quant
from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig, DoesNotFit, Unsupported
from fastqwen.kernels.limits import gpu_block_sizes, gpu_head_dims, usual_block_size
from fastqwen.model_config import ModelConfig
from fastqwen.plan.catalog import NamedModel, published
from fastqwen.plan.changes import advise
from fastqwen.plan.device import budget_bytes, choose_dtype
from fastqwen.plan.facts import (
    CPU_MIXED_TOKENS,
    CPU_STEP_TOKENS,
    DTYPE_BYTES,
    FASTQWEN_CPU,
    FASTQWEN_GPU,
    GIB,
    DeviceFacts,
)
from fastqwen.plan.generations import TORCH_ONLY, generation_of
from fastqwen.plan.memory import Load, Need, kv_bytes_per_token, predict
from fastqwen.plan.question import PlanOptions, Question, beyond_training, is_fitting, too_long
from fastqwen.plan.shards import uneven_sizes
from fastqwen.plan.states import bytes_of_slot, share_room
from fastqwen.plan.steps import mixed_tokens, step_tokens
from fastqwen.plan.weights import num_parameters

UNKNOWN_CAPABILITY = (8, 6)  # of a GPU that does not say: the least of today's usual ones


class EnginePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the device and the model allow. Nobody changes it afterwards."""

    dtype: str
    kv_cache_dtype: str  # the name of the weights' type, int8, or fp8
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    weights_bytes: int
    kv_bytes_per_token: int
    max_state_snapshots: int = 0
    states_bytes: int = 0  # of running sequences' states of fixed size, their copies, and the slot that pads steps
    max_num_mixed_tokens: int | None = None  # of a step with prompts beside running streams; None: as of any other
    notices: tuple[str, ...] = ()
    peak_bytes: int = 0  # predicted: weights, cache, and all that a step and a process need beside them
    device: str = ""  # its name, as its driver says it

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_size * self.kv_bytes_per_token


def make_plan(
    model: ModelConfig, config: EngineConfig, facts: DeviceFacts, *, available_kv_bytes: int | None = None
) -> EnginePlan:
    """``available_kv_bytes`` is what a GPU has left once weights and the largest step were measured; without it the
    model of memory says how much that will be.

    Raises DoesNotFit if not even one sequence of the wished length has room, BadConfig for a length that the model
    cannot have.
    """
    dtype, notices = choose_dtype(config.dtype, model, facts)
    if config.rope_per_request and model.rope.kind not in ("yarn", "qwen1_ntk"):
        raise BadConfig(f"--rope-per-request: the config.json of {config.model} asks for no YaRN scaling")
    notices = [*model.notices, *quant.notices(model.quantization), *notices]
    notices += uneven_sizes(model, config.tensor_parallel_size)
    on_cpu = facts.kind == "cpu"
    profile = FASTQWEN_CPU if on_cpu else FASTQWEN_GPU
    block_size = config.block_size or profile.block_size
    if not on_cpu and generation_of(facts.compute_capability).is_torch_only:
        notices.append(f"{facts.name} computes by {TORCH_ONLY}")
    elif not on_cpu:
        capability = facts.compute_capability or UNKNOWN_CAPABILITY
        block_size = config.block_size or usual_block_size(capability, profile.block_size)
        check_sizes(model.head_dim, block_size, dtype, facts)
    active = num_parameters(model, active=True)
    usual_tokens = CPU_STEP_TOKENS if on_cpu else step_tokens(active, facts)
    per_token = kv_bytes_per_token(
        model, dtype, num_gpus=config.tensor_parallel_size, kv_cache_dtype=config.kv_cache_dtype
    )
    wished_len = config.max_model_len or model.default_max_len
    if wished_len > model.default_max_len:
        raise too_long(wished_len, config.model, model)
    need = need_of_engine(model, config, facts, dtype=dtype, max_model_len=wished_len)
    fixed = need.fixed - need.states
    room_bytes = available_kv_bytes
    if room_bytes is None:
        room_bytes = max(0, budget_bytes(need, facts, config.gpu_memory_utilization) - need.fixed) + need.states
    each = bytes_of_slot(model, dtype, facts, num_gpus=config.tensor_parallel_size)
    states = share_room(model, config, profile, each, room_bytes, per_token=per_token, max_model_len=wished_len)
    kv_bytes = config.kv_cache_memory_bytes or room_bytes - states.bytes
    num_blocks = min(kv_bytes // (per_token * block_size), states.max_num_seqs * -(-wished_len // block_size))
    room = num_blocks * block_size
    if room < wished_len:
        if config.max_model_len is not None or room < 2 * block_size:
            raise DoesNotFit(
                f"one sequence of {wished_len} tokens needs {wished_len * per_token / GIB:.2f} GiB of KV cache, "
                f"{kv_bytes / GIB:.2f} GiB are free: {_remedy(model, config, facts, room)}"
            )
        notices.append(f"the KV cache holds {room} tokens, so the longest sequence is {room}, not {wished_len}")
    if not config.rope_per_request:
        notices += beyond_training(model, min(wished_len, room))
    return EnginePlan(
        dtype=dtype,
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        block_size=block_size,
        num_blocks=num_blocks,
        max_model_len=min(wished_len, room),
        max_num_seqs=states.max_num_seqs,
        max_state_snapshots=states.snapshots,
        states_bytes=states.bytes,
        max_num_batched_tokens=config.max_num_batched_tokens or usual_tokens,
        max_num_mixed_tokens=config.max_num_mixed_tokens
        or (CPU_MIXED_TOKENS if on_cpu else mixed_tokens(active, facts)),
        weights_bytes=need.weights,
        kv_bytes_per_token=per_token,
        notices=tuple(notices),
        peak_bytes=fixed + states.bytes + num_blocks * block_size * per_token,
        device=facts.name,
    )


def check_sizes(head_dim: int, block_size: int, dtype: str, facts: DeviceFacts) -> None:
    """Raises Unsupported or BadConfig for what a GPU's kernels do not take: they hold a head as two halves, each of a size
    that tensor cores take, and whole blocks in a program's shared memory."""
    heads = gpu_head_dims(facts.compute_capability or UNKNOWN_CAPABILITY, DTYPE_BYTES[dtype])
    if head_dim not in heads:
        raise Unsupported(f"head_dim is {head_dim}, on a GPU in {dtype} it can be {str(heads)[1:-1]}: use --device cpu")
    blocks = gpu_block_sizes(facts.compute_capability or UNKNOWN_CAPABILITY, head_dim, DTYPE_BYTES[dtype])
    if block_size not in blocks:
        raise BadConfig(
            f"--block-size is {block_size}, with heads of {head_dim} numbers in {dtype} it can be {str(blocks)[1:-1]} "
            f"on {facts.name or 'this GPU'}"
        )


def need_of_engine(
    model: ModelConfig, config: EngineConfig, facts: DeviceFacts, *, dtype: str, max_model_len: int
) -> Need:
    """What an engine with this configuration will hold, term by term, with a cache for one sequence."""
    profile = FASTQWEN_CPU if facts.kind == "cpu" else FASTQWEN_GPU
    definite = msgspec.structs.replace(config, dtype=dtype, max_model_len=max_model_len)
    load = msgspec.structs.replace(
        msgspec.convert(definite, Load, from_attributes=True), num_gpus=config.tensor_parallel_size
    )
    return predict(model, load, profile, facts)


def _remedy(model: ModelConfig, config: EngineConfig, facts: DeviceFacts, room: int) -> str:
    """The cheapest change that makes the model run; on a GPU the planner knows more than the length."""
    shorter = f"use --max-model-len {room} or less" if room else "use a smaller model or more memory"
    if facts.kind == "cpu" or config.kv_cache_memory_bytes is not None:
        return shorter
    options = msgspec.structs.replace(
        msgspec.convert(config, PlanOptions, from_attributes=True), num_gpus=config.tensor_parallel_size
    )
    named = NamedModel(model=model, name=config.model, entry=published(config.model))
    question = Question.of(options, named, facts)
    if is_fitting(question):  # by the book it does, but less was measured free
        return shorter
    here = (change for change in advise(question) if change.num_gpus == question.num_gpus)
    first = next((change.command for change in here if change.command is not None), None)
    return f"use {first}" if first is not None else "use a smaller model or a larger GPU"
