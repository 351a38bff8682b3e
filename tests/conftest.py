"""Where tests find reference data that is not part of the repository."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

# Tests share the machine with the servers that they start. Compute threads that spin while they wait for each other made
# a token take ten times as long beside other work; read when torch is imported, and by every process started from here.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

SHARED = Path(__file__).parents[2] / "shared"


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden data, beside the checkout."""
    folder = SHARED / "golden"
    assert folder.is_dir(), f"the golden data is expected in {folder}"
    return folder


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, fetched once into the user's cache."""
    from fastqwen.hub import demo_path

    return demo_path()
