"""The ``fastqwen`` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from fastqwen.cli import batch, bench, chat, check, generate, launch, plan, serve, web
from fastqwen.cli.options import help_text
from fastqwen.errors import FastqwenError
from fastqwen.version import __version__

app = typer.Typer(
    name="fastqwen",
    help="Serve and use Qwen models, on a CPU or a GPU.\n\nStart with: fastqwen serve demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    serve.serve,
    web.web,
    chat.chat,
    generate.generate,
    batch.batch,
    plan.plan,
    check.check,
    launch.launch,
):
    app.command(help=help_text(_command))(_command)
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """A user's mistake is one line on standard error and exit status 1; a bug keeps its traceback."""
    # Compute threads sleep while they wait for each other. Spinning is faster on an idle machine, and ten times slower
    # once anything else wants the cores (docs/ideas_tried.md). Read when torch is imported, inherited by the engine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except FastqwenError as error:
        print(f"fastqwen: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
