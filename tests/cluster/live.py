"""A cluster of real processes on this machine, for a test: each started as its role, all of them ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from fastqwen.cluster.beacon import ask_controller
from fastqwen.cluster.wire import Ask, Member
from fastqwen.errors import FastqwenError
from tests.cluster.hosts import Host
from tests.reliability.server import free_port
from tests.server.live import ROOT, command

TOKEN = "a-token-of-these-tests-only"
MARK = "FASTQWEN_TEST_CLUSTER"  # in the environment of all that a cluster starts, and of what that starts


class Cluster:
    """``with Cluster(folder) as cluster``: a controller, here or on a host of its own; workers and fronts as the test adds them."""

    def __init__(self, folder: Path, *, step_s: float = 0.005, host: Host | None = None) -> None:
        self._folder, self._host = folder, host
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "FASTQWEN_CLUSTER_TOKEN": TOKEN,
            "MOCK_STEP_S": str(step_s),
            MARK: str(folder),
        }
        self.port = free_port()
        self.address = f"{host.address if host else '127.0.0.1'}:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url = ""

    def __enter__(self) -> Cluster:
        self.start_controller()
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)

    def start(self, name: str, words: list[str], **environment: str) -> None:
        with self.log(name).open("ab") as file:
            self.processes[name] = subprocess.Popen(
                words,
                stdout=file,
                stderr=file,
                cwd=ROOT,
                env={**self._environment, **environment},
                stdin=subprocess.DEVNULL,
            )

    def start_controller(self) -> None:
        words = command("controller", "--host", "0.0.0.0", "--port", str(self.port))
        self.start("controller", [*(self._host.enter if self._host else ()), *words])

    def start_worker(self, name: str, model: Path, *, host: Host | None = None, **options: Any) -> None:
        """One with the mock engine, here or on another host."""
        near = f"{host.gateway}:{self.port}" if host and self._host is None else self.address
        given = {"controller": near, "port": 0, **options}
        words = [sys.executable, "-m", "tests.cluster.mock_worker", str(model), json.dumps(given)]
        self.start(name, [*(host.enter if host else ()), *words])

    def start_front(self, *words: str, name: str = "api", role: str = "api") -> str:
        port = free_port()
        self.start(name, command(role, "--controller", self.address, "--port", str(port), *words))
        self.url = f"http://127.0.0.1:{port}"
        return self.url

    def kill(self, name: str) -> None:
        """kill -9, and its children as well: what the kernel leaves of a machine that lost power."""
        process = self.processes.pop(name)
        try:
            children = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            children = []
        for one in [process, *children]:
            if psutil.pid_exists(one.pid):
                os.kill(one.pid, signal.SIGKILL)
        process.wait(10)

    def kill_alone(self, name: str, within_s: float = 30) -> None:
        """kill -9 of the one process. What it had started must end by itself."""
        process = self.processes.pop(name)
        every = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(10)
        _, left = psutil.wait_procs(every, timeout=within_s)
        assert not left, f"{name} left {left}"

    def end(self, name: str, timeout_s: float = 90) -> int:
        """SIGTERM, and the exit status."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout_s)

    def left(self) -> list[psutil.Process]:
        """All processes of this cluster that are there, whoever their parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._environment[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def members(self) -> list[dict[str, Any]]:
        done = subprocess.run(
            command("status", "--controller", self.address, "--json"),
            env=self._environment, cwd=ROOT, capture_output=True, text=True, timeout=90, check=True,
        )  # fmt: skip
        return [json.loads(line) for line in done.stdout.splitlines()]

    def listed(self) -> list[Member]:
        """As the controller answers, without the seconds that a command takes to start."""
        return asyncio.run(ask_controller(TOKEN, f"tcp://{self.address}", Ask())).members

    def cluster(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/admin/cluster", timeout=5).json()
        return found

    def replicas(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = self.cluster()["models"].get(model, {"replicas": {}})["replicas"]
        return found

    def until(self, condition: Callable[[], Any], within_s: float = 180) -> float:
        """Seconds until it held. Whatever an unready process answers counts as no."""
        start_s = time.monotonic()
        while time.monotonic() - start_s < within_s:
            try:
                if condition():
                    return time.monotonic() - start_s
            except (httpx.HTTPError, FastqwenError):
                pass
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} has ended: {self.log(name).read_text()}"
            time.sleep(0.05)
        logs = {name: self.log(name).read_text()[-2000:] for name in self.processes}
        raise AssertionError(f"not within {within_s} s; logs: {logs}")

    def until_replicas(self, count: int, model: str) -> float:
        return self.until(lambda: len(self.replicas(model)) == count)

    def worker_of(self, key: str) -> str:
        """The name that the test gave it."""
        [member] = [one for one in self.cluster()["workers"] if one["key"] == key]
        [name] = [name for name, process in self.processes.items() if process.pid == member["pid"]]
        return name

    @property
    def client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=180)


def warnings(log: Path) -> list[str]:
    return re.findall(r"^(?:WARNING|ERROR).*|Traceback.*", log.read_text(), re.MULTILINE)
