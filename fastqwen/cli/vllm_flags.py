"""Command lines that were written for `vllm serve`, in our words: fastqwen/vllm_names.py decides about each of its flags."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastqwen.errors import BadConfig
from fastqwen.vllm_names import RENAMED, SHORT, VALUES, fate, holds_anyway, is_switch, own_parts


class Translated(NamedTuple):
    words: list[str]
    notices: list[str]


def translated(words: list[str], ours: Collection[str], several: Collection[str]) -> Translated:
    """The words behind `fastqwen serve`, with vLLM's flags as ours. Raises BadConfig for one that cannot hold.

    ``ours``: our flags, as --max-model-len; ``several``: those among them that may be given more than once, and so may have
    several values behind them.
    """
    words = _with_file(words)
    found, notices, model = list[str](), list[str](), list[str]()
    has_model = (bool(words) and not words[0].startswith("-")) or any(_name_of(word)[0] == "model" for word in words)
    for word, values in _joined(list(_parted(words))):
        name, negated = _name_of(word)
        if not name:
            found += [word, *values] if word else values
        elif name == "model":
            model += values
        elif f"--{name}" in ours:
            found += _own(name, values, several=has_model and f"--{name}" in several, negated=negated)
        else:
            decided = fate(name)
            if decided is None:
                found += [word, *values]  # the parser says that it knows no such flag
                continue
            taken = 0 if is_switch(name) else 1
            given = " ".join(values[:1]) if taken else ""
            parts, given = own_parts(name, given)
            found += [part for one, value in parts.items() for part in (f"--{one}", value)]
            held = negated or holds_anyway(name, given, decided.neutral) or not (given or is_switch(name))
            if decided.refused and not held:
                raise BadConfig(f"--{name}{f' {given}' if given else ''} of vLLM cannot hold here: {decided.why}")
            notices.append(f"--{name}{f' {given}' if given else ''} of vLLM changes nothing here: {decided.why}")
            found += [] if _takes_all(name) else values[taken:]
    return Translated([*model, *found], notices)


def _with_file(words: list[str]) -> list[str]:
    """--config FILE.yaml is replaced by the flags that it holds and the command line does not. Raises BadConfig."""
    for index, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag != "--config":
            continue
        if "=" not in word and index + 1 == len(words):
            raise BadConfig("--config needs the name of a YAML file")
        behind = index + (1 if "=" in word else 2)
        file = Path(value if "=" in word else words[index + 1])
        rest = words[:index] + words[behind:]
        given = {_name_of(one)[0] for one in rest} | ({"model"} if rest and not rest[0].startswith("-") else set())
        return rest + [
            part for name, found in _entries(file).items() if name not in given for part in _as_words(name, found)
        ]
    return words


def _entries(file: Path) -> dict[str, Any]:
    """Under the names of flags, without dashes."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"--config {file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise BadConfig(f"--config {file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise BadConfig(f"--config {file} must hold lines like port: 8000")
    return {_name_of(f"--{key}")[0]: value for key, value in found.items()}


def _as_words(name: str, value: Any) -> list[str]:
    if value is None or (value is False and fate(name) is not None):
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _takes_all(name: str) -> bool:
    return name in ("cudagraph-capture-sizes", "device-ids", "lora-modules", "middleware", "ignore-patterns")


def _parted(words: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with what stands behind it; what stands in front of all flags comes with an empty one."""
    flag, values = "", list[str]()
    for word in words:
        if word.startswith("-O") and len(word) > 2:
            word = f"-O={word[2:]}"
        is_flag = word.startswith("-") and not word.removeprefix("-").replace(".", "", 1).isdigit() and word != "-"
        if not is_flag:
            values.append(word)
            continue
        yield flag, values
        flag, _, given = word.partition("=")
        values = [given] if "=" in word else []
    yield flag, values


def _joined(pairs: list[tuple[str, list[str]]]) -> Iterator[tuple[str, list[str]]]:
    """--compilation-config.mode 3 is a part of a flag's JSON: all parts of one are given as one, behind what it has itself."""
    whole = {
        name: dict[str, Any]()
        for word, _ in pairs
        for name, dot, _ in [word.partition(".")]
        if dot and name[:2] == "--"
    }
    for word, values in pairs:
        name, _, path = word.partition(".")
        if name not in whole:
            yield word, values
        elif not path:
            whole[name] = _object(values[:1]) | whole[name]
            yield "", values[1:]
        else:
            _put(whole[name], path.split("."), values[0] if values else "true")
            yield "", values[1:]
    yield from ((name, [json.dumps(parts)]) for name, parts in whole.items())


def _object(values: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(values[0])
    except (ValueError, IndexError):
        found = None
    if not isinstance(found, dict):
        raise BadConfig(f"{' '.join(values)[:80]!r} must be a JSON object where parts of the flag are given as well")
    return found


def _put(whole: dict[str, Any], path: list[str], value: str) -> None:
    for key in path[:-1]:
        inner = whole.setdefault(key.replace("-", "_"), {})
        whole = inner if isinstance(inner, dict) else {}
    try:
        whole[path[-1].replace("-", "_")] = json.loads(value)
    except ValueError:
        whole[path[-1].replace("-", "_")] = value


def _name_of(word: str) -> tuple[str, bool]:
    """vLLM's name without dashes, and whether --no- stands in front of it."""
    word = word.partition("=")[0].partition(".")[0]
    if word in SHORT:
        return SHORT[word], False
    if not word.startswith("--"):
        return "", False
    name = word[2:].replace("_", "-")
    negated = name.startswith("no-")
    bare = name.removeprefix("no-")
    return RENAMED.get(bare, bare), negated


def _own(name: str, values: list[str], *, several: bool, negated: bool) -> list[str]:
    flag = f"--no-{name}" if negated else f"--{name}"
    if not values:
        return [flag]
    first = _one_value(name, values[0])
    if first is None:
        return values[1:]
    if several:
        return [part for value in [*_listed(first), *values[1:]] for part in (flag, value)]
    return [flag, first, *values[1:]]


def _one_value(name: str, value: str) -> str | None:
    return VALUES.get(name, {}).get(value, value)


def _listed(value: str) -> list[str]:
    """vLLM writes some lists as JSON: '["a", "b"]'."""
    try:
        found: Any = json.loads(value)
    except ValueError:
        return [value]
    return [str(one) for one in found] if isinstance(found, list) else [value]
