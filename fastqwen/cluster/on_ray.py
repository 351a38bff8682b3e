"""Workers where Ray puts them. Ray knows the machines and which of their GPUs are free; all else is said by our own processes.

Each worker is a Ray actor that does nothing but run ``fastqwen worker`` as a process on its node, with the GPUs that Ray gave
the actor. No token and no request passes through Ray, and nothing of a model is ever pickled: words go in, an exit status
comes back. Needs ``pip install fastqwen[cluster]`` on each node, and Ray's token authentication.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from typing import Any

from fastqwen.cluster.secret import VARIABLE
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.lifeline import PARENT_VARIABLE

LEAST_VERSION = (2, 54)  # older ones let a web page reach the dashboard's API (CVE-2025-62593, CVE-2026-27482)
AUTHENTICATION = "RAY_AUTH_MODE"


class Keeper:
    """The actor: one process on its node."""

    def __init__(self, words: list[str], token: str) -> None:
        # The lifeline: the worker ends with this actor, however that one ends.
        environment = {**os.environ, VARIABLE: token, PARENT_VARIABLE: str(os.getpid())}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fastqwen.cli.main", *words], stdin=subprocess.DEVNULL, env=environment
        )

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()


class OnRay:
    """A launcher. Raises BadConfig where Ray is not there or not safe, FastqwenError where it does not answer."""

    def __init__(self, address: str, token: str) -> None:
        self._ray, self._token = _checked_ray(), token
        try:
            self._ray.init(address=address, namespace="fastqwen", log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise FastqwenError(f"no Ray answers at {address}, or its token is another one: {error}") from None

    @property
    def node_address(self) -> str:
        """Of this machine, as other nodes see it."""
        return str(self._ray.util.get_node_ip_address())

    def launch(self, words: list[str], gpus: int) -> _Placed:
        options = {"num_gpus": gpus, "num_cpus": 0 if gpus else 1, "scheduling_strategy": "SPREAD"}
        actor = self._ray.remote(Keeper).options(**options).remote(words, self._token)
        return _Placed(self._ray, actor)


class _Placed:
    """A process of another node. One whose node is gone has ended."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._asked: Any = actor.poll.remote()
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is not None:
            return self._status
        answered, _ = self._ray.wait([self._asked], timeout=0)
        if not answered:  # it waits for a node with room, or the answer is on its way
            return None
        try:
            self._status = self._ray.get(answered[0])
        except self._ray.exceptions.RayError:
            self._status = -1
        else:
            self._asked = self._actor.poll.remote()
        if self._status is not None:
            self.kill()
        return self._status

    def terminate(self) -> None:
        self._actor.terminate.remote()

    def kill(self) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)


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
