"""fastqwen bench"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.groups import Command, Commands
from fastqwen.cli.options import ApiKey, Model, help_text, with_engine_options

app = typer.Typer(
    cls=Commands, help="Measure speed, and compare it with what the machine's memory allows.", no_args_is_help=True
)

BATCH_SIZES = [1, 8]
INPUT_LENS = [128]
CONCURRENCIES = [1, 16, 64]


def read_schema(given: str) -> dict[str, Any]:
    """JSON, or a file of it. Raises BadConfig."""
    import json
    from pathlib import Path

    from fastqwen.errors import BadConfig

    try:
        found = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BadConfig(f"--json-schema is neither JSON nor a file of it: {error}") from None
    if not isinstance(found, dict):
        raise BadConfig(f"--json-schema must be an object, not {type(found).__name__}")
    return found


@with_engine_options
def latency(
    engine_options: dict[str, Any],
    model: Model,
    batch_size: Annotated[
        list[int], typer.Option(min=1, help="Sequences at once; may be given several times.")
    ] = BATCH_SIZES,
    input_len: Annotated[
        list[int], typer.Option(min=1, help="Prompt tokens of each sequence; may be given several times.")
    ] = INPUT_LENS,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens whose steps are timed.")] = 64,
    sampling: Annotated[
        bool, typer.Option("--sampling", help="Sample as Qwen advises: temperature 0.6, top-p 0.95, top-k 20.")
    ] = False,
    penalties: Annotated[bool, typer.Option("--penalties", help="The same with a presence penalty of 1.5.")] = False,
    logprobs: Annotated[int | None, typer.Option(min=0, help="Log-probabilities told of each token.")] = None,
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="JSON|FILE", help="Hold every second sequence to this schema while decoding: one of long answers."
        ),
    ] = None,
    prefill: Annotated[str, typer.Option(help="Prompts to read: how many x how long.")] = "4x512",
    num_iters: Annotated[int, typer.Option(min=1, help="Repetitions; the median counts.")] = 3,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw speed and share of the bandwidth over batch size.")
    ] = None,
) -> None:
    """Time one decoding step, (time for 1 + n tokens - time for 1 token) / n, and the reading of prompts.

    fastqwen bench latency demo
    fastqwen bench latency demo --batch-size 1 --batch-size 4 --batch-size 16 --plot speed.png
    fastqwen bench latency demo --sampling --logprobs 5 --input-len 128 --input-len 1024
    fastqwen bench latency demo --batch-size 4 --json-schema '{"type": "array", "items": {"type": "integer"}, "minItems": 1000}'
    fastqwen bench latency configs/Qwen3-8B --load-format dummy --batch-size 1 --batch-size 64 --prefill 32x4096
    """
    import re

    from fastqwen.errors import BadConfig
    from fastqwen.plot import check_plot

    shape = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", prefill)
    if shape is None:
        raise BadConfig(f"--prefill is {prefill!r}, but must look like 4x512")
    if plot is not None:
        check_plot(plot)

    from fastqwen.benchmark.latency import run, sampling_of
    from fastqwen.config import EngineConfig

    schema = None if json_schema is None else read_schema(json_schema)
    config = EngineConfig(
        model=model, **{**engine_options, "skip_tokenizer_init": schema is None, "enable_prefix_caching": False}
    )
    prompts = (int(shape[1]), int(shape[2]))
    run(
        config.for_batches(),
        batch_sizes=batch_size,
        input_lens=input_len,
        output_len=output_len,
        prompts=prompts,
        iters=num_iters,
        sampling=sampling_of(sampled=sampling, penalties=penalties, logprobs=logprobs),
        json_schema=schema,
        plot=plot,
    )


@with_engine_options
def throughput(
    engine_options: dict[str, Any],
    model: Model,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts in one call.")] = 64,
    input_len: Annotated[str, typer.Option(help="Prompt tokens: a number, or a range to draw from.")] = "32-256",
    output_len: Annotated[str, typer.Option(help="Answer tokens: a number, or a range to draw from.")] = "32-128",
) -> None:
    """Generate for many random prompts in one call, as an offline batch does.

    fastqwen bench throughput demo
    fastqwen bench throughput configs/Qwen3-8B --load-format dummy --num-prompts 256 --input-len 100-1024 --output-len 100-1024
    """
    from fastqwen.benchmark.throughput import run
    from fastqwen.benchmark.work import span
    from fastqwen.config import EngineConfig

    config = EngineConfig(model=model, **{**engine_options, "skip_tokenizer_init": True})
    run(config, num_prompts=num_prompts, input_len=span(input_len), output_len=span(output_len))


@with_engine_options
def serve(
    engine_options: dict[str, Any],
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL|URL", help="A model to serve, or a running server.")
    ] = None,
    concurrency: Annotated[
        list[int],
        typer.Option("--concurrency", "--max-concurrency", min=1, help="Streams at once; may be given several times."),
    ] = CONCURRENCIES,
    num_requests: Annotated[
        int | None,
        typer.Option("--num-requests", "--num-prompts", min=1, help="At each level. Default: 4 for each stream."),
    ] = None,
    input_len: Annotated[int, typer.Option("--input-len", "--random-input-len", min=1, help="Prompt tokens.")] = 128,
    output_len: Annotated[int, typer.Option("--output-len", "--random-output-len", min=2, help="Answer tokens.")] = 64,
    turns: Annotated[
        int, typer.Option(min=1, help="Requests of a conversation, each with all in front of it in its prompt.")
    ] = 1,
    system_len: Annotated[int, typer.Option(min=0, help="Prompt tokens in front of all, the same everywhere.")] = 0,
    base_url: Annotated[str | None, typer.Option(help="A running server, in MODEL's place.")] = None,
    dataset_name: Annotated[str, typer.Option(help="Prompts are random tokens: random is all there is.")] = "random",
    request_rate: Annotated[str, typer.Option(help="Streams follow each other at once: inf is all there is.")] = "inf",
    api_key: ApiKey = None,
) -> None:
    """Stream completions over HTTP in closed loops and report time to first token and between tokens.

    fastqwen bench serve demo --concurrency 1 --concurrency 64
    fastqwen bench serve http://localhost:8000 --concurrency 256 --input-len 512 --output-len 128
    fastqwen bench serve demo --concurrency 8 --turns 6 --system-len 500 --input-len 60 --output-len 40
    """
    from fastqwen.errors import BadConfig

    if dataset_name != "random":
        raise BadConfig(f"--dataset-name is {dataset_name!r}, but prompts are random tokens here: leave it out")
    if request_rate != "inf":
        raise BadConfig("--request-rate: streams follow each other in closed loops: use --concurrency")
    target = base_url or model
    if target is None:
        raise BadConfig("give a model, or the address of a server with --base-url")

    from fastqwen.benchmark.serve import run

    run(
        target,
        engine_options,
        levels=concurrency,
        num_requests=num_requests,
        input_len=input_len,
        output_len=output_len,
        turns=turns,
        system_len=system_len,
        api_key=api_key,
    )


for _command in (latency, throughput, serve):
    app.command(cls=Command, help=help_text(_command))(_command)
