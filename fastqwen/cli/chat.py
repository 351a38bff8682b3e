"""fastqwen chat"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastqwen.cli.options import ApiKey, with_engine_options


@with_engine_options
def chat(
    engine_options: dict[str, Any],
    model: Annotated[
        str, typer.Argument(metavar="MODEL|URL", help="A model as in `serve`, or the address of a running server.")
    ],
    prompt: Annotated[str | None, typer.Argument(help="Ask this, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: what the context allows.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model in the terminal.

    fastqwen chat demo
    fastqwen chat http://localhost:8000
    cat notes.txt | fastqwen chat demo "Summarise this."

    Inside: /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.
    """
    from fastqwen.terminal.chat_loop import run
    from fastqwen.terminal.session import partner_for

    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    raise typer.Exit(run(partner_for(model, engine_options, api_key), prompt=prompt, system=system, options=given))
