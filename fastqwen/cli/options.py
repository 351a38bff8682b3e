"""Engine flags, made from EngineConfig's fields, so that there is one list of options."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable
from functools import cache
from types import UnionType
from typing import Any

import msgspec
import typer

from fastqwen.config import EngineConfig

_SUFFIXES = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
ENGINE_PANEL = "Engine"


def whole_number(text: str) -> int:
    """12, 32K (32,768), 32k (32,000), 1M, 4G: as vLLM reads them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", str(text).strip())
    number = float(match[1]) * _SUFFIXES[match[2]] if match else 0.5
    if number != int(number):
        raise typer.BadParameter(f"{text!r} is not a whole number (32768, 32K and 1M are fine)")
    return int(number)


def help_text(command: Callable[..., None]) -> str:
    """A command's docstring; a paragraph of examples keeps its lines."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(f"\b\n{one}" if _is_example(one) else one for one in paragraphs)


def _is_example(paragraph: str) -> bool:
    return all(line.startswith("fastqwen ") or " | fastqwen " in line for line in paragraph.splitlines())


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every EngineConfig field as a flag; it receives them as one ``engine`` dict.

    Its own parameters keep their places and go before a field of the same name; ``engine`` must be among them.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    taken = {one.name for one in own}
    names = [name for name in EngineConfig.__struct_fields__ if name not in taken]
    added = [_parameter(name) for name in names]

    def run(**values: Any) -> None:
        engine = {name: values.pop(name) for name in names}
        command(engine=engine, **values)

    parameters = [one for one in own if one.name != "engine"] + added
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


@cache
def _hints() -> dict[str, Any]:
    """Once for all commands: --help must be quick."""
    return typing.get_type_hints(EngineConfig, include_extras=True)


@cache
def _parameter(name: str) -> inspect.Parameter:
    hint = _hints()[name]
    inner, meta = typing.get_args(hint)[0], typing.get_args(hint)[1]
    default = next(field.default for field in msgspec.structs.fields(EngineConfig) if field.name == name)
    flag = "--" + name.replace("_", "-")
    optional = isinstance(inner, UnionType)
    if optional:
        inner = next(one for one in typing.get_args(inner) if one is not type(None))
    extra: dict[str, Any] = {}
    kind: Any = inner
    flags = [flag]
    if inner is int:
        extra = {"parser": whole_number, "metavar": "NUMBER"}
    elif inner is bool:
        flags = [f"{flag}/--no-{name.replace('_', '-')}"]
    if default is msgspec.NODEFAULT:
        default = []
    info = typer.Option(*flags, help=meta.description, rich_help_panel=ENGINE_PANEL, show_default=not optional, **extra)
    annotation: Any = typing.Annotated[(kind | None) if optional else kind, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
