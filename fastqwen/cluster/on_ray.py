"""Workers where Ray puts them. Ray knows the machines and which of their GPUs are free; all else is said by our own processes.

Each worker is a Ray actor that does nothing but run ``fastqwen worker`` as a process on its node, with the GPUs that Ray gave
the actor. One that needs several hosts is a placement group, and on each of the others an actor runs ``fastqwen ranks``. No
token of an answer and no request passes through Ray, and nothing of a model is ever pickled: words go in, an exit status comes
back. Needs ``pip install fastqwen[cluster]`` on each node, and Ray's token authentication.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from typing import Any

import msgspec

from fastqwen.cluster.cluster_file import Needs
from fastqwen.cluster.secret import VARIABLE
from fastqwen.cluster.sockets import free_port, written
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.lifeline import PARENT_VARIABLE

LEAST_VERSION = (2, 54)  # older ones let a web page reach the dashboard's API (CVE-2025-62593, CVE-2026-27482)
AUTHENTICATION = "RAY_AUTH_MODE"


SAY_AFTER_S = 30.0

log = logging.getLogger("fastqwen.cluster")


class Keeper:
    """The actor: one process on its node."""

    def __init__(self, token: str) -> None:
        # The lifeline: the process ends with this actor, however that one ends.
        self._environment = {**os.environ, VARIABLE: token, PARENT_VARIABLE: str(os.getpid())}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, words: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fastqwen.cli.main", *words],
            stdin=subprocess.DEVNULL,
            env=self._environment,
        )

    def lend(self, count: int) -> str:
        """Start ``fastqwen ranks`` on this node. Gives its HOST:PORT."""
        import ray

        host = str(ray.util.get_node_ip_address())
        port = free_port(host)
        self.start(["ranks", "--host", host, "--port", str(port), "--count", str(count)])
        return written(host, port)

    def poll(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()


class OnRay:
    """A launcher. Raises BadConfig where Ray is not there or not safe, FastqwenError where it does not answer."""

    def __init__(self, address: str, token: str) -> None:
        self._ray, self._token = _checked_ray(), token
        try:
            self._ray.init(address=address, namespace="fastqwen", log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise FastqwenError(f"no Ray answers at {address}, or its token is another one: {error}") from None

    def close(self) -> None:
        self._ray.shutdown()

    @property
    def node_address(self) -> str:
        """Of this machine, as other nodes see it."""
        return str(self._ray.util.get_node_ip_address())

    def launch(self, words: list[str], needs: Needs) -> _Spread | _Placed:
        if needs.gpus_if_any and not self._ray.cluster_resources().get("GPU"):
            needs = msgspec.structs.replace(needs, gpus=0)
        if needs.hosts > 1:
            return _Spread(self, words, needs)
        placed = self.keeper(needs, scheduling_strategy="SPREAD")
        placed.start(words)
        return placed

    def keeper(self, needs: Needs, **options: Any) -> _Placed:
        wanted = {"num_gpus": needs.gpus, "num_cpus": 0 if needs.gpus else needs.cpus, **options}
        return _Placed(self._ray, self._ray.remote(Keeper).options(**wanted).remote(self._token), needs)

    def group(self, needs: Needs) -> Any:
        """A placement group with so many hosts, all of them or none."""
        share = {"GPU": float(needs.gpus)} if needs.gpus else {"CPU": float(needs.cpus)}
        return self._ray.util.placement_group([share] * needs.hosts, strategy="STRICT_SPREAD")

    def in_bundle(self, group: Any, index: int, needs: Needs) -> _Placed:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return self.keeper(
            needs,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=index
            ),
        )

    def answer(self, asked: Any) -> Any:
        """What came of a call, or None while it is on its way. Raises RayError."""
        answered, _ = self._ray.wait([asked], timeout=0)
        return self._ray.get(answered[0]) if answered else None

    def give_up(self, group: Any) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.util.remove_placement_group(group)

    @property
    def error(self) -> type[Exception]:
        kind: type[Exception] = self._ray.exceptions.RayError
        return kind


class _Placed:
    """A process of another node. One whose node is gone has ended."""

    def __init__(self, ray: Any, actor: Any, needs: Needs) -> None:
        self._ray, self.actor = ray, actor
        self._waits = _Waits(needs)
        self._asked: Any = None
        self._status: int | None = None

    def start(self, words: list[str]) -> None:
        self.actor.start.remote(words)

    def poll(self) -> int | None:
        if self._status is not None:
            return self._status
        if self._asked is None:
            self._asked = self.actor.poll.remote()
        answered, _ = self._ray.wait([self._asked], timeout=0)
        if not answered:  # it waits for a node with room, or the answer is on its way
            self._waits.look()
            return None
        self._waits.is_over = True
        try:
            self._status = self._ray.get(answered[0])
        except self._ray.exceptions.RayError:
            self._status = -1
        self._asked = None
        if self._status is not None:
            self.kill()
        return self._status

    def terminate(self) -> None:
        self.actor.terminate.remote()

    def kill(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self.actor)


class _Waits:
    """Says once that there is no room for long."""

    def __init__(self, needs: Needs) -> None:
        self._needs, self._since_s = needs, time.monotonic()
        self.is_over = False

    def look(self) -> None:
        if not self.is_over and time.monotonic() - self._since_s > SAY_AFTER_S:
            self.is_over = True
            one = self._needs
            what = f"{one.gpus} free GPUs" if one.gpus else f"{one.cpus} free CPUs"
            where = "a node" if one.hosts == 1 else f"{one.hosts} nodes, each"
            log.warning("a worker waits for %s with %s: ray status says what there is", where, what)


class _Spread:
    """A worker whose ranks are on several nodes: placed all together, the others' `fastqwen ranks` first, then the worker, which
    is told where they are. Nothing here waits: each ``poll`` goes as far as it can."""

    def __init__(self, ray: OnRay, words: list[str], needs: Needs) -> None:
        self._ray, self._words, self._needs = ray, words, needs
        self._group = ray.group(needs)
        self._ready: Any = self._group.ready()
        self._waits = _Waits(needs)
        self._others: list[_Placed] = []
        self._asked: list[Any] = []
        self._worker: _Placed | None = None
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            try:
                self._status = self._look()
            except self._ray.error:
                self._status = -1
            if self._status is not None:
                self.kill()
        return self._status

    def _look(self) -> int | None:
        needs = self._needs
        if not self._others:
            if self._ray.answer(self._ready) is None:
                self._waits.look()
                return None
            self._others = [self._ray.in_bundle(self._group, index, needs) for index in range(1, needs.hosts)]
            self._asked = [one.actor.lend.remote(max(1, needs.gpus)) for one in self._others]
        if self._worker is None:
            found = [self._ray.answer(one) for one in self._asked]
            if None in found:
                return None
            self._worker = self._ray.in_bundle(self._group, 0, needs)
            self._worker.start([*self._words, *(word for one in found for word in ("--rank-hosts", one))])
        ended = [one.poll() for one in (self._worker, *self._others)]
        return next((status for status in ended if status is not None), None)

    def terminate(self) -> None:
        """The worker drains; with its end the others' work is over."""
        if self._worker is None:
            self._status = 0
            self.kill()
        else:
            self._worker.terminate()

    def kill(self) -> None:
        for one in (self._worker, *self._others):
            if one is not None:
                one.kill()
        self._ray.give_up(self._group)


def _checked_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise BadConfig("ray in cluster.yaml needs Ray: pip install 'fastqwen[cluster]'") from None
    found = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if found < LEAST_VERSION:
        raise BadConfig(
            f"Ray {ray.__version__} has known holes: install 2.54 or newer, pip install 'fastqwen[cluster]'"
        )
    if os.environ.get(AUTHENTICATION) != "token":
        raise BadConfig(
            f"Ray lets everybody in who reaches it unless {AUTHENTICATION}=token is set, here and where `ray start` was "
            "called; docs/cluster.md shows how"
        )
    return ray
