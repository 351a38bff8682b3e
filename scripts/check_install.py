"""constraints.txt installs from the ordinary package index, with no settings of this machine's.

python scripts/check_install.py

pip resolves the package without its extras and with all of them, for each Python that is supported, and installs nothing. Every
pin is exact, so what one extra alone needs is a part of what all of them need. Wheels are not downloaded: pip reads the
metadata at their ends, with a version of its own that can.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
PIP = "pip==26.3"
# How the index is reached stays as it is set; what pip finds there and elsewhere does not.
REACHING = {"PIP_INDEX_URL", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT"}


class Install(NamedTuple):
    python: str
    extras: tuple[str, ...]

    def __str__(self) -> str:
        return f"Python {self.python}, {'all extras' if self.extras else 'no extras'}"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    pairs = [line.split("==") for line in (ROOT / "constraints.txt").read_text().split()]
    return {plain(name): version for name, version in pairs}


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name in REACHING}
    return {**kept, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run_pip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True)


def resolve(install: Install, pip: str, folder: Path) -> list[dict[str, Any]]:
    """The metadata of each package that pip would install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = project["build-system"]["requires"] + project["project"]["dependencies"]
    for extra in install.extras:
        needed += project["project"]["optional-dependencies"][extra]
    report = folder / f"{install.python}-{len(install.extras)}.json"
    done = run_pip(
        pip, "install", "--quiet", "--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--only-binary=:all:",
        "--python-version", install.python, "--target", str(folder / "nowhere"), "--report", str(report),
        "--constraint", str(ROOT / "constraints.txt"), *needed,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{install}: pip finds no versions that constraints.txt allows\n{done.stderr}")
    return [one["metadata"] for one in json.loads(report.read_text())["install"]]


def unpinned(install: Install, packages: list[dict[str, Any]]) -> set[str]:
    """pip asks the Python that it runs on which requirements hold; so they are asked again for the one that is meant."""
    target = {"python_version": install.python, "python_full_version": f"{install.python}.0"}
    needed = {plain(package["name"]) for package in packages}
    for line in [line for package in packages for line in package.get("requires_dist", [])]:
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate({**target, "extra": ""}):
            needed.add(plain(one.name))
    return needed - pins().keys()


def main() -> None:
    extras = tuple(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    installs = [Install(python, some) for python in PYTHONS for some in (extras, ())]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        got = run_pip("-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PIP)
        if got.returncode:
            raise SystemExit(f"the package index does not answer\n{got.stderr}")
        [wheel] = folder.glob("pip-*.whl")
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda one: resolve(one, f"{wheel}/pip", folder), installs))
    seen: set[str] = set()
    for install, packages in zip(installs, found, strict=True):
        if missing := unpinned(install, packages):
            raise SystemExit(f"{install}: constraints.txt does not pin {', '.join(sorted(missing))}")
        seen |= {plain(package["name"]) for package in packages}
        print(f"{install}: {len(packages)} packages")
    if unused := pins().keys() - seen:
        raise SystemExit(f"constraints.txt pins what nothing needs: {', '.join(sorted(unused))}")


if __name__ == "__main__":
    main()
