"""A server process for a test: started on a free port, asked over real sockets, always ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]


class Server:
    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log
        self.url = f"http://127.0.0.1:{port}"

    def wait_ready(self, timeout_s: float = 60.0) -> float:
        """Seconds until /health/ready says yes."""
        start_s = time.monotonic()
        while time.monotonic() - start_s < timeout_s:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if httpx.get(f"{self.url}/health/ready", timeout=2).status_code == 200:
                    return time.monotonic() - start_s
            except httpx.HTTPError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s: {self.log.read_text()}")

    def children(self, name: str) -> list[psutil.Process]:
        return [one for one in psutil.Process(self.process.pid).children() if name in " ".join(one.cmdline())]

    @property
    def engine(self) -> psutil.Process:
        [found] = self.children("mock_engine")
        return found

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/admin/data", timeout=5).json()
        return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    folder: Path, *, step_s: float = 0.005, blocks: int = 20_000, log: Any = None, **options: Any
) -> Iterator[Server]:
    port = options.pop("port", None) or free_port()
    path = folder / "server.log"
    environment = {**os.environ, "MOCK_STEP_S": str(step_s), "MOCK_BLOCKS": str(blocks), "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "tests.reliability.mock_server",
        str(folder),
        json.dumps({"port": port, **options}),
    ]
    with path.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=log or file, cwd=ROOT, env=environment)
    server = Server(process, port, path)
    try:
        server.wait_ready()
        yield server
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        for one in family:
            if one.is_running():
                one.kill()
