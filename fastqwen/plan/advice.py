"""The planner's answer to a question: does it fit, how far, how fast; and if not, the cheapest change that makes it fit."""

from __future__ import annotations

import msgspec

from fastqwen import quant
from fastqwen.errors import BadConfig
from fastqwen.plan.catalog import Rank, catalog, named_model, rank
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
    is_plain: bool  # its weights are not packed, or there is a kernel that computes on packed ones
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
        is_plain=has_fast_packed(quant.method_word(question.model.quantization), question.facts),
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
    fits comes first, then what is tight, then the rest; each in the order of ``rank``."""
    options = options or PlanOptions()
    answers = []
    for entry in sorted(catalog().models, key=rank):
        model = catalog().model(entry)
        length = options.max_model_len or min(trained_len(model), LIST_TOKENS)
        if length > model.default_max_len:  # not made for the wished length
            continue
        asked = msgspec.structs.replace(options, max_model_len=length)
        question = Question.of(asked, named_model(entry), target.facts)
        try:
            answers.append(_listed(question, target, length_asked=options.max_model_len is not None))
        except BadConfig:  # this model's heads do not split over that many GPUs
            continue
    return sorted(answers, key=lambda found: (not found.fits, found.tight))


def best_model(target: Target, options: PlanOptions | None = None) -> Answer | None:
    """One recommendation: of the newest version the largest model for everybody that answers, fits with room, is served
    with its weights as they are, and is not slower than one reads. If all are, the fastest of the newest version."""
    fitting = [
        found
        for found in list_models(target, options)
        if found.fits
        and not found.tight
        and found.command is not None
        and found.is_plain
        and not (_rank(found).is_base or _rank(found).is_special)
    ]
    newest = [one for one in fitting if _rank(one).version == _rank(fitting[0]).version]
    quick = [one for one in newest if one.speed_single is None or one.speed_single.middle >= READING_TOKENS_S]
    fastest = max(newest, key=lambda one: one.speed_single.middle if one.speed_single else 0.0, default=None)
    return quick[0] if quick else fastest


def _rank(found: Answer) -> Rank:
    entry = catalog().find(found.model)
    assert entry is not None
    return rank(entry)


def _listed(question: Question, target: Target, *, length_asked: bool) -> Answer:
    """An answer for the list: its question's length is a floor, so the command names as much context as there is."""
    found = answer(question, target)
    if not found.fits or found.tight or length_asked or found.not_served_yet or found.hindrance is not None:
        return found
    longest = rounded(found.largest_context, question.model.default_max_len)
    line = command(msgspec.structs.replace(question, max_model_len=max(longest, found.max_model_len)))
    return msgspec.structs.replace(found, command=line)


def gib(count: int) -> float:
    return round(count / GIB, 2)
