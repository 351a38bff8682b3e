"""The planner's answer to a question: does it fit, how far, how fast; and if not, the cheapest change that makes it fit."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from math import ceil

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.model_config import ModelConfig
from fastqwen.plan.catalog import Entry, Found, catalog, sibling_of, smaller_than
from fastqwen.plan.engine import budget_bytes, choose_dtype
from fastqwen.plan.facts import FASTQWEN_CPU, FASTQWEN_GPU, GIB, DeviceFacts, EngineProfile
from fastqwen.plan.gpus import Target
from fastqwen.plan.memory import Load, Need, predict
from fastqwen.plan.served import is_quantization_served, not_served_yet
from fastqwen.plan.speed import Speed, decode_speed
from fastqwen.plan.weights import check_num_gpus

USEFUL_TOKENS = 2048  # advice does not go below this context
LIST_TOKENS = 8192  # the list asks for a model's own length, but for no more than this
LENGTH_STEP = 256  # lengths that are advised are multiples of this
TIGHT_UTILIZATION = 0.99
TIGHT_NUM_SEQS = 4
TIGHT_STEP_TOKENS = 2048
UTILIZATION = 0.9
MOST_GPUS = 16
MIN_TRITON_CAPABILITY = (8, 0)  # its README: "NVIDIA GPUs (Compute Capability 8.0+)"
MOST_TOKENS = 2**24


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """How to run: what the flags say."""

    dtype: str = "auto"
    max_model_len: int | None = None  # None: the length that the model was trained for
    concurrency: int = 1
    num_gpus: int = 1
    kv_cache_dtype: str = "auto"
    eager: bool = False
    utilization: float = UTILIZATION
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    profile: EngineProfile | None = None


class Question(Wishes, frozen=True, kw_only=True):
    """What to run, how, and on what."""

    model: ModelConfig
    name: str
    facts: DeviceFacts
    entry: Entry | None = None

    @classmethod
    def of(cls, wishes: Wishes, found: Found, facts: DeviceFacts) -> Question:
        return cls(
            **msgspec.structs.asdict(wishes),
            model=found.model,
            name=found.name,
            facts=facts,
            entry=found.entry,
        )


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Something that makes a model fit, and the command line that does it; None if that is not served yet."""

    what: str
    command: str | None
    not_served_yet: tuple[str, ...] = ()
    max_model_len: int
    num_gpus: int
    tight: bool = False


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the planner knows about one question. ``fits`` speaks of the question's own length and settings."""

    model: str
    device: str
    on_cpu: bool
    engine: str
    dtype: str
    kv_cache_dtype: str
    num_gpus: int
    max_model_len: int
    concurrency: int
    need: Need
    budget_bytes: int
    device_bytes: int
    utilization: float
    fits: bool
    tight: bool
    largest_context: int  # at this concurrency; 0: none
    most_sequences: int  # at this context
    command: str | None  # of the question, or of the first change that is served; None: there is none
    not_served_yet: tuple[str, ...]  # what fastqwen cannot run yet of the question as it was asked
    changes: tuple[Change, ...]
    speed_single: Speed | None
    speed_concurrent: Speed | None
    notices: tuple[str, ...]


def trained_len(model: ModelConfig) -> int:
    """The length that a model runs at without extension: Qwen-1's NTK reaches further than what it was trained for."""
    return model.rope.trained_len if model.rope.kind == "qwen1_ntk" else model.default_max_len


def resolve(question: Question) -> tuple[Load, EngineProfile, list[str]]:
    """Wishes made definite. Raises BadConfig for a length, a number or a type that cannot be."""
    model = question.model
    length = question.max_model_len or trained_len(model)
    if length > model.default_max_len:
        raise BadConfig(
            f"--max-model-len is {length}, but {question.name} was made for at most {model.default_max_len} tokens"
        )
    if question.concurrency < 1:
        raise BadConfig(f"--concurrency is {question.concurrency}, but must be at least 1")
    check_num_gpus(model, question.num_gpus)
    dtype, notices = _dtype(question)
    notices += _notices(question)
    profile = question.profile or (FASTQWEN_CPU if question.facts.kind == "cpu" else FASTQWEN_GPU)
    load = Load(
        dtype=dtype,
        max_model_len=length,
        concurrency=question.concurrency,
        num_gpus=question.num_gpus,
        kv_cache_dtype=question.kv_cache_dtype,
        eager=question.eager,
        max_num_seqs=question.max_num_seqs,
        max_num_batched_tokens=question.max_num_batched_tokens,
    )
    return load, profile, notices


