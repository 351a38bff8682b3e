"""fastqwen generate"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.options import Model, with_engine_options


@with_engine_options
def generate(
    engine_options: dict[str, Any],
    model: Model,
    prompt: Annotated[list[str] | None, typer.Argument(help="One or more prompts; none reads standard input.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A file with one prompt per line.")] = None,
    raw: Annotated[bool, typer.Option(help="Continue the text as it is, without a chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's own.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Default: the model's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Answer prompts in one batch and print the answers in order.

    fastqwen generate demo "List the days of the week."
    fastqwen generate demo --file prompts.txt --json
    """
    from fastqwen.errors import BadConfig
    from fastqwen.llm import LLM

    prompts = list(prompt or []) + (_lines(file) if file else [])
    if not prompts:
        prompts = [sys.stdin.read()]
    if not any(one.strip() for one in prompts):
        raise BadConfig("there is no prompt: give one as an argument, with --file, or on standard input")
    llm = LLM(model, **engine_options)
    params = llm.get_default_sampling_params()
    params.max_tokens = max_tokens
    if temperature is not None:
        params.temperature = temperature
    if top_p is not None:
        params.top_p = top_p
    if raw or llm.text is None or llm.text.template is None:
        outputs = llm.generate(prompts, params)
    else:
        outputs = llm.chat([[{"role": "user", "content": one}] for one in prompts], params)
    for one, output in zip(prompts, outputs, strict=True):
        answer = output.outputs[0]
        if as_json:
            values = {"prompt": one, "text": answer.text, "finish_reason": answer.finish_reason}
            print(json.dumps(values, ensure_ascii=False))
        else:
            print(answer.text)


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
