from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import LiveServer, eventually


@pytest.fixture(scope="session")
def float32_server(demo_gguf: Path) -> Iterator[LiveServer]:
    with LiveServer("demo", "--dtype", "float32") as server:
        yield server


@pytest.fixture
def server(float32_server: LiveServer) -> Iterator[LiveServer]:
    """The demo model in float32. Each test must leave the same engine behind, alive and empty."""
    pid = float32_server.engine_pid()
    yield float32_server
    eventually(float32_server.is_idle, 5, "an empty engine")
    assert float32_server.engine_pid() == pid, "the engine was restarted"


@pytest.fixture(scope="session")
def chats(golden: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((golden / "smollm2" / "golden.json").read_text("utf-8"))["chats"]
    assert len(found) == 3
    return found
