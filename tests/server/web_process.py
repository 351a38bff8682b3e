"""``fastqwen web`` as a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.server.live import ROOT, command, environment, eventually

SHOWN = re.compile(r"the page is at (http://\S+),")


class Web:
    """A ``fastqwen web`` process and what it logged."""

    def __init__(self, *arguments: str, **env: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the process
        self.process = subprocess.Popen(
            command("web", *arguments, "--port", "0"),
            env=environment(**env), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        eventually(lambda: SHOWN.search(self.log) or self.process.poll() is not None, 30, "the page's address")
        found = SHOWN.search(self.log)
        assert found, self.log
        self.http = httpx.Client(base_url=found[1], timeout=30)
        eventually(lambda: "Started server process" in self.log, 30, "a listening page")

    @property
    def log(self) -> str:
        return os.pread(self._log.fileno(), 1_000_000, 0).decode()


@contextmanager
def web(*urls: str, arguments: tuple[str, ...] = (), **env: str) -> Iterator[Web]:
    found = Web(*(word for url in urls for word in ("--api", url)), *arguments, **env)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait(10)
        found.http.close()
