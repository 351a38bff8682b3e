"""``fastqwen plan``: what will run, before the download. Imports rich and matplotlib only when it shows something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import msgspec
import typer

from fastqwen import quant
from fastqwen.cli.find_model import find_model
from fastqwen.cli.options import with_options
from fastqwen.config import KV_CACHE_DTYPES, Dtype, check_positive, check_utilization
from fastqwen.errors import BadConfig, Unsupported
from fastqwen.plan import render
from fastqwen.plan.advice import Answer, answer, best_model, list_models
from fastqwen.plan.catalog import catalog, quantized_version
from fastqwen.plan.changes import LIST_TOKENS
from fastqwen.plan.facts import GIB, MIB, PROFILES, EngineProfile
from fastqwen.plan.gpus import Target, find_target
from fastqwen.plan.question import PlanOptions, Question
from fastqwen.plot import check_plot

if TYPE_CHECKING:
    from rich.console import Console

NOTICEABLE_BYTES = 64 * MIB
DTYPES = get_args(Dtype)


@with_options(options=PlanOptions)
def plan(
    options: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Argument(help="Published name, folder, .gguf file or hub name. Without it: which Qwen models run there."),
    ] = None,
    gpu: Annotated[
        str,
        typer.Option(
            help='A GPU ("RTX 3090"), its memory (24 or 24GB), auto: what is here, or cpu: this machine without.'
        ),
    ] = "auto",
    best: Annotated[
        bool, typer.Option("--best", help="Without MODEL: recommend one, and print its command last.")
    ] = False,
    quantization: Annotated[
        str | None, typer.Option(help="Plan this version of the model: int4 (gptq), int8, awq, fp8 or none.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Whose habits: fastqwen, or eager-2023 (docs/planner.md).")] = "fastqwen",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw memory against context length.")] = None,
) -> None:
    """Say before the download whether a model fits, how far, how fast, and what to type.

    Ends with status 1 if fastqwen does not compute on such a GPU.

    fastqwen plan Qwen-7B --gpu "RTX 3090"
    fastqwen plan --gpu 24GB
    fastqwen plan --best
    """
    target = find_target(gpu)
    settings = PlanOptions(**options, profile=_profile(engine))
    _check(settings, target)
    if plot is not None:
        check_plot(plot)
    if model is None:
        if plot is not None or quantization is not None:
            raise BadConfig("--plot and --quantization need a model: fastqwen plan MODEL")
        if best:
            _print_best(target, settings, as_json=as_json)
        else:
            _print_list(list_models(target, settings), target, settings, as_json=as_json)
    else:
        if best:
            raise BadConfig(f"--best recommends a model, but {model} is named: leave out one of them")
        named = find_model(model)
        if quantization is not None:
            named = quantized_version(named, quantization)
        question = Question.of(settings, named, target.facts)
        answered = answer(question, target)
        machine = _about_this_machine(target, settings.num_gpus) if gpu == "auto" else []
        own = (*named.notices, *named.model.notices, *quant.notices(named.model.quantization))
        notices = (*target.notices, *own, *answered.notices, *machine)
        if plot is not None:
            render.plot(question, plot)
        _print_answer(msgspec.structs.replace(answered, notices=notices), as_json=as_json)
    if target.hindrance is not None and settings.profile is None:
        raise typer.Exit(1)


def _about_this_machine(target: Target, num_gpus: int) -> list[str]:
    notices = []
    if num_gpus > target.installed:
        notices.append(f"this machine has {target.installed}")
    others = target.facts.total_bytes - target.facts.free_bytes
    if target.facts.kind == "cuda" and others > NOTICEABLE_BYTES:
        notices.append(f"other programs hold {others / GIB:.2f} GiB of it")
    return notices


def _profile(engine: str) -> EngineProfile | None:
    if engine not in PROFILES:
        raise BadConfig(f"--engine is {engine!r}; possible: {', '.join(PROFILES)}")
    return None if engine == "fastqwen" else PROFILES[engine]


def _check(options: PlanOptions, target: Target) -> None:
    """Raises BadConfig, naming the flag, for a value that cannot be."""
    if options.dtype not in DTYPES:
        raise BadConfig(f"--dtype is {options.dtype!r}; possible: {', '.join(DTYPES)}")
    if options.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise BadConfig(f"--kv-cache-dtype is {options.kv_cache_dtype!r}; possible: {', '.join(KV_CACHE_DTYPES)}")
    check_positive(options, "num_gpus", "concurrency", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    check_utilization(options.gpu_memory_utilization)
    if target.facts.kind == "cpu" and options.num_gpus > 1:
        raise BadConfig("--num-gpus is for GPUs, but there is none here: name one with --gpu")


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _print_answer(answered: Answer, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(render.as_json(answered), indent=2))
        return
    console = _console()
    first, *rest = render.as_lines(answered)
    console.print(first, style="bold", markup=False)
    console.print(render.memory_table(render.shown_answer(answered)))
    for line in rest:
        console.print(line, markup=False)


def _print_best(target: Target, options: PlanOptions, *, as_json: bool) -> None:
    found = None if target.hindrance is not None else best_model(target, options)
    if found is None:
        raise Unsupported(target.hindrance or f"no published Qwen model that is served today fits on {target.label}")
    if as_json:
        print(json.dumps(render.as_json(found), indent=2))
        return
    found = msgspec.structs.replace(found, notices=(*target.notices, *found.notices))
    for line in (f"recommended for {target.label}: {found.model}", *render.as_lines(found)[1:]):
        print(line)


def _print_list(answers: list[Answer], target: Target, options: PlanOptions, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps([render.as_json(found) for found in answers], indent=2))
        return
    for line in _list_lines(answers, target, options):
        print(line)


def _list_lines(answers: list[Answer], target: Target, options: PlanOptions) -> Iterator[str]:
    running = sum(found.fits and not found.not_served_yet for found in answers)
    on_paper = [found for found in answers if found.fits and found.not_served_yet]
    where = target.label if options.num_gpus == 1 else f"{options.num_gpus} x {target.label}"
    length = f"at their own length or {LIST_TOKENS:,} tokens, whichever is less"
    if options.max_model_len is not None:
        length = f"with {options.max_model_len:,} tokens"
    yield from (f"note: {notice}" for notice in target.notices)
    if target.hindrance is not None:
        yield target.hindrance
        yield f"There {running} of {len(answers)} published Qwen models would fit, {length}."
        return
    yield f"{running} of {len(answers)} published Qwen models run on {where}, {length}; the newest first."
    yield "Memory is what one answer of that length takes, the longest context what the command below each asks for."
    basis = next((found.speed_single.basis for found in answers if found.speed_single is not None), None)
    yield (
        f"Speeds are what is expected ({basis})."
        if basis is not None
        else "No speed is named: no such card was measured."
    )
    yield ""
    yield from render.list_lines(answers)
    yield ""
    if on_paper:
        missing = sorted({word for found in on_paper for word in found.not_served_yet})
        yield f"{len(on_paper)} more would fit, but fastqwen does not serve yet: {', '.join(missing)}"
    names = ", ".join(later.name.removeprefix("Qwen/") for later in catalog().not_served)
    yield f"not served yet: {names}"
    yield "fastqwen plan MODEL says more; --best recommends one; --json lists every model with its figures and its command"
