"""A server to talk to and a browser to look with.

The server is ``fastqwen serve demo``. ``FASTQWEN_PAGE_COMMAND="… --port {port}"`` makes the tests start another one,
``FASTQWEN_PAGE_URL=http://host:port`` uses one that runs already. Only what needs a server that misbehaves in a certain
moment, or a model that the tests cannot have, talks to tests/page/fake_api.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

START_S = 120
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(url: str, body: Any = None) -> Any:
    """GET, or POST with a body; returns the JSON answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read())


class Server:
    """A server process that can be killed and started again on the same port."""

    def __init__(self, command: str, port: int) -> None:
        self.command = command.format(port=port)
        self.url = f"http://127.0.0.1:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, **env: str) -> None:
        self.process = subprocess.Popen(shlex.split(self.command), env={**os.environ, **env})

    def start(self, **env: str) -> None:
        self.launch(**env)
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"ended at once: {self.command}"
            try:
                call(self.url + "/health/ready")
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise AssertionError(f"not ready after {START_S} s: {self.command}")

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def set(self, **state: Any) -> None:
        call(self.url + "/_fake", state)

    def told(self) -> dict[str, Any]:
        return call(self.url + "/_fake")  # type: ignore[no-any-return]


FAKE = f"{shlex.quote(sys.executable)} -m tests.page.fake_api --port {{port}}"
FASTQWEN = f"{shlex.quote(sys.executable)} -m fastqwen.cli.main"
REAL = os.environ.get("FASTQWEN_PAGE_COMMAND", f"{FASTQWEN} serve demo --port {{port}} --no-access-log")


@pytest.fixture
def fake() -> Iterator[Server]:
    """The scripted server, always."""
    server = Server(FAKE, free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    """The server that was asked for, shared by all tests that take any."""
    if url := os.environ.get("FASTQWEN_PAGE_URL"):
        yield url.rstrip("/")
        return
    server = Server(REAL, free_port())
    server.start()
    yield server.url
    server.kill()


@pytest.fixture
def mortal() -> Iterator[Server]:
    """A server of the asked kind that a test may kill."""
    server = Server(REAL, free_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def narrow() -> Iterator[Server]:
    """A server whose context is soon full, behind a key."""
    server = Server(f"{REAL} --max-model-len 256", free_port())
    server.start(FASTQWEN_API_KEY="a-secret-key")
    yield server
    server.kill()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("the page's tests need Chromium on PATH: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield chromium
        chromium.close()


class Faults(list[str]):
    """What the browser complained about."""

    def watch(self, page: Any) -> None:
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("console", lambda line: self.append(line.text) if self.counts(line) else None)

    @staticmethod
    def counts(line: Any) -> bool:
        # "Failed to load resource" is Chromium's note of a refused request; the page explains those itself
        return line.type == "error" and "Failed to load resource" not in line.text


@pytest.fixture
def faults() -> Iterator[Faults]:
    found = Faults()
    yield found
    assert found == []


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US", accept_downloads=True)
    context.set_default_timeout(60_000)
    yield context
    context.close()


@pytest.fixture
def page(context: Any, faults: Faults) -> Any:
    page = context.new_page()
    faults.watch(page)
    return page