def _notices(question: Question) -> list[str]:
    """What a user should know of this model or this device."""
    found = []
    model, capability = question.model, question.facts.compute_capability
    if question.profile is None and model.moe is not None and (model.quantization or {}).get("quant_method") == "gptq":
        found.append("experts of GPTQ checkpoints are unpacked while they are loaded, and count so")
    if question.profile is None and capability is not None and capability < MIN_TRITON_CAPABILITY:
        major, minor = capability
        found.append(
            f"{question.facts.name} has compute capability {major}.{minor}; Triton, which compiles fastqwen's kernels, "
            "names 8.0 as the least that it supports"
        )
    return found


def need_of(question: Question) -> Need:
    load, profile, _ = resolve(question)
    return predict(question.model, load, profile, question.facts)


def is_fitting(question: Question) -> bool:
    need = need_of(question)
    return need.total <= budget_bytes(need, question.facts, question.utilization)


def largest_context(question: Question) -> int:
    """Tokens of the longest sequence that fits at the question's concurrency; 0 if not even a block does."""
    return _largest(question, "max_model_len", question.model.default_max_len)


def most_sequences(question: Question) -> int:
    """Sequences of the question's length that fit at once."""
    load, profile, _ = resolve(question)
    block = profile.block_size
    need = need_of(msgspec.structs.replace(question, concurrency=1))
    each = ceil(load.max_model_len / block) * block * need.kv_bytes_per_token
    room = budget_bytes(need, question.facts, question.utilization) - need.fixed
    # The cache alone bounds it; beyond --max-num-seqs each sequence also needs state and a row of logits.
    return _largest(question, "concurrency", max(0, room // each))


def answer(question: Question, target: Target | None = None) -> Answer:
    """``target`` widens the speed to the range of cards that a question about an amount of memory means."""
    found = _figures(question, target)
    if found.command is not None:
        return found
    changes = tuple(advise(question))
    first = next((change for change in changes if change.command is not None), None)
    if first is None:
        return msgspec.structs.replace(found, changes=changes)
    if found.fits:
        return msgspec.structs.replace(found, changes=changes, command=first.command)
    if first.tight and first.max_model_len == found.max_model_len:
        found = msgspec.structs.replace(_figures(_tight(question), target), notices=found.notices)
    return msgspec.structs.replace(found, changes=changes, command=first.command, tight=first.tight)


def _figures(question: Question, target: Target | None) -> Answer:
    """The answer without advice."""
    load, profile, notices = resolve(question)
    need = predict(question.model, load, profile, question.facts)
    budget = budget_bytes(need, question.facts, question.utilization)
    fits = need.total <= budget
    slow, fast = (target.slow, target.fast) if target is not None else (question.facts, question.facts)
    return Answer(
        model=question.name,
        device=target.label if target is not None else question.facts.name,
        on_cpu=question.facts.kind == "cpu",
        engine=profile.name,
        dtype=load.dtype,
        kv_cache_dtype=load.kv_cache_dtype,
        num_gpus=load.num_gpus,
        max_model_len=load.max_model_len,
        concurrency=load.concurrency,
        need=need,
        budget_bytes=budget,
        device_bytes=question.facts.total_bytes,
        utilization=question.utilization,
        fits=fits,
        tight=False,
        largest_context=largest_context(question),
        most_sequences=most_sequences(question),
        command=command(question) if fits else None,
        not_served_yet=_obstacles(question),
        changes=(),
        speed_single=decode_speed(question.model, load, slow, fast, batch=1) if fits else None,
        speed_concurrent=decode_speed(question.model, load, slow, fast, batch=load.concurrency) if fits else None,
        notices=tuple(notices),
    )


def advise(question: Question) -> list[Change]:
    """The changes that make the model fit and run, cheapest first: what costs least quality, length and money."""
    candidates = list(_candidates(question))
    if _obstacles(question):  # what is not served yet is taken back first
        served, back = _served(question)
        runs = [(back, served, False)] if is_fitting(served) else _runnable(served, back)
        candidates = runs if is_fitting(question) else runs + candidates
    found: dict[str, Change] = {}
    for what, changed, tight in candidates:
        if what not in found and changed != question and is_fitting(changed):
            load, _, _ = resolve(changed)
            found[what] = Change(
                what=what,
                command=command(changed),
                not_served_yet=_obstacles(changed),
                max_model_len=load.max_model_len,
                num_gpus=load.num_gpus,
                tight=tight,
            )
    return list(found.values())


def list_models(target: Target, wishes: Wishes | None = None) -> list[Answer]:
    """What runs on a device: every published model at its own length, but at most LIST_TOKENS, unless one is wished."""
    wishes = wishes or Wishes()
    answers = []
    for entry in catalog().models:
        model = catalog().model(entry)
        length = wishes.max_model_len or min(trained_len(model), LIST_TOKENS)
        if length > model.default_max_len:  # not made for the wished length
            continue
        asked = msgspec.structs.replace(wishes, max_model_len=length)
        question = Question.of(asked, Found(model=model, name=entry.name, entry=entry), target.facts)
        try:
            answers.append(_listed(question, target, length_asked=wishes.max_model_len is not None))
        except BadConfig:  # this model's heads do not split over that many GPUs
            continue
    return answers


def command(question: Question) -> str | None:
    """The exact line, None if serving does not take it yet. A length is named where serving would ask for another."""
    if _obstacles(question):
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
    if question.utilization != UTILIZATION:
        words += ["--gpu-memory-utilization", f"{question.utilization:g}"]
    if question.max_num_seqs is not None or load.concurrency > profile.max_num_seqs:
        words += ["--max-num-seqs", str(max(question.max_num_seqs or 0, load.concurrency))]
    if question.max_num_batched_tokens is not None:
        words += ["--max-num-batched-tokens", str(question.max_num_batched_tokens)]
    if question.eager:
        words.append("--enforce-eager")
    return shlex.join(words)


def _obstacles(question: Question) -> tuple[str, ...]:
    return not_served_yet(question.model, num_gpus=question.num_gpus, kv_cache_dtype=question.kv_cache_dtype)


def _runnable(served: Question, back: str) -> list[tuple[str, Question, bool]]:
    """What makes it fit after what was not served has been taken back."""
    candidates = _candidates(served)
    return [(f"{back}, {what}", changed, tight) for what, changed, tight in candidates if not _obstacles(changed)]


def _served(question: Question) -> tuple[Question, str]:
    """The same without what is not served yet, and what that changes."""
    replace, words = msgspec.structs.replace, []
    if not is_quantization_served(question.model) and question.entry is not None:
        sibling = sibling_of(question.entry, "gptq-int4") or sibling_of(question.entry, None)
        if sibling is not None:
            question = replace(question, model=catalog().model(sibling), name=sibling.name, entry=sibling)
            words.append(f"the version {sibling.name}")
    if "an 8-bit KV cache" in _obstacles(question):
        question = replace(question, kv_cache_dtype="auto")
        words.append("a KV cache in the model's own type")
    if "one model on several GPUs" in _obstacles(question):
        question = replace(question, num_gpus=1)
        words.append("one GPU")
    return question, ", ".join(words)


def _listed(question: Question, target: Target, *, length_asked: bool) -> Answer:
    """An answer for the list: its question's length is a floor, so the command names as much context as there is."""
    found = answer(question, target)
    if not found.fits or found.tight or length_asked or found.not_served_yet:
        return found
    longest = _rounded(found.largest_context, question.model.default_max_len)
    line = command(msgspec.structs.replace(question, max_model_len=max(longest, found.max_model_len)))
    return msgspec.structs.replace(found, command=line)


def _candidates(question: Question) -> Iterator[tuple[str, Question, bool]]:
    """What to try, in order. A length that the user asked for is given up later than one that nobody asked for."""
    replace = msgspec.structs.replace
    on_gpu = question.facts.kind == "cuda"
    asked = question.max_model_len is not None
    if on_gpu and not question.eager:
        yield "no CUDA graphs", replace(question, eager=True), False
    shorter = _shorter(question)
    if shorter is not None and not asked:
        yield f"a context of {shorter.max_model_len} tokens", shorter, False
    most = most_sequences(question) if question.concurrency > 1 else 0
    if most:
        yield f"{most} at once, while the others wait", replace(question, concurrency=most), False
    small_cache = replace(question, kv_cache_dtype="fp8")
    if on_gpu and question.kv_cache_dtype == "auto":
        yield "an 8-bit KV cache", small_cache, False
    packed = _packed(question)
    if packed is not None:
        yield f"the Int4 version, {packed.name}", packed, False
        if on_gpu and question.kv_cache_dtype == "auto":
            yield (
                f"the Int4 version, {packed.name}, and an 8-bit KV cache",
                replace(packed, kv_cache_dtype="fp8"),
                False,
            )
    if shorter is not None and asked:
        yield f"a context of {shorter.max_model_len} tokens", shorter, False
    packed_shorter = _shorter(packed) if packed is not None else None
    if packed_shorter is not None:
        length = packed_shorter.max_model_len
        yield f"the Int4 version, {packed_shorter.name}, with a context of {length} tokens", packed_shorter, False
    if on_gpu:
        tight = _tight(question)
        yield "nearly all of the card, no CUDA graphs, few sequences", tight, True
        tight_shorter = _shorter(tight)
        if tight_shorter is not None:
            yield f"nearly all of the card for a context of {tight_shorter.max_model_len} tokens", tight_shorter, True
        yield from _more_gpus(question, packed)
    if not _obstacles(question):
        yield from _smaller_model(question)


def _smaller_model(question: Question) -> Iterator[tuple[str, Question, bool]]:
    """The largest of the same line that fits: the last thing to try. Nobody asked for a length: as long as it gets."""
    for entry in smaller_than(question.entry) if question.entry is not None else []:
        model = catalog().model(entry)
        length = question.max_model_len or min(trained_len(model), LIST_TOKENS)
        if length > model.default_max_len or not is_quantization_served(model):
            continue
        smaller = msgspec.structs.replace(question, model=model, name=entry.name, entry=entry, max_model_len=length)
        if not is_fitting(smaller):
            continue
        if question.max_model_len is None:
            longest = min(trained_len(model), _rounded(largest_context(smaller), model.default_max_len))
            smaller = msgspec.structs.replace(smaller, max_model_len=longest)
        yield f"a smaller model, {entry.name}", smaller, False
        return


def _shorter(question: Question) -> Question | None:
    """The same with as much context as fits, if that is useful."""
    longest = _rounded(largest_context(question), question.model.default_max_len)
    load, _, _ = resolve(question)
    if longest >= load.max_model_len or longest < USEFUL_TOKENS:
        return None
    return msgspec.structs.replace(question, max_model_len=longest)


def _packed(question: Question) -> Question | None:
    if question.entry is None or question.entry.quantization in ("gptq-int4", "awq"):
        return None
    sibling = sibling_of(question.entry, "gptq-int4") or sibling_of(question.entry, "awq")
    if sibling is None:
        return None
    model = catalog().model(sibling)
    length = question.max_model_len
    if length is not None and length > model.default_max_len:
        return None
    return msgspec.structs.replace(question, model=model, name=sibling.name, entry=sibling, dtype="auto")


def _tight(question: Question) -> Question:
    return msgspec.structs.replace(
        question,
        eager=True,
        utilization=TIGHT_UTILIZATION,
        max_num_seqs=max(question.concurrency, TIGHT_NUM_SEQS),
        max_num_batched_tokens=min(question.max_num_batched_tokens or TIGHT_STEP_TOKENS, TIGHT_STEP_TOKENS),
    )


def _more_gpus(question: Question, packed: Question | None) -> Iterator[tuple[str, Question, bool]]:
    """Twice as many and so on, until the model fits as it is; fewer GPUs with the Int4 version come before that."""
    replace = msgspec.structs.replace
    count = question.num_gpus * 2
    while count <= MOST_GPUS:
        try:
            check_num_gpus(question.model, count)
        except BadConfig:
            return
        whole = replace(question, num_gpus=count)
        if is_fitting(whole):
            yield f"{count} GPUs", whole, False
            return
        if packed is not None:
            yield f"{count} GPUs and the Int4 version, {packed.name}", replace(packed, num_gpus=count), False
        count *= 2


def _largest(question: Question, field: str, most: int) -> int:
    """The largest value of a field that still fits; more never needs less, so halving finds it."""
    low, high = 0, min(most, MOST_TOKENS)
    while low < high:
        middle = (low + high + 1) // 2
        if is_fitting(msgspec.structs.replace(question, **{field: middle})):
            low = middle
        else:
            high = middle - 1
    return low


def _rounded(length: int, most: int) -> int:
    return length if length >= most else length // LENGTH_STEP * LENGTH_STEP


def _dtype(question: Question) -> tuple[str, list[str]]:
    """bfloat16 on a device that does not compute in it is planned as float16, and said so."""
    try:
        return choose_dtype(question.dtype, question.model, question.facts)
    except BadConfig:
        dtype, notices = choose_dtype("auto", question.model, question.facts)
        return dtype, notices or [f"{question.facts.name} does not compute in bfloat16, so float16 is planned"]


def gib(count: int) -> float:
    return round(count / GIB, 2)
