"""fastqwen completion: what makes a shell complete commands, flags and model names. A text, so that TAB starts no program."""

from __future__ import annotations

import shlex
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import typer

from fastqwen.cli.options import model_names
from fastqwen.config import EngineConfig, options_of

BASH = """\
_fastqwen() {
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]} words=
    if [ "$command" = bench ] && [ "$COMP_CWORD" -gt 2 ]; then command="bench ${COMP_WORDS[2]}"; fi
    if [ "$COMP_CWORD" -eq 1 ]; then command=; fi
    case "$command $before" in
%(choices)s
    *) case "$command" in
%(commands)s
    esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _fastqwen fastqwen
"""
ZSH = """\
autoload -U +X compinit && compinit
autoload -U +X bashcompinit && bashcompinit
"""


class Shell(StrEnum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


class Flag(NamedTuple):
    names: list[str]
    choices: list[str]
    takes_value: bool
    about: str


class Entry(NamedTuple):
    """A command by its words: serve, bench latency; empty for what stands directly behind fastqwen."""

    words: str
    about: str
    flags: list[Flag]
    then: list[str]  # what may follow: commands, or models


def completion(
    context: typer.Context, shell: Annotated[Shell, typer.Argument(help="The shell to print it for.")]
) -> None:
    """Print what makes a shell complete commands, flags and model names.

    fastqwen completion bash >> ~/.bashrc
    fastqwen completion zsh >> ~/.zshrc
    fastqwen completion fish > ~/.config/fish/completions/fastqwen.fish
    """
    entries = list(_entries(context.find_root().command, ""))
    print({"bash": bash, "zsh": zsh, "fish": fish}[shell.value](entries), end="")


def _entries(command: Any, words: str) -> list[Entry]:
    children: dict[str, Any] = getattr(command, "commands", {})
    flags = [_flag(param) for param in command.params if param.param_type_name == "option" and not param.hidden]
    takes_model = any(param.name == "model" and param.param_type_name == "argument" for param in command.params)
    then = list(children) or (model_names("") if takes_model else [])
    about = (command.help or "").split("\n")[0].split(". ")[0].rstrip(".")
    found = [Entry(words, about, flags, then)]
    for name, child in children.items():
        found += _entries(child, f"{words} {name}".strip())
    return found


def _flag(param: Any) -> Flag:
    kind = options_of(EngineConfig).get(param.name, (None,))[0]
    choices = [str(one) for one in get_args(kind)] if get_origin(kind) is Literal else []
    names = [*param.opts, *param.secondary_opts]
    return Flag(names, choices, not param.is_flag, (param.help or "").split(". ")[0].rstrip("."))


def bash(entries: list[Entry]) -> str:
    choices, commands = [], []
    for entry in entries:
        for flag in entry.flags:
            if flag.takes_value:  # without choices the shell offers files
                patterns = "|".join(shlex.quote(f"{entry.words} {name}") for name in flag.names)
                choices.append(f"    {patterns}) words={shlex.quote(' '.join(flag.choices))} ;;")
        words = [*entry.then, *(name for flag in entry.flags for name in flag.names)]
        commands.append(f"    {shlex.quote(entry.words)}) words={shlex.quote(' '.join(words))} ;;")
    return BASH % {"choices": "\n".join(choices), "commands": "\n".join(commands)}


def zsh(entries: list[Entry]) -> str:
    return ZSH + bash(entries)


def fish(entries: list[Entry]) -> str:
    lines = []
    for entry in entries:
        words = entry.words.split()
        here = " && ".join(f"__fish_seen_subcommand_from {word}" for word in words) or "__fish_use_subcommand"
        if words == ["bench"]:
            here += " && not __fish_seen_subcommand_from latency throughput"
        about = {one.words: one.about for one in entries}
        for word in entry.then:
            described = about.get(f"{entry.words} {word}".strip(), "")
            lines.append(["-n", here, "-a", word, *(["-d", described] if described else [])])
        for flag in entry.flags:
            named = [
                part
                for name in flag.names
                for part in (("-l", name[2:]) if name.startswith("--") else ("-s", name[1:]))
            ]
            value = ["-r", *(["-f", "-a", " ".join(flag.choices)] if flag.choices else [])] if flag.takes_value else []
            lines.append(["-n", here, *named, *value, "-d", flag.about])
    return "".join(f"complete -c fastqwen {shlex.join(line)}\n" for line in lines)
