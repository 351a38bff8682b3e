"""Imports go one way: a room may know the rooms below it, never one above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastqwen"
# From the ground up. A room may import itself and those before it.
ORDER = [
    "version", "errors", "logs", "paths", "plot", "records", "outputs", "config", "model_config", "models", "plan",
    "kernels", "layers", "weights", "quant", "build", "engine", "runner",
    "hub", "text", "client", "ipc", "llm", "chat_model", "server", "terminal", "benchmark", "cli",
]  # fmt: skip
WITHOUT_TORCH = [
    "engine",
    "records.py",
    "config.py",
    "model_config.py",
    "models",
    "plan",
    "errors.py",
    "cli/main.py",
]


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_arrow_points_up(path: Path):
    own = ORDER.index(_room(path))
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] != "fastqwen" or len(parts) < 2 or parts[1] not in ORDER:
            continue
        assert ORDER.index(parts[1]) <= own, f"{path.name} imports {name}, which is a room above"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_room_has_its_place(path: Path):
    assert _room(path) in ORDER


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_policy_needs_no_tensor_library(place: str):
    root = PACKAGE / place
    for path in [root] if root.is_file() else root.rglob("*.py"):
        heavy = {name.split(".")[0] for name in _imports(path)} & {"torch", "numpy", "triton"}
        assert not heavy, f"{path} imports {heavy}"


FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "pickle.load", "pickle.loads", "os.system", "marshal.loads"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_from_outside_is_ever_run(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS, f"{path}:{node.lineno} calls {name}"
            assert not name.endswith(("recv_pyobj", "send_pyobj")), f"{path}:{node.lineno} calls {name}"
            assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{path}:{node.lineno} uses a shell"
    assert not {name.split(".")[0] for name in _imports(path)} & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
