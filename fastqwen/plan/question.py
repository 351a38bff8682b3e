"""A question to the planner made definite: what it needs, whether that fits, how far it goes, and the line that asks it."""

from __future__ import annotations

import shlex
from bisect import bisect_left
from math import ceil
from typing import Annotated

import msgspec

from fastqwen import quant
from fastqwen.config import option
from fastqwen.errors import BadConfig
from fastqwen.kernels.limits import DOTS_CAPABILITY, gpu_head_dims
from fastqwen.model_config import ModelConfig
from fastqwen.plan.catalog import Entry, NamedModel
from fastqwen.plan.device import budget_bytes, choose_dtype
from fastqwen.plan.facts import FASTQWEN_CPU, FASTQWEN_GPU, DeviceFacts, EngineProfile
from fastqwen.plan.generations import generation_of, has_fast_packed
from fastqwen.plan.memory import Load, Need, predict
from fastqwen.plan.served import is_quantization_served, not_served_yet

LENGTH_STEP = 256  # lengths that are advised are multiples of this
UTILIZATION = 0.9
MOST_TOKENS = 2**24
UNPUBLISHED = "a version that nobody has published"


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to run. `plan` has a flag for each field with a help text, under the names that `serve` has for them."""

    num_gpus: Annotated[int, option("GPUs that share the model.")] = 1
    max_model_len: Annotated[
        int | None, option("Longest sequence, for example 32K. Default: what the model was trained for.")
    ] = None
    concurrency: Annotated[int, option("Sequences of that length at once.")] = 1
    dtype: Annotated[str, option("auto, float32, bfloat16 or float16.")] = "auto"
    kv_cache_dtype: Annotated[str, option("auto, bfloat16, float16, int8 or fp8.")] = "auto"
    gpu_memory_utilization: Annotated[float, option("Share of the GPU's memory to use.")] = UTILIZATION
    max_num_seqs: Annotated[
        int | None, option("Most sequences that run at once, as serve has it. Default: 256, on a CPU 64.")
    ] = None
    max_num_batched_tokens: Annotated[
        int | None,
        option(
            "Most tokens in one step, as serve has it. Default: what a GPU computes in about 1 s, at most 8192; on a CPU 512."
        ),
    ] = None
    enforce_eager: Annotated[bool, option("Plan without CUDA graphs.", one_way=True)] = False
    profile: EngineProfile | None = None


class Question(PlanOptions, frozen=True, kw_only=True):
    """What to run, how, and on what."""

    model: ModelConfig
    name: str
    facts: DeviceFacts
    entry: Entry | None = None
    real: NamedModel | None = None  # what there is, if the model is one that nobody has published

    @classmethod
    def of(cls, options: PlanOptions, named: NamedModel, facts: DeviceFacts) -> Question:
        return cls(
            **msgspec.structs.asdict(options),
            model=named.model,
            name=named.name,
            facts=facts,
            entry=named.entry,
            real=named.real,
        )


def trained_len(model: ModelConfig) -> int:
    """The length that a model runs at without extension: Qwen-1's NTK reaches further than what it was trained for."""
    return model.rope.trained_len if model.rope.kind == "qwen1_ntk" else model.default_max_len


def too_long(wished: int, name: str, model: ModelConfig) -> BadConfig:
    """The answer to a --max-model-len beyond what the model was made for, and how it can be reached."""
    limit = model.default_max_len
    hint = ""
    if model.rope.kind == "default":
        yarn = f'{{"rope_type": "yarn", "factor": {max(2, ceil(wished / limit))}.0}}'
        hint = f"; longer ones need another scaling of positions (YaRN), such as --rope-scaling '{yarn}'"
    return BadConfig(f"--max-model-len is {wished}, but {name} was made for at most {limit} tokens{hint}")


def beyond_training(model: ModelConfig, length: int) -> list[str]:
    """What happens to sequences that are longer than what was trained, where ``length`` allows them."""
    rope = model.rope
    if length <= rope.trained_len:
        return []
    if rope.kind == "yarn":
        how = f"all sequences, short ones as well, are computed with YaRN's factor {rope.factor:g} (--rope-per-request: only"
        return [f"the model was trained with {rope.trained_len} tokens; up to {length}, {how} longer ones)"]
    if rope.kind == "qwen1_ntk":
        return [
            f"the model was trained with {rope.trained_len} tokens; prompts beyond are computed with a larger theta"
        ]
    return []


def resolve(question: Question) -> tuple[Load, EngineProfile, list[str]]:
    """What was left open made definite. Raises BadConfig for a length, a number or a type that cannot be."""
    model = question.model
    length = question.max_model_len or trained_len(model)
    if length > model.default_max_len:
        raise too_long(length, question.name, model)
    if question.concurrency < 1:
        raise BadConfig(f"--concurrency is {question.concurrency}, but must be at least 1")
    model.local(question.num_gpus)
    dtype, notices = _dtype(question)
    notices += _notices(question)
    profile = question.profile or (FASTQWEN_CPU if question.facts.kind == "cpu" else FASTQWEN_GPU)
    definite = msgspec.structs.replace(question, dtype=dtype, max_model_len=length)
    load = msgspec.convert(definite, Load, from_attributes=True)
    return load, profile, notices


