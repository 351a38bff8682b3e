from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def chats(golden: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((golden / "smollm2" / "golden.json").read_text("utf-8"))["chats"]
    assert len(found) == 3
    return found
