"""fastqwen pull, list, ps, version: what is here, under the names that Ollama's users know."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastqwen.cli.options import Model, named

HEALTHY_WITHIN_S = 2.0
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]


def pull(
    model: Model,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Fetch MODEL, so that it starts without a network later.

    fastqwen pull Qwen/Qwen3-0.6B
    fastqwen pull demo
    """
    from fastqwen.hub import resolve

    print(resolve(named(model), revision=revision))


def list_models(as_json: AsJson = False) -> None:
    """List the models that were fetched: their names, sizes and places.

    fastqwen list
    """
    found = [*_demo(), *_of_the_hub()]
    if as_json:
        for one in found:
            print(json.dumps(one))
        return
    if not found:
        print("No model was fetched so far: fastqwen pull demo, or fastqwen plan to see which ones run here")
    rows = [("NAME", "SIZE", "FETCHED", "SERVED", "WHERE")]
    rows += [(one["name"], _size(one["bytes"]), _day(one["fetched_s"]), one["served"], one["path"]) for one in found]
    if found:
        _print_rows(rows)


def ps(as_json: AsJson = False) -> None:
    """List the servers that run on this machine: their addresses, models and states.

    fastqwen ps
    """
    from fastqwen.client.running import running

    servers = running()
    if as_json:
        for one in servers:
            print(json.dumps({"url": one.url, "model": one.model, "pid": one.pid, "state": _state(one.url)}))
        return
    if not servers:
        print("No server of yours runs here: fastqwen serve MODEL starts one")
        return
    rows = [("ADDRESS", "MODEL", "STATE", "SINCE", "PID")]
    _print_rows(rows + [(one.url, one.model, _state(one.url), _clock(one.started_s), str(one.pid)) for one in servers])


def version() -> None:
    """Print the version.

    fastqwen version
    """
    from fastqwen.version import __version__

    print(__version__)


def _demo() -> list[dict[str, Any]]:
    from fastqwen.demo import DEMO_FILE
    from fastqwen.paths import cache_dir

    path = cache_dir() / "demo" / DEMO_FILE
    if not path.is_file():
        return []
    return [_model("demo", path.stat().st_size, path.stat().st_mtime, "yes", path)]


def _of_the_hub() -> list[dict[str, Any]]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = []
    for one in sorted(repositories, key=lambda one: one.repo_id.lower()):
        newest = max(one.revisions, key=lambda revision: revision.last_modified, default=None)
        if one.repo_type == "model" and newest is not None:
            served = _is_served(Path(newest.snapshot_path))
            found.append(_model(one.repo_id, one.size_on_disk, newest.last_modified, served, newest.snapshot_path))
    return found


def _model(name: str, size_bytes: int, fetched_s: float, served: str, path: Path) -> dict[str, Any]:
    return {"name": name, "bytes": size_bytes, "fetched_s": int(fetched_s), "served": served, "path": str(path)}


def _is_served(folder: Path) -> str:
    """yes, or no and why."""
    from fastqwen.errors import FastqwenError
    from fastqwen.models import read_config

    if any(folder.glob("*.gguf")) and not (folder / "config.json").exists():
        return "yes"
    try:
        read_config(folder)
    except FastqwenError:
        return "no"
    return "yes" if any(folder.glob("*.safetensors")) else "no weights"


def _state(url: str) -> str:
    import httpx

    try:
        return str(httpx.get(f"{url}/health/ready", timeout=HEALTHY_WITHIN_S).json()["status"])
    except (httpx.HTTPError, ValueError, KeyError):
        return "silent"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def _day(time_s: float) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(time_s))


def _clock(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time_s))


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