def _dtype(question: Question) -> tuple[str, list[str]]:
    """bfloat16 on a device that does not compute in it is planned as float16, and said so."""
    try:
        return choose_dtype(question.dtype, question.model, question.facts)
    except BadConfig:
        dtype, notices = choose_dtype("auto", question.model, question.facts)
        return dtype, notices or [f"{question.facts.name} does not compute in bfloat16, so float16 is planned"]


def _notices(question: Question) -> list[str]:
    """What a user should know of this model on this device."""
    found: list[str] = []
    method = quant.method_word(question.model.quantization)
    if question.profile is not None:
        return found
    if question.model.moe is not None and method == "gptq":
        found.append("experts of GPTQ checkpoints are unpacked while they are loaded, and count so")
    if not has_fast_packed(method, question.facts) and is_quantization_served(question.model):
        found.append(
            f"{method.upper()} weights are small, but not fast here: each product unpacks them first, so no speed is named"
        )
    return found


def need_of(question: Question) -> Need:
    load, profile, _ = resolve(question)
    return predict(question.model, load, profile, question.facts)


def is_fitting(question: Question) -> bool:
    need = need_of(question)
    return need.total <= budget_bytes(need, question.facts, question.gpu_memory_utilization)


def largest_context(question: Question) -> int:
    """Tokens of the longest sequence that fits at the question's concurrency; 0 if not even a block does."""
    return _largest(question, "max_model_len", question.model.default_max_len)


def most_sequences(question: Question) -> int:
    """Sequences of the question's length that fit at once."""
    load, profile, _ = resolve(question)
    block = profile.block_size
    need = need_of(msgspec.structs.replace(question, concurrency=1))
    each = ceil(load.max_model_len / block) * block * need.kv_bytes_per_token
    room = budget_bytes(need, question.facts, question.gpu_memory_utilization) - need.fixed
    # The cache alone bounds it; beyond --max-num-seqs each sequence also needs state and a row of logits.
    return _largest(question, "concurrency", max(0, room // each))


def _largest(question: Question, field: str, most: int) -> int:
    """The largest value of a field that still fits; more never needs less, so halving finds it."""
    candidates = range(1, min(most, MOST_TOKENS) + 1)

    def is_too_large(value: int) -> bool:
        return not is_fitting(msgspec.structs.replace(question, **{field: value}))

    return bisect_left(candidates, True, key=is_too_large)


def rounded(length: int, most: int) -> int:
    return length if length >= most else length // LENGTH_STEP * LENGTH_STEP


def obstacles(question: Question) -> tuple[str, ...]:
    """What stands in the way of serving this as it was asked."""
    found = not_served_yet(question.model)
    found += _unknown_heads(question)
    return found if question.real is None else (UNPUBLISHED, *found)


def _unknown_heads(question: Question) -> tuple[str, ...]:
    """Kernels for older cards take narrower heads than some models have."""
    capability, head_dim = question.facts.compute_capability, question.model.head_dim
    if question.facts.kind == "cpu" or capability is None or generation_of(capability).is_torch_only:
        return ()
    heads = gpu_head_dims(capability, 4 if question.dtype == "float32" else 2)
    return () if head_dim in heads or capability >= DOTS_CAPABILITY else (f"heads of {head_dim} numbers",)


def command(question: Question) -> str | None:
    """The exact line, None if serving does not take it yet. A length is named where serving would ask for another."""
    if obstacles(question):
        return None
    words = ["fastqwen", "serve", question.name]
    load, profile, _ = resolve(question)
    if load.max_model_len != question.model.default_max_len:
        words += ["--max-model-len", str(load.max_model_len)]
    if load.num_gpus > 1:
        words += ["--tensor-parallel-size", str(load.num_gpus)]
    if question.dtype != "auto":
        words += ["--dtype", load.dtype]
    if load.kv_cache_dtype != "auto":
        words += ["--kv-cache-dtype", load.kv_cache_dtype]
    if question.gpu_memory_utilization != UTILIZATION:
        words += ["--gpu-memory-utilization", f"{question.gpu_memory_utilization:g}"]
    if question.max_num_seqs is not None or load.concurrency > profile.max_num_seqs:
        words += ["--max-num-seqs", str(max(question.max_num_seqs or 0, load.concurrency))]
    if question.max_num_batched_tokens is not None:
        words += ["--max-num-batched-tokens", str(question.max_num_batched_tokens)]
    if question.enforce_eager:
        words.append("--enforce-eager")
    return shlex.join(words)
