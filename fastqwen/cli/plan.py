"""``fastqwen plan``: what will run, before the download. Imports what it shows with only when it shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fastqwen.cli.find_model import find_model
from fastqwen.cli.options import whole_number
from fastqwen.errors import BadConfig
from fastqwen.plan.advice import Answer, answer, list_models
from fastqwen.plan.catalog import catalog, quantized_version
from fastqwen.plan.changes import LIST_TOKENS
from fastqwen.plan.facts import GIB, MIB, PROFILES, EngineProfile
from fastqwen.plan.gpus import Target, find_target
from fastqwen.plan.memory import KV_CACHE_DTYPES
from fastqwen.plan.question import UTILIZATION, Question, Wishes
from fastqwen.plot import check_plot

NOTICEABLE_BYTES = 64 * MIB
DTYPES = ("auto", "float32", "bfloat16", "float16")


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Published name, folder, .gguf file or hub name. Without it: which Qwen models run there."),
    ] = None,
    gpu: Annotated[str, typer.Option(help='A GPU ("RTX 3090"), its memory (24GB), or auto: what is here.')] = "auto",
    num_gpus: Annotated[int, typer.Option(help="GPUs that share the model.")] = 1,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            parser=whole_number,
            metavar="NUMBER",
            help="Longest sequence, for example 32K. Default: what the model was trained for.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Sequences of that length at once.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[
        str | None, typer.Option(help="Plan this version of the model: int4 (gptq), int8, awq, fp8 or none.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, fp8 or int8.")] = "auto",
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU's memory to use.")] = UTILIZATION,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Most sequences that run at once, as serve has it. Default: 256, on a CPU 64.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens in one step, as serve has it. Default: 8192, on a CPU 512.")
    ] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="Plan without CUDA graphs.")] = False,
    engine: Annotated[str, typer.Option(help="Whose habits: fastqwen, or eager-2023 (docs/planner.md).")] = "fastqwen",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw memory against context length.")] = None,
) -> None:
    """Say before the download whether a model fits, how far, how fast, and what to type.

    fastqwen plan Qwen-7B --gpu "RTX 3090"
    fastqwen plan --gpu 24GB
    """
    target = find_target(gpu)
    wishes = Wishes(
        num_gpus=num_gpus,
        max_model_len=max_model_len,
        concurrency=concurrency,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        utilization=gpu_memory_utilization,
        eager=enforce_eager,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        profile=_profile(engine),
    )
    _check(wishes, target)
    if plot is not None:
        check_plot(plot)
    if model is None:
        if plot is not None or quantization is not None:
            raise BadConfig("--plot and --quantization need a model: fastqwen plan MODEL")
        _print_list(list_models(target, wishes), target, wishes, as_json=as_json)
        return
    found = find_model(model)
    if quantization is not None:
        found = quantized_version(found, quantization)
    question = Question.of(wishes, found, target.facts)
    answered = answer(question, target)
    notices = [*found.notices, *answered.notices]
    if gpu == "auto" and num_gpus > target.installed:
        notices.append(f"this machine has {target.installed}")
    others = target.facts.total_bytes - target.facts.free_bytes
    if target.facts.kind == "cuda" and others > NOTICEABLE_BYTES:
        notices.append(f"other programs hold {others / GIB:.2f} GiB of it")
    answered = msgspec.structs.replace(answered, notices=tuple(notices))
    if plot is not None:
        from fastqwen.plan import render

        render.plot(question, plot)
    _print_answer(answered, as_json=as_json)


def _profile(engine: str) -> EngineProfile | None:
    if engine not in PROFILES:
        raise BadConfig(f"--engine is {engine!r}; possible: {', '.join(PROFILES)}")
    return None if engine == "fastqwen" else PROFILES[engine]


def _check(wishes: Wishes, target: Target) -> None:
    """Raises BadConfig, naming the flag, for a value that cannot be."""
    if wishes.dtype not in DTYPES:
        raise BadConfig(f"--dtype is {wishes.dtype!r}; possible: {', '.join(DTYPES)}")
    if wishes.kv_cache_dtype not in KV_CACHE_DTYPES:
        raise BadConfig(f"--kv-cache-dtype is {wishes.kv_cache_dtype!r}; possible: {', '.join(KV_CACHE_DTYPES)}")
    numbers = {
        "--num-gpus": wishes.num_gpus,
        "--concurrency": wishes.concurrency,
        "--max-model-len": wishes.max_model_len,
        "--max-num-seqs": wishes.max_num_seqs,
        "--max-num-batched-tokens": wishes.max_num_batched_tokens,
    }
    for flag, value in numbers.items():
        if value is not None and value < 1:
            raise BadConfig(f"{flag} is {value}, but must be at least 1")
    if not 0.05 <= wishes.utilization <= 1.0:
        raise BadConfig(f"--gpu-memory-utilization is {wishes.utilization}, but must be at least 0.05 and at most 1")
    if target.facts.kind == "cpu" and wishes.num_gpus > 1:
        raise BadConfig("--num-gpus is for GPUs, but there is none here: name one with --gpu")


def _print_answer(found: Answer, *, as_json: bool) -> None:
    from fastqwen.plan import render

    if as_json:
        print(json.dumps(render.as_json(found), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    first, *rest = render.as_lines(found)
    console.print(first, style="bold", markup=False)
    console.print(render.memory_table(found))
    for line in rest:
        console.print(line, markup=False)


def _print_list(answers: list[Answer], target: Target, wishes: Wishes, *, as_json: bool) -> None:
    from fastqwen.plan import render

    if as_json:
        print(json.dumps([render.as_json(found) for found in answers], indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    running = sum(found.fits and not found.not_served_yet for found in answers)
    on_paper = [found for found in answers if found.fits and found.not_served_yet]
    where = target.label if wishes.num_gpus == 1 else f"{wishes.num_gpus} x {target.label}"
    length = f"at their own length or {LIST_TOKENS} tokens, whichever is less"
    if wishes.max_model_len is not None:
        length = f"with {wishes.max_model_len} tokens"
    console.print(
        f"{running} of {len(answers)} published Qwen models run on {where}, {length}",
        style="bold",
        markup=False,
    )
    console.print(render.models_table(answers))
    if on_paper:
        missing = sorted({word for found in on_paper for word in found.not_served_yet})
        console.print(
            f"{len(on_paper)} more would fit, but fastqwen does not serve yet: {', '.join(missing)}", markup=False
        )
    names = ", ".join(later.name.removeprefix("Qwen/") for later in catalog().not_served)
    console.print(f"not served yet: {names}", markup=False)
    console.print("fastqwen plan MODEL says more; --json lists every model with its figures and its command line")
