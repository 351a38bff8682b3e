"""fastqwen generate"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.options import MODEL_HELP, ApiKey, model_names, with_engine_options


@with_engine_options
def generate(
    engine_options: dict[str, Any],
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|URL", help=f"{MODEL_HELP} Or the address of a server.", autocompletion=model_names
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts; none reads standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file with one prompt per line.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without a chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    api_key: ApiKey = None,
) -> None:
    """Answer prompts in one batch and print the answers in order.

    fastqwen generate demo "List the days of the week."
    fastqwen generate demo --file prompts.txt --json
    fastqwen generate localhost:8000 "List the days of the week."
    """
    from fastqwen.client.remote import is_address
    from fastqwen.errors import BadConfig

    prompts = list(prompt or []) + (_lines(file) if file else [])
    if not prompts:
        prompts = [sys.stdin.read()]
    if not any(one.strip() for one in prompts):
        raise BadConfig("there is no prompt: give one as an argument, with --file, or on standard input")
    wished = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p}
    options = {name: value for name, value in wished.items() if value is not None}
    if is_address(model):
        from fastqwen.terminal.generate import answers_of_server

        answers = answers_of_server(model, prompts, options, raw=raw, api_key=api_key)
    else:
        answers = _answers_of_our_own(model, prompts, options, engine_options, raw=raw)
    for one, (text, finish_reason) in zip(prompts, answers, strict=True):
        if as_json:
            values = {"prompt": one, "text": text, "finish_reason": finish_reason}
            print(json.dumps(values, ensure_ascii=False))
        else:
            print(text)


def complete(
    url: Annotated[str, typer.Option(help="Address of a running server.")] = "http://localhost:8000/v1",
    quick: Annotated[
        str | None, typer.Option("--quick", "-q", help="The text to continue. Default: standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    api_key: ApiKey = None,
) -> None:
    """Continue a text on a running server, as vLLM's command of this name does.

    fastqwen complete --url http://localhost:8000/v1 -q "The capital of France is"
    """
    from fastqwen.cli.options import named
    from fastqwen.terminal.generate import answers_of_server

    prompt = sys.stdin.read() if quick is None else quick
    server = named(url.rstrip("/").removesuffix("/v1"))
    for text, _ in answers_of_server(server, [prompt], {"max_tokens": max_tokens}, raw=True, api_key=api_key):
        print(text)


def _answers_of_our_own(
    model: str, prompts: list[str], options: dict[str, Any], engine_options: dict[str, Any], *, raw: bool
) -> Iterator[tuple[str, str | None]]:
    from fastqwen.llm import LLM

    llm = LLM(model, **engine_options)
    params = llm.get_default_sampling_params()
    for name, value in options.items():
        setattr(params, name, value)
    if raw or llm.text is None or llm.text.template is None:
        outputs = llm.generate(prompts, params)
    else:
        outputs = llm.chat([[{"role": "user", "content": one}] for one in prompts], params)
    for output in outputs:
        yield output.outputs[0].text, output.outputs[0].finish_reason


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
