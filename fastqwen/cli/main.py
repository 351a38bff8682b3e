"""The ``fastqwen`` command."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fastqwen.cli import batch, bench, chat, check, cluster, completion, generate, launch, ours, plan, serve, web
from fastqwen.cli.groups import Command, Commands
from fastqwen.cli.options import help_text
from fastqwen.errors import FastqwenError, ModelNotFound
from fastqwen.version import __version__

NOT_ON_WINDOWS = (
    "fastqwen: not for Windows itself: use WSL (in PowerShell: wsl --install), install and start fastqwen there"
)

app = typer.Typer(
    name="fastqwen",
    cls=Commands,
    help="Serve and use Qwen models, on a CPU or a GPU.\n\nStart with: fastqwen serve demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
SERVE, USE, LOOK = "Serve a model", "Use one", "Look at what there is"
MANY = "Serve from many machines"
COMMANDS: list[tuple[str, str, Callable[..., None]]] = [
    ("serve", SERVE, serve.serve),
    ("web", SERVE, web.web),
    ("ps", SERVE, ours.ps),
    ("controller", MANY, cluster.controller),
    ("worker", MANY, cluster.worker),
    ("node", MANY, cluster.node),
    ("ranks", MANY, cluster.ranks),
    ("api", MANY, cluster.api),
    ("status", MANY, cluster.status),
    ("up", MANY, cluster.up),
    ("chat", USE, chat.chat),
    ("run", USE, chat.chat),  # as Ollama calls it
    ("generate", USE, generate.generate),
    ("batch", USE, batch.batch),
    ("run-batch", USE, batch.run_batch),  # as vLLM calls it
    ("complete", USE, generate.complete),
    ("launch", USE, launch.launch),
    ("plan", LOOK, plan.plan),
    ("check", LOOK, check.check),
    ("list", LOOK, ours.list_models),
    ("pull", LOOK, ours.pull),
    ("version", LOOK, ours.version),
    ("completion", LOOK, completion.completion),
]
OTHER_NAMES = ("run", "run-batch", "complete")  # for those who come from elsewhere
for _name, _title, _command in COMMANDS:
    app.command(_name, cls=Command, help=help_text(_command), hidden=_name in OTHER_NAMES, rich_help_panel=_title)(
        _command
    )
app.add_typer(bench.app, name="bench", rich_help_panel=LOOK)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def under_make(error: FastqwenError) -> str:
    """How to say in `make serve` what an error asks for, where that is how the command was started."""
    if not os.environ.get("FASTQWEN_UNDER_MAKE"):
        return ""
    if isinstance(error, ModelNotFound):
        return " (make serve MODEL=...)"
    named = re.search(r"--[a-z][a-z-]+", str(error))
    if named is None:
        return ""
    return " (make serve PORT=8001)" if named[0] == "--port" else f" (make serve ARGS='{named[0]} ...')"


def main() -> None:
    """A user's mistake is one line on standard error and exit status 1; a bug keeps its traceback."""
    if sys.platform == "win32":
        print(NOT_ON_WINDOWS, file=sys.stderr)
        sys.exit(1)
    # Compute threads sleep while they wait for each other. Spinning is faster on an idle machine, and ten times slower
    # once anything else wants the cores (docs/ideas_tried.md). Read when torch is imported, inherited by the engine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        app()
    except FastqwenError as error:
        print(f"fastqwen: {error}{under_make(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
