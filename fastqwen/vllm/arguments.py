"""EngineArgs and the parser of vLLM's example scripts: options from a command line to ``LLM(**vars(args))``."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any, Self

from fastqwen.config import EngineConfig, options_of
from fastqwen.vllm_names import ACCEPTED, OF_A_SERVER, REFUSED, SHORT, is_switch


class EngineArgs:
    """The options of an engine as fields: those that were given. ``LLM.from_engine_args`` makes the engine."""

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self.model = model
        vars(self).update(options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Flags for all of them; one that is not given leaves nothing behind, but ``model``, which has a default."""
        parser.add_argument("--model", default="demo", help="Model: demo, a folder, a .gguf file, or a hub name.")
        own = options_of(EngineConfig)
        short = {name: [letters] for letters, name in SHORT.items()}
        for name, (kind, meta) in own.items():
            takes = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": _reader(kind)}
            help_text = (meta.description or "").replace("%", "%%")
            flag = name.replace("_", "-")
            parser.add_argument(f"--{flag}", *short.get(flag, []), default=argparse.SUPPRESS, help=help_text, **takes)
        listed = [
            *OF_A_SERVER,
            *(name for names in ACCEPTED.values() for name in names),
            *(n for names in REFUSED.values() for n in names),
        ]
        for name in listed:
            if name.replace("-", "_") not in own:
                takes = {"action": argparse.BooleanOptionalAction} if is_switch(name) else {"type": _value}
                parser.add_argument(
                    f"--{name}", *short.get(name, []), default=argparse.SUPPRESS, help=argparse.SUPPRESS, **takes
                )
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> Self:
        """Those of a namespace that are an engine's; a script's own are left out."""
        tables = [*ACCEPTED.values(), *(list(names) for names in REFUSED.values())]
        known = {
            *(name.replace("-", "_") for name in OF_A_SERVER),
            "model",
            *EngineConfig.__struct_fields__,
            *(name.replace("-", "_") for names in tables for name in names),
        }
        return cls(**{name: value for name, value in vars(args).items() if name in known})


class AsyncEngineArgs(EngineArgs):
    """The same, for ``AsyncLLM.from_engine_args``."""


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Underscores and dashes are the same in the names of flags."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args([self._as_declared(word) for word in given], namespace)

    def _as_declared(self, word: str) -> str:
        if not word.startswith("--"):
            return word
        name, equals, value = word.partition("=")
        spellings = (name, "--" + name[2:].replace("_", "-"), "--" + name[2:].replace("-", "_"))
        known = next((one for one in spellings if one in self._option_string_actions), name)
        return known + equals + value


def _reader(kind: Any) -> Any:
    from types import UnionType
    from typing import get_args

    kinds = [one for one in get_args(kind) if one is not type(None)] if isinstance(kind, UnionType) else [kind]
    return kinds[0] if kinds[0] in (float, str) else _value


def _value(text: str) -> Any:
    """A number, a JSON value, 32k, or a text."""
    factors = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
    if text[-1:] in factors and text[:-1].isdigit():
        return int(text[:-1]) * factors[text[-1]]
    try:
        return json.loads(text)
    except ValueError:
        return text
