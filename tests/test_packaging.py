"""A fresh clone gets everything that the code imports, in the versions that the constraints file pins."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Tests with what only some machines have say so themselves, and run where it is there.
OPTIONAL = {"modelscope", "playwright", "atheris", "ray"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> dict[str, Requirement]:
    listed = PROJECT["dependencies"] + [one for extra in extras for one in PROJECT["optional-dependencies"][extra]]
    return {plain(Requirement(one).name): Requirement(one) for one in listed}


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "every line pins one version"
    return {plain(line.split("==")[0]): line.split("==")[1] for line in lines}


def imported(folder: str) -> Iterator[tuple[str, Path]]:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            yield from ((name.split(".")[0], path) for name in names)


@pytest.mark.parametrize(("folder", "extras"), [("fastqwen", ("plot",)), ("tests", ("dev",))])
def test_what_is_imported_is_declared(folder: str, extras: tuple[str, ...]):
    own = set(sys.stdlib_module_names) | {"fastqwen", "tests", "bench", "__future__"} | OPTIONAL
    distributions = importlib.metadata.packages_distributions()
    known = set(declared(*extras))
    # What a declared package promises to bring: torch's Triton, pytest's packaging, fastapi's starlette.
    brought = {plain(Requirement(one).name) for name in known for one in _requires(name)}
    for module, path in imported(folder):
        if module in own:
            continue
        names = {plain(one) for one in distributions.get(module, [])}
        assert names & (known | brought | {"triton"}), f"{path} imports {module}, which pyproject.toml does not name"


def _requires(name: str) -> list[str]:
    try:
        return importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def closure(names: list[str]) -> set[str]:
    """The packages, and all that they bring on this machine."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name in found:
            continue
        found.add(name)
        requirements = map(Requirement, _requires(name))
        names += [plain(one.name) for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def test_every_direct_and_indirect_dependency_is_pinned():
    here = {name for name, one in declared("dev").items() if one.marker is None or one.marker.evaluate()}
    missing = closure(list(here)) - set(pins())
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"


def test_pins_are_within_what_is_declared():
    for name, requirement in declared("dev", "plot", "fuzz", "cluster").items():
        assert pins()[name] in requirement.specifier, name
    assert pins()["torch"] == "2.13.0"
    [build] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert build == f"setuptools=={pins()['setuptools']}"


def test_tests_run_on_the_pinned_versions():
    for name in declared():
        assert importlib.metadata.version(name).split("+")[0] == pins()[name], name
