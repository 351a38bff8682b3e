from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.mock_model import make_model
from tests.reliability.server import Server, serving


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path)


@pytest.fixture(scope="module")
def mock_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """For tests that leave the server as they found it."""
    with serving(make_model(tmp_path_factory.mktemp("mock"))) as server:
        yield server
