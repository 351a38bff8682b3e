"""cluster.yaml: a whole cluster in one file. Its words are those of the commands' flags.

controller: {host: 0.0.0.0}
workers:
  - {model: Qwen/Qwen3-8B, replicas: 2, gpus: 1, max-model-len: 32K}
  - {model: Qwen/Qwen3-0.6B, min-replicas: 1, max-replicas: 4, num-threads: 4}
  - {upstream: "http://localhost:8001/v1"}
api: {host: 0.0.0.0, port: 8000, api-key-file: keys}
web: {port: 8008}
ray: {address: "192.0.2.1:6379"}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from fastqwen.cluster.config import CONTROLLER_PORT, RAY_PORT
from fastqwen.errors import BadConfig

SECTIONS = ("controller", "workers", "api", "web", "ray")
MAX_REPLICAS = 4096


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What one replica needs on each of its hosts. ``cpus`` and ``gpus_if_any``, which lets a Ray without GPUs place it as
    well, are told to Ray only."""

    gpus: int = 0
    gpus_if_any: bool = False
    cpus: int = 1
    hosts: int = 1


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Workers of one kind: the words of ``fastqwen worker`` for each, and how many there are to be."""

    words: list[str]
    min_replicas: int = 1
    max_replicas: int = 1
    needs: Needs = Needs()  # of each


class ClusterFile(msgspec.Struct, frozen=True, kw_only=True):
    """``controller`` is None where there is one already."""

    controller: list[str] | None
    controller_address: str  # from this machine
    is_open: bool  # whether the controller listens on all of this machine's addresses
    groups: list[Group]
    fronts: dict[str, list[str]]  # api and web, those that were asked for
    ray_address: str | None = None  # HOST:PORT, or auto
    ray_head: int | None = None  # the port of a Ray head that is to be started here


def read_cluster_file(file: Path) -> ClusterFile:
    """Raises BadConfig that names the file and the key."""
    import yaml

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"{file}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise BadConfig(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise BadConfig(f"{file} must hold sections: {', '.join(SECTIONS)}")
    unknown = [str(key) for key in found if key not in SECTIONS]
    if unknown:
        raise BadConfig(f"{file}: there is no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    workers = found.get("workers")
    if not isinstance(workers, list) or not workers:
        raise BadConfig(f"{file}: workers must be a list with at least one entry like - model: demo")
    own = _mapping(file, "controller", found.get("controller"))
    ray = _mapping(file, "ray", found.get("ray"))
    if "ray" in found and not (
        (set(ray) == {"address"} and isinstance(ray["address"], str))
        or (set(ray) == {"port"} and ray["port"] in range(1, 65536))
    ):
        raise BadConfig(
            f"{file}: ray needs one key: port: {RAY_PORT} to start Ray here, or address: HOST:PORT (or auto) of one that runs"
        )
    host, port = str(own.get("host", "127.0.0.1")), own.get("port", CONTROLLER_PORT)
    return ClusterFile(
        controller=as_words(own),
        controller_address=f"{'127.0.0.1' if host == '0.0.0.0' else host}:{port}",  # noqa: S104 nothing is bound here
        is_open=host == "0.0.0.0",  # noqa: S104
        groups=[_group(file, number, one, "ray" in found) for number, one in enumerate(workers, start=1)],
        fronts={name: as_words(_mapping(file, name, found[name])) for name in ("api", "web") if name in found},
        ray_address=ray.get("address"),
        ray_head=ray.get("port"),
    )


def _mapping(file: Path, section: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadConfig(f"{file}: {section} must hold lines like port: 8000")
    return {str(key): one for key, one in value.items()}


def _group(file: Path, number: int, value: Any, has_ray: bool) -> Group:
    entry = _mapping(file, f"workers, entry {number}", value)
    counts = {
        name: _count(file, number, name, entry.pop(name, default))
        for name, default in (
            ("replicas", 1), ("min-replicas", None), ("max-replicas", None), ("gpus", 0), ("hosts", 1),
        )
    }  # fmt: skip
    if ("model" in entry) == ("upstream" in entry):
        raise BadConfig(f"{file}: workers, entry {number} needs either model or upstream")
    replicas, least, most = counts["replicas"], counts["min-replicas"], counts["max-replicas"]
    low = replicas if least is None else least
    high = max(low or 0, replicas or 0) if most is None else most
    if low is None or not 1 <= low <= high <= MAX_REPLICAS:
        raise BadConfig(
            f"{file}: workers, entry {number}: 1 <= min-replicas <= max-replicas <= {MAX_REPLICAS} must hold"
        )
    model = [str(entry.pop("model"))] if "model" in entry else []
    threads = _count(file, number, "num-threads", entry.get("num-threads"))
    needs = Needs(gpus=counts["gpus"] or 0, cpus=threads or 1, hosts=counts["hosts"] or 1)
    if needs.hosts > 1 and not has_ray:
        raise BadConfig(
            f"{file}: workers, entry {number}: hosts needs a ray section, which finds them; without Ray start fastqwen ranks "
            "on the others and give rank-hosts"
        )
    words = [*model, "--port", "0", *as_words(entry)]
    return Group(words=words, min_replicas=low, max_replicas=high, needs=needs)


def _count(file: Path, number: int, name: str, value: Any) -> int | None:
    if value is not None and (type(value) is not int or value < 0):
        raise BadConfig(f"{file}: workers, entry {number}: {name} is {value!r}, expected a whole number")
    return value


def as_words(entry: dict[str, Any]) -> list[str]:
    """The flags that say the same."""
    words: list[str] = []
    for key, value in entry.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None:
            for one in value if isinstance(value, list) else [value]:
                words += [flag, str(one)]
    return words
