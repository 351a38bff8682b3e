"""The planner's answer to a question: does it fit, how far, how fast; and if not, the cheapest change that makes it fit."""

from __future__ import annotations

import msgspec

from fastqwen import quant
from fastqwen.errors import BadConfig
from fastqwen.plan.catalog import Entry, catalog, named_model, rank
from fastqwen.plan.changes import LIST_TOKENS, Change, advise, tight, with_less_context
from fastqwen.plan.device import budget_bytes
from fastqwen.plan.facts import GIB
from fastqwen.plan.generations import card_notices, has_fast_packed
from fastqwen.plan.gpus import Target, one_device
from fastqwen.plan.memory import Load, Need, predict
from fastqwen.plan.question import (
    PlanOptions,
    Question,
    command,
    largest_context,
    most_sequences,
    obstacles,
    resolve,
    rounded,
    trained_len,
)
from fastqwen.plan.speed import Speed, decode_speed

READING_TOKENS_S = 5.0  # about as fast as people read


class Answer(Load, frozen=True, kw_only=True):
    """Everything the planner knows about one question. ``fits`` speaks of the question's own length and settings."""

    model: str
    device: str
    on_cpu: bool
    engine: str
    need: Need
    budget_bytes: int
    device_bytes: int
    gpu_memory_utilization: float
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
    hindrance: str | None = None  # why fastqwen does not compute there at all, whether it fits or not
    with_context: Answer | None = None  # nobody asked for a length, and the model's own does not fit: as much as does


def answer(question: Question, target: Target | None = None) -> Answer:
    """``target`` widens the speed to the range of cards that a question about an amount of memory means."""
    target = target or one_device(question.facts, question.facts.name)
    found = _figures(question, target)
    if target.hindrance is not None and question.profile is None:
        return msgspec.structs.replace(
            found, hindrance=target.hindrance, command=None, speed_single=None, speed_concurrent=None
        )
    if found.command is not None:
        return found
    changes = tuple(advise(question))
    first = next((change for change in changes if change.command is not None), None)
    if first is None:
        return msgspec.structs.replace(found, changes=changes)
    if found.fits:
        return msgspec.structs.replace(found, changes=changes, command=first.command)
    shorter = with_less_context(question)
    if shorter is not None and not obstacles(question):
        fitting = _figures(shorter, target)
        return msgspec.structs.replace(found, changes=changes, command=fitting.command, with_context=fitting)
    if first.tight and first.max_model_len == found.max_model_len:
        found = msgspec.structs.replace(_figures(tight(question), target), notices=found.notices)
    return msgspec.structs.replace(found, changes=changes, command=first.command, tight=first.tight)


def _figures(question: Question, target: Target) -> Answer:
    """The answer without advice."""
    load, profile, notices = resolve(question)
    need = predict(question.model, load, profile, question.facts)
    budget = budget_bytes(need, question.facts, question.gpu_memory_utilization)
    fits = need.total <= budget
    named = question.profile is None and target.hindrance is None and target.slow is target.fast
    return Answer(
        **msgspec.structs.asdict(load),
        model=question.name,
        device=target.label,
        on_cpu=question.facts.kind == "cpu",
        engine=profile.name,
        need=need,
        budget_bytes=budget,
        device_bytes=question.facts.total_bytes,
        gpu_memory_utilization=question.gpu_memory_utilization,
        fits=fits,
        tight=False,
        largest_context=largest_context(question),
        most_sequences=most_sequences(question),
        command=command(question) if fits else None,
        not_served_yet=obstacles(question),
        changes=(),
        speed_single=decode_speed(question.model, load, target.slow, target.fast, batch=1) if fits else None,
        speed_concurrent=decode_speed(question.model, load, target.slow, target.fast, batch=load.concurrency)
        if fits
        else None,
        notices=(*notices, *(card_notices(target.label, question.facts.compute_capability) if named else [])),
    )


def list_models(target: Target, options: PlanOptions | None = None) -> list[Answer]:
    """What runs on a device: every published model at its own length, but at most LIST_TOKENS, unless one is wished. What
    runs comes first, then what is tight, what is not served yet, and the rest; of each those that answer come before base
    models, in the order of ``rank``."""
    answers: list[tuple[bool, Answer]] = []
    for entry in sorted(catalog().models, key=rank):
        question = _list_question(entry, target, options)
        if question is not None:
            found = answer(question, target)
            answers.append((rank(entry).is_base, _with_long_context(found, question, options)))

    def place(one: tuple[bool, Answer]) -> tuple[bool, ...]:
        is_base, found = one
        return not found.fits, bool(found.not_served_yet), found.tight, is_base

    return [found for _, found in sorted(answers, key=place)]


def best_model(target: Target, options: PlanOptions | None = None) -> Answer | None:
    """One recommendation: of the newest version the largest model for everybody that answers, fits with room, is served
    with its weights as they are, and is not slower than one reads. If all are, the fastest of the newest version."""
    fitting: list[Answer] = []
    version = None
    for entry in sorted(catalog().models, key=rank):
        place = rank(entry)
        if version is not None and place.version != version:
            break
        question = None if place.is_base or place.is_special else _list_question(entry, target, options)
        if question is None or not has_fast_packed(quant.method_word(question.model.quantization), target.facts):
            continue
        found = _figures(question, target)
        if found.command is not None:
            version = place.version
            fitting.append(_with_long_context(found, question, options))
            if found.speed_single is None or found.speed_single.middle >= READING_TOKENS_S:
                return fitting[-1]
    return max(fitting, key=lambda one: one.speed_single.middle if one.speed_single else 0.0, default=None)


def _list_question(entry: Entry, target: Target, options: PlanOptions | None) -> Question | None:
    """None for a model that was not made for the wished length, or whose heads do not split over that many GPUs."""
    options = options or PlanOptions()
    model = catalog().model(entry)
    length = options.max_model_len or min(trained_len(model), LIST_TOKENS)
    if length > model.default_max_len:
        return None
    try:
        model.local(options.num_gpus)
    except BadConfig:
        return None
    return Question.of(msgspec.structs.replace(options, max_model_len=length), named_model(entry), target.facts)


def _with_long_context(found: Answer, question: Question, options: PlanOptions | None) -> Answer:
    """A list's length is a floor unless it was wished, so the command names as much context as there is."""
    wished = options is not None and options.max_model_len is not None
    if wished or not found.fits or found.tight or found.not_served_yet or found.hindrance is not None:
        return found
    longest = rounded(found.largest_context, question.model.default_max_len)
    line = command(msgspec.structs.replace(question, max_model_len=max(longest, found.max_model_len)))
    return msgspec.structs.replace(found, command=line)


def gib(count: int) -> float:
    return round(count / GIB, 2)
