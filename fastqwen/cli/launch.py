"""fastqwen launch"""

from __future__ import annotations

from typing import Annotated

import typer

from fastqwen.cli.options import ApiKey


def launch(
    agent: Annotated[str, typer.Argument(metavar="AGENT", help="claude, codex, qwen-code, opencode or aider.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[-- ARGS]", help="For the agent itself.")] = None,
    model: Annotated[
        str, typer.Option(metavar="URL|MODEL", help="A server's address, or a model to serve meanwhile.")
    ] = "http://localhost:8000",
    only_print: Annotated[
        bool, typer.Option("--print", help="Show the settings instead of starting the agent.")
    ] = False,
    api_key: ApiKey = None,
) -> None:
    """Start a coding agent that uses this server: address, model and context length are set for that process only.

    fastqwen launch claude
    fastqwen launch codex --model Qwen/Qwen3-8B -- exec "Explain this folder"
    fastqwen launch aider --print
    """
    from fastqwen.terminal.agents import launch as start

    raise typer.Exit(start(agent, model, arguments or [], api_key=api_key, only_print=only_print))
