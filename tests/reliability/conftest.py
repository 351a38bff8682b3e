from __future__ import annotations

from pathlib import Path

import pytest

from tests.reliability.mock_model import make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path)
