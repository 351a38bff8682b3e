"""The planner's answer to a question: does it fit, how far, how fast; and if not, the cheapest change that makes it fit."""

from __future__ import annotations

import msgspec

from fastqwen.errors import BadConfig
from fastqwen.plan.catalog import catalog, named_model
from fastqwen.plan.changes import LIST_TOKENS, Change, advise, tight
from fastqwen.plan.device import budget_bytes
from fastqwen.plan.facts import GIB
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


def answer(question: Question, target: Target | None = None) -> Answer:
    """``target`` widens the speed to the range of cards that a question about an amount of memory means."""
    target = target or one_device(question.facts, question.facts.name)
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
        found = msgspec.structs.replace(_figures(tight(question), target), notices=found.notices)
    return msgspec.structs.replace(found, changes=changes, command=first.command, tight=first.tight)


def _figures(question: Question, target: Target) -> Answer:
    """The answer without advice."""
    load, profile, notices = resolve(question)
    need = predict(question.model, load, profile, question.facts)
    budget = budget_bytes(need, question.facts, question.gpu_memory_utilization)
    fits = need.total <= budget
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
        notices=tuple(notices),
    )


def list_models(target: Target, options: PlanOptions | None = None) -> list[Answer]:
    """What runs on a device: every published model at its own length, but at most LIST_TOKENS, unless one is wished."""
    options = options or PlanOptions()
    answers = []
    for entry in catalog().models:
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
    return answers


def _listed(question: Question, target: Target, *, length_asked: bool) -> Answer:
    """An answer for the list: its question's length is a floor, so the command names as much context as there is."""
    found = answer(question, target)
    if not found.fits or found.tight or length_asked or found.not_served_yet:
        return found
    longest = rounded(found.largest_context, question.model.default_max_len)
    line = command(msgspec.structs.replace(question, max_model_len=max(longest, found.max_model_len)))
    return msgspec.structs.replace(found, command=line)


def gib(count: int) -> float:
    return round(count / GIB, 2)
