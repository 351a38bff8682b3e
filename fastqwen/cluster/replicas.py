"""``fastqwen worker --replicas``: several workers of one model, here or where the controller's Ray puts them, from one command."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import msgspec

from fastqwen.cluster.cluster_file import ClusterFile, Group, Needs
from fastqwen.cluster.config import CONTROLLER_PORT, WORKER_PORT, WorkerConfig
from fastqwen.cluster.machine import this_machine
from fastqwen.cluster.rank_host import num_devices
from fastqwen.cluster.ray_node import controllers_ray, ray_environment
from fastqwen.cluster.secret import read_token
from fastqwen.cluster.sockets import split_address, written
from fastqwen.cluster.up import keep
from fastqwen.config import EngineConfig, flag, options_of
from fastqwen.errors import BadConfig
from fastqwen.logs import configure_logging

HERE = ("127.0.0.1", "localhost", "::1")


class ReplicasConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How many workers there are to be, and where. ``hosts``: over so many each of them is spread, which needs ``ray``."""

    replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    ray: bool = False
    hosts: int = 1

    @property
    def is_asked(self) -> bool:
        return self != ReplicasConfig()

    def bounds(self) -> tuple[int, int]:
        """Raises BadConfig."""
        low = self.min_replicas or self.replicas or 1
        high = self.max_replicas or max(low, self.replicas or 0)
        if low > high:
            raise BadConfig(f"--min-replicas is {low}, more than --max-replicas {high}")
        return low, high


def replicate(engine: EngineConfig, worker: WorkerConfig, replicas: ReplicasConfig, token_file: Path | None) -> int:
    """Runs until a signal. Returns the exit status. Raises FastqwenError for what the user must change."""
    low, high = replicas.bounds()
    _check(engine, worker, replicas)
    configure_logging(worker.log_format)
    token = read_token(token_file)
    host, port = split_address(worker.controller, CONTROLLER_PORT, "--controller")
    address = written(host, port)
    ray_address = None
    if replicas.ray:
        ray_address = asyncio.run(controllers_ray(token, address))
        os.environ.update(ray_environment(token))
    each = engine.tensor_parallel_size // replicas.hosts
    on_cpu = engine.device == "cpu" or (not replicas.ray and not _has_gpus())
    needs = Needs(
        gpus=0 if on_cpu else each,
        gpus_if_any=engine.device != "cuda",
        cpus=engine.num_threads or 1,
        hosts=replicas.hosts,
    )
    if on_cpu and not replicas.ray and engine.num_threads is None:  # else each of them would want all cores
        engine = msgspec.structs.replace(engine, num_threads=max(1, this_machine().num_cpus // high))
    words = [engine.model, "--port", "0", *words_of(worker, without=("controller", "port")), *words_of(engine)]
    group = Group(words=words, min_replicas=low, max_replicas=high, needs=needs)
    file = ClusterFile(
        controller=None,
        controller_address=address,
        is_open=host in HERE,
        groups=[group],
        fronts={},
        ray_address=ray_address,
    )
    return keep(file, token)


def _has_gpus() -> bool:
    return num_devices(least=0) > 0


def _check(engine: EngineConfig, worker: WorkerConfig, replicas: ReplicasConfig) -> None:
    if replicas.hosts > 1 and not replicas.ray:
        raise BadConfig(
            "--hosts needs --ray, which finds them; without Ray: fastqwen ranks there, and --rank-hosts here"
        )
    if engine.tensor_parallel_size % replicas.hosts:
        raise BadConfig(
            f"--tensor-parallel-size is {engine.tensor_parallel_size}, which {replicas.hosts} hosts cannot share"
        )
    for name in ("worker_address", "rank_hosts"):
        if getattr(worker, name):
            raise BadConfig(f"{flag(name)} is of one worker, and --replicas, --ray and --hosts start them")
    if worker.port not in (0, WORKER_PORT):
        raise BadConfig(f"--port {worker.port} is of one worker: replicas take any free port")


def words_of(config: msgspec.Struct, without: tuple[str, ...] = ()) -> list[str]:
    """The flags that make this config."""
    words: list[str] = []
    for field in msgspec.structs.fields(config):
        value = getattr(config, field.name)
        usual = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
        if field.name not in options_of(type(config)) or field.name in without or value == usual:
            continue
        words += _words(flag(field.name), value)
    return words


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [name if value else f"--no-{name[2:]}"]
    if isinstance(value, dict):
        return [name, json.dumps(value)]
    return [word for one in (value if isinstance(value, list) else [value]) for word in (name, str(one))]
