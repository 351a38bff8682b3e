"""This machine as a node of Ray: the head beside a controller, or one that joins the controller's. Ray is not imported here: its
own command does it, ``python -m ray.scripts.scripts start``, and ends with the process that started it.

Ray's token is made from the cluster's, so there is one secret; the dashboard listens on this machine alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from fastqwen.cluster.beacon import ask_controller
from fastqwen.cluster.config import CONTROLLER_PORT
from fastqwen.cluster.secret import ray_token
from fastqwen.cluster.sockets import endpoint, own_address, split_address
from fastqwen.cluster.wire import Ask
from fastqwen.errors import BadConfig, FastqwenError
from fastqwen.lifeline import PARENT_VARIABLE, end_with_parent

log = logging.getLogger("fastqwen.cluster")

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 nothing is bound here
READY_WORDS = "Ray runtime started"
READY_WITHIN_S, END_WITHIN_S, LOOK_EVERY_S = 120.0, 20.0, 0.1


def ray_environment(token: str) -> dict[str, str]:
    """What Ray reads its token from, whether as head, node or driver."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray_token(token)}


def head_words(host: str, port: int) -> list[str]:
    words = ["--head", "--port", str(port), "--dashboard-host", "127.0.0.1"]
    return words if host in EVERYWHERE else [*words, "--node-ip-address", host]


async def controllers_ray(token: str, controller: str) -> str:
    """HOST:PORT of the Ray that a controller started or joined. Raises FastqwenError where it has none."""
    host, port = split_address(controller, CONTROLLER_PORT, "--controller")
    found = await ask_controller(token, endpoint(host, port), Ask())
    if not found.ray_address:
        raise FastqwenError(f"the controller at {host}:{port} has no Ray: start it with fastqwen controller --ray")
    ray_host, ray_port = split_address(found.ray_address, 0, "--ray-address")
    return f"{host if ray_host in EVERYWHERE else ray_host}:{ray_port}"


class RayNode:
    """``with RayNode(words, token)``: Ray runs on this machine. Raises BadConfig, FastqwenError where it cannot start."""

    def __init__(self, words: Sequence[str], token: str) -> None:
        if importlib.util.find_spec("ray") is None:
            raise BadConfig("Ray is not installed: pip install 'fastqwen[cluster]'")
        self._words, self._token = words, token

    def __enter__(self) -> RayNode:
        self._said = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fastqwen.cluster.ray_node", *self._words],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                **ray_environment(self._token),
                PARENT_VARIABLE: str(os.getpid()),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_worker_niceness": "0",  # else all that Ray starts gives way to whatever else runs
            },
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        log.info("Ray runs here: ray start %s", " ".join(self._words))
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_WITHIN_S)
        self._process.kill()
        self._process.wait()
        self._said.close()

    def poll(self) -> int | None:
        return self._process.poll()

    def _wait(self) -> None:
        end_s = time.monotonic() + READY_WITHIN_S
        while READY_WORDS not in self._text():
            if self._process.poll() is not None or time.monotonic() > end_s:
                lines = [line.strip() for line in self._text().splitlines() if line.strip()]
                raise FastqwenError(f"Ray does not start: {lines[-1] if lines else 'it says nothing'}")
            time.sleep(LOOK_EVERY_S)

    def _text(self) -> str:
        return os.pread(self._said.fileno(), 2**20, 0).decode(errors="replace")


def join_controllers_ray(controller: str, token: str) -> int:
    """``fastqwen node``: until a signal, or until Ray ends here. Returns the exit status. Raises FastqwenError."""
    address = asyncio.run(controllers_ray(token, controller))
    here = own_address(*split_address(address, 0, "--ray-address"))
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with RayNode(["--address", address, "--node-ip-address", here], token) as node:
        while not ended and node.poll() is None:
            time.sleep(LOOK_EVERY_S)
    if not ended:
        raise FastqwenError(f"Ray has ended here: is the controller's, at {address}, still there?")
    return 0


if __name__ == "__main__":
    end_with_parent()  # holds for what this process becomes as well
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block", *sys.argv[1:]]
    os.execv(sys.executable, command)  # noqa: S606 no shell: our own words
