"""How the command line shows itself: flags in groups, and an answer to words that belong to other programs."""

from __future__ import annotations

import difflib
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fastqwen.cli import fastchat_flags
from fastqwen.cli.vllm_flags import Translated, translated
from fastqwen.errors import BadConfig

MAX_HELP_CHARS = 100
# Commands of Ollama, vLLM, FastChat and llama.cpp that are called otherwise here, or that need nothing.
ELSEWHERE = {
    "show": "fastqwen check MODEL shows what is known of a model",
    "rm": "models lie in the hub's cache: hf cache rm, or remove the folder that fastqwen list names",
    "stop": "Ctrl-C ends a server, or kill with the PID that fastqwen ps shows",
    "create": "a folder or .gguf file is served as it is: fastqwen serve ./my-checkpoint",
    "cp": "--served-model-name gives a model other names",
    "push": "nothing is uploaded from here",
    "start": "fastqwen serve MODEL",
    "collect-env": "fastqwen plan shows what was found of this machine",
    "cli": "fastqwen chat MODEL",
    "model_worker": "fastqwen worker MODEL, or fastqwen serve MODEL, which is API, page and model in one",
    "vllm_worker": "fastqwen worker MODEL, or fastqwen serve MODEL, which is API, page and model in one",
    "openai_api_server": "fastqwen api, or fastqwen serve MODEL, which is API, page and model in one",
    "gradio_web_server": "fastqwen web --controller HOST:PORT, or fastqwen web --api URL",
}


class Command(TyperCommand):
    """Its flags stand under the titles that they carry, those without one first."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        groups: dict[str, list[tuple[str, str]]] = {}
        arguments: list[tuple[str, str]] = []
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if param.param_type_name == "argument":
                arguments.append(record)
            else:
                groups.setdefault(getattr(param, "rich_help_panel", None) or "Options", []).append(record)
        for title, records in (("Arguments", arguments), ("Options", groups.pop("Options", [])), *groups.items()):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Commands(TyperGroup):
    """Commands stand under the titles that they carry. One that is not here is answered with what does its work."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                title = getattr(command, "rich_help_panel", None)
                about = command.get_short_help_str(MAX_HELP_CHARS)
                groups.setdefault(title if isinstance(title, str) else "Commands", []).append((name, about))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            near = difflib.get_close_matches(word, self.list_commands(ctx), 1)
            if word in ELSEWHERE:
                raise BadConfig(f"there is no command {word}: {ELSEWHERE[word]}")
            hint = f"did you mean {near[0]}?" if near else "fastqwen --help lists them"
            raise BadConfig(f"there is no command {word}: {hint}")
        name, command, rest = super().resolve_command(ctx, args)
        if name in fastchat_flags.COMMANDS:
            rest = _told(fastchat_flags.translated(rest))
        return name, command, _in_our_words(command, rest)


def _in_our_words(command: Any, words: list[str]) -> list[str]:
    """A command that takes a model takes vLLM's flags as well. What of them has no effect is said."""
    options = [param for param in command.params if param.param_type_name == "option"]
    if not any(param.name == "model" and param.param_type_name == "argument" for param in command.params):
        return words
    ours = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    several = {name for option in options if option.multiple for name in option.opts}
    return _told(translated(words, ours, several))


def _told(found: Translated | fastchat_flags.Translated) -> list[str]:
    for notice in found.notices:
        print(f"INFO:     {notice}", file=sys.stderr)
    return found.words
