"""Imports go one way: a room may know the rooms below it, never one above."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fastqwen"
# From the ground up. A room may import itself and those before it.
ORDER = [
    "version", "errors", "logs", "lifeline", "collections_paused", "paths", "plot", "text_files", "records", "outputs", "config",
    "vllm_names", "sharding", "model_config", "classifier_config", "common_config", "config_keys", "hybrid_config", "models",
    "kernels",
    "layers", "weights", "quant", "plan", "build", "engine", "runner", "names", "demo", "hub", "text", "ranks",
    "client", "ipc", "llm", "chat_model", "vllm", "server", "cluster", "terminal", "benchmark", "cli",
]  # fmt: skip
# The same inside server/: app.py and run.py join what stands below them.
SERVER_ORDER = ["config", "http", "mcp", "answer", "dialects", "operator", "web", "app", "run"]
WITHOUT_TORCH = [
    "engine",
    "records.py",
    "config.py",
    "classifier_config.py",
    "model_config.py",
    "common_config.py",
    "config_keys.py",
    "hybrid_config.py",
    "models",
    "plan",
    "errors.py",
    "cluster/routing.py",
    "cluster/failover.py",
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


def _room(path: Path, above: Path = PACKAGE) -> str:
    return path.relative_to(above).parts[0].removesuffix(".py")


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def _module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


SERVER_FILES = [path for path in FILES if _room(path) == "server" and path != PACKAGE / "server/__init__.py"]


def _assert_no_arrow_up(path: Path, order: list[str], *, above: Path) -> None:
    """``order`` names what stands in the folder ``above``, from the ground up."""
    prefix = "fastqwen." + "".join(f"{part}." for part in above.relative_to(PACKAGE).parts)
    own = order.index(_room(path, above))
    for name in _imports(path):
        room = name.removeprefix(prefix).split(".")[0]
        if name.startswith(prefix) and room in order:
            assert order.index(room) <= own, f"{path.name} imports {name}, which is a room above"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_no_arrow_points_up(path: Path):
    _assert_no_arrow_up(path, ORDER, above=PACKAGE)


@pytest.mark.parametrize("path", SERVER_FILES, ids=_name)
def test_no_arrow_points_up_inside_the_server(path: Path):
    _assert_no_arrow_up(path, SERVER_ORDER, above=PACKAGE / "server")


def test_no_files_form_a_circle():
    """Imports for types and inside functions count: they hide a circle and do not open it."""
    left = {_module(path): {name for name in _imports(path) if name != _module(path)} for path in FILES}
    while left:
        asked = set().union(*left.values())
        outside = {module for module, names in left.items() if module not in asked or not names & left.keys()}
        assert outside, f"these import each other: {', '.join(sorted(left))}"
        left = {module: names for module, names in left.items() if module not in outside}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_every_room_has_its_place(path: Path):
    assert _room(path) in ORDER


@pytest.mark.parametrize("path", SERVER_FILES, ids=_name)
def test_every_room_of_the_server_has_its_place(path: Path):
    assert _room(path, PACKAGE / "server") in SERVER_ORDER


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_policy_needs_no_tensor_library(place: str):
    root = PACKAGE / place
    for path in [root] if root.is_file() else root.rglob("*.py"):
        heavy = {name.split(".")[0] for name in _imports(path)} & {"torch", "numpy", "triton"}
        assert not heavy, f"{path} imports {heavy}"


FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "pickle.load", "pickle.loads", "os.system", "marshal.loads"}


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_nothing_from_outside_is_ever_run(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS, f"{path}:{node.lineno} calls {name}"
            assert not name.endswith(("recv_pyobj", "send_pyobj")), f"{path}:{node.lineno} calls {name}"
            assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{path}:{node.lineno} uses a shell"
    assert not {name.split(".")[0] for name in _imports(path)} & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
