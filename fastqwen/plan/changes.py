"""What to change so that a model fits and runs, cheapest first: what costs least quality, length and money."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.plan.catalog import catalog, sibling_of, smaller_than
from fastqwen.plan.question import (
    Question,
    command,
    is_fitting,
    largest_context,
    most_sequences,
    obstacles,
    resolve,
    rounded,
    trained_len,
)
from fastqwen.plan.served import is_quantization_served

USEFUL_TOKENS = 2048  # advice does not go below this context
LIST_TOKENS = 8192  # a list of models asks for a model's own length, but for no more than this
TIGHT_UTILIZATION = 0.99
TIGHT_NUM_SEQS = 4
TIGHT_STEP_TOKENS = 2048
MOST_GPUS = 16


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Something that makes a model fit, and the command line that does it; None if that is not served yet."""

    what: str
    command: str | None
    not_served_yet: tuple[str, ...] = ()
    max_model_len: int
    num_gpus: int
    tight: bool = False


def advise(question: Question) -> list[Change]:
    """The changes that make the model fit and run, cheapest first: what costs least quality, length and money."""
    candidates = list(_candidates(question))
    if obstacles(question):  # what is not served yet is taken back first
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
                not_served_yet=obstacles(changed),
                max_model_len=load.max_model_len,
                num_gpus=load.num_gpus,
                tight=tight,
            )
    return list(found.values())


def _runnable(served: Question, back: str) -> list[tuple[str, Question, bool]]:
    """What makes it fit after what was not served has been taken back."""
    candidates = _candidates(served)
    return [(f"{back}, {what}", changed, tight) for what, changed, tight in candidates if not obstacles(changed)]


def _served(question: Question) -> tuple[Question, str]:
    """The same without what is not served yet, and what that changes."""
    replace, words = msgspec.structs.replace, []
    if question.real is not None:
        real = question.real
        question = replace(question, model=real.model, name=real.name, entry=real.entry, real=None)
        words.append(f"the version {real.name}")
    if not is_quantization_served(question.model) and question.entry is not None:
        sibling = sibling_of(question.entry, "gptq-int4") or sibling_of(question.entry, None)
        if sibling is not None and (question.max_model_len or 0) <= catalog().model(sibling).default_max_len:
            question = replace(question, model=catalog().model(sibling), name=sibling.name, entry=sibling)
            words.append(f"the version {sibling.name}")
    return question, ", ".join(words)


def _candidates(question: Question) -> Iterator[tuple[str, Question, bool]]:
    """What to try, in order. A length that the user asked for is given up later than one that nobody asked for."""
    replace = msgspec.structs.replace
    on_gpu = question.facts.kind == "cuda"
    asked = question.max_model_len is not None
    if on_gpu and not question.enforce_eager:
        yield "no CUDA graphs", replace(question, enforce_eager=True), False
    shorter = _shorter(question)
    if shorter is not None and not asked:
        yield f"a context of {shorter.max_model_len} tokens", shorter, False
    most = most_sequences(question) if question.concurrency > 1 else 0
    if most:
        yield f"{most} at once, while the others wait", replace(question, concurrency=most), False
    can_shrink_cache = on_gpu and question.kv_cache_dtype == "auto"
    if can_shrink_cache:
        yield "an 8-bit KV cache", replace(question, kv_cache_dtype="int8"), False
    packed = _packed(question)
    if packed is not None:
        version = f"the Int4 version, {packed.name}"
        yield version, packed, False
        if can_shrink_cache:
            yield f"{version}, and an 8-bit KV cache", replace(packed, kv_cache_dtype="int8"), False
    if shorter is not None and asked:
        yield f"a context of {shorter.max_model_len} tokens", shorter, False
    packed_shorter = _shorter(packed) if packed is not None else None
    if packed_shorter is not None:
        length = packed_shorter.max_model_len
        yield f"the Int4 version, {packed_shorter.name}, with a context of {length} tokens", packed_shorter, False
    if on_gpu:
        all_of_it = tight(question)
        yield "nearly all of the card, no CUDA graphs, few sequences", all_of_it, True
        tight_shorter = _shorter(all_of_it)
        if tight_shorter is not None:
            yield f"nearly all of the card for a context of {tight_shorter.max_model_len} tokens", tight_shorter, True
        yield from _more_gpus(question, packed)
    if not obstacles(question):
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
            longest = min(trained_len(model), rounded(largest_context(smaller), model.default_max_len))
            smaller = msgspec.structs.replace(smaller, max_model_len=longest)
        yield f"a smaller model, {entry.name}", smaller, False
        return


def with_less_context(question: Question) -> Question | None:
    """The same with as much context as fits, where nobody asked for a length and the model's own does not fit."""
    return None if question.max_model_len is not None else _shorter(question)


def _shorter(question: Question) -> Question | None:
    """The same with as much context as fits, if that is useful."""
    longest = rounded(largest_context(question), question.model.default_max_len)
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


def tight(question: Question) -> Question:
    return msgspec.structs.replace(
        question,
        enforce_eager=True,
        gpu_memory_utilization=TIGHT_UTILIZATION,
        max_num_seqs=max(question.concurrency, TIGHT_NUM_SEQS),
        max_num_batched_tokens=min(question.max_num_batched_tokens or TIGHT_STEP_TOKENS, TIGHT_STEP_TOKENS),
    )


def _more_gpus(question: Question, packed: Question | None) -> Iterator[tuple[str, Question, bool]]:
    """Twice as many and so on, until the model fits as it is; fewer GPUs with the Int4 version come before that."""
    replace = msgspec.structs.replace
    count = question.num_gpus * 2
    while count <= MOST_GPUS:
        try:
            question.model.local(count)
        except BadConfig:
            return
        whole = replace(question, num_gpus=count)
        if is_fitting(whole):
            yield f"{count} GPUs", whole, False
            return
        if packed is not None:
            yield f"{count} GPUs and the Int4 version, {packed.name}", replace(packed, num_gpus=count), False
        count *= 2
