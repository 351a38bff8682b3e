"""A real server process: started as a user starts it, watched from outside, ended by its process id."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai

ROOT = Path(__file__).parents[2]
READY = re.compile(r"API (http://\S+)/v1")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastqwen.cli.main", *arguments]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **changes}


def run(*arguments: str, timeout_s: float = 120, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """A command that is expected to end by itself."""
    return subprocess.run(
        command(*arguments),
        env=environment(**env),
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """The single line that a mistake is answered with: no traceback, exit status not 0."""
    assert result.returncode not in (0, -6, -9, -11), result
    assert "Traceback" not in result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("INFO:", "WARNING:"))]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fastqwen: ")
    return lines[0]


def eventually(condition: Callable[[], Any], within_s: float, what: str = "it") -> float:
    """Seconds until the condition held."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < within_s, f"{what} did not happen within {within_s} s"
        time.sleep(0.02)
    return time.monotonic() - start_s


class LiveServer:
    """``with LiveServer("demo") as server`` waits until it is ready, and kills what is left at the end."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self._arguments = arguments
        self._env = env
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the server
        self.url = ""

    def __enter__(self) -> LiveServer:
        self.process = subprocess.Popen(
            command("serve", *self._arguments, "--port", "0"),
            env=environment(**self._env),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self.start_s = eventually(self._is_ready, 120, "a ready server")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for pid in [self.process.pid, *children(self.process.pid)]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(10)
        self.http.close()

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        found = READY.search(self.log)
        if found is None:
            return False
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=60)
        return self.http.get("/health/ready").status_code == 200

    @property
    def log(self) -> str:
        return os.pread(self._log.fileno(), 10_000_000, 0).decode()

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def engine_pid(self) -> int:
        """The process that runs the model: the server's only child."""
        [pid] = children(self.process.pid)
        return pid

    def metric(self, name: str) -> float:
        """A gauge or counter without labels of its own."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"vllm:{name}{{"):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, and every block of the KV cache is free."""
        return all(self.metric(name) == 0 for name in ("num_requests_running", "num_requests_waiting")) and (
            self.metric("kv_cache_usage_perc") == 0
        )

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def events(lines: Any) -> list[str]:
    """The payloads of a stream of server-sent events."""
    return [line.removeprefix("data: ") for line in lines if line]
