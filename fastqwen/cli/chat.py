"""fastqwen chat"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastqwen.cli.options import ApiKey, model_names, named, with_engine_options

if TYPE_CHECKING:
    from fastqwen.client.partner import Partner


@with_engine_options
def chat(
    engine_options: dict[str, Any],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|URL]",
            help="A model as in `serve`, or the address of a running server. Without it: the server that runs here, "
            "else the demo.",
            autocompletion=model_names,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Argument(help="Ask this, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer. Default: what the context allows.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Default: the model's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With a prompt: one JSON object.")] = False,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model in the terminal.

    fastqwen chat demo
    fastqwen chat localhost:8000
    cat notes.txt | fastqwen chat demo "Summarise this."

    Inside: /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.
    """
    from fastqwen.terminal.chat_loop import Conversation, run
    from fastqwen.terminal.session import partner_for, usual_model

    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "think": think}
    given = {name: value for name, value in options.items() if value is not None}

    def open_partner(name: str) -> Partner:
        return partner_for(named(name), engine_options, api_key)

    conversation = Conversation(open_partner(model or usual_model()), system, given, open_partner)
    raise typer.Exit(run(conversation, prompt=prompt, as_json=as_json))
