"""fastqwen batch"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.options import ApiKey, with_engine_options


@with_engine_options
def batch(
    engine_options: dict[str, Any],
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests in OpenAI's batch format, one a line.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the answers go; existing ones are kept.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model as in `serve`, or the address of a server.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    api_key: ApiKey = None,
) -> None:
    """Answer the requests of IN.jsonl. Killed and started again, it goes on where it was.

    fastqwen batch requests.jsonl -o answers.jsonl -m demo
    fastqwen batch requests.jsonl -o answers.jsonl -m http://localhost:8000
    """
    from fastqwen.terminal.batch import run

    raise typer.Exit(run(source, output, model, engine_options, concurrency=concurrency, api_key=api_key))


@with_engine_options
def run_batch(
    engine_options: dict[str, Any],
    source: Annotated[Path, typer.Option("--input-file", "-i", help="Requests in OpenAI's batch format, one a line.")],
    output: Annotated[Path, typer.Option("--output-file", "-o", help="Where the answers go; existing ones are kept.")],
    model: Annotated[str, typer.Option("--model", help="A model as in `serve`, or the address of a server.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 64,
    api_key: ApiKey = None,
) -> None:
    """What `batch` does, in vLLM's words.

    fastqwen run-batch -i requests.jsonl -o answers.jsonl --model demo
    """
    from fastqwen.terminal.batch import run

    raise typer.Exit(run(source, output, model, engine_options, concurrency=concurrency, api_key=api_key))
