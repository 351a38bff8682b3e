"""What the interpreter lets pass, the compiler may refuse: what steps launch is compiled where there is no GPU, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What nothing divides, heads that no served model has, blocks that no card has by itself: right, and slow.
UNUSUAL = ("odd", "wide-float32", "large-blocks", "partly-rotated")


def compiled(capability: int, folder: Path, *models: str) -> set[str]:
    """The kernels' names; none may ask for more shared memory than there is."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu", str(capability), *models]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one for one in found if not one["fits"]] == []
    usual = [one for one in found if not one["model"].startswith(UNUSUAL)]
    assert [one for one in usual if one["stack_bytes"] >= 256] == [], (
        "registers do not hold what a program computes with"
    )
    return {one["kernel"] for one in found}


def test_what_steps_launch_compiles_for_a_gpu(tmp_path: Path):
    assert len(compiled(90, tmp_path, "qwen3-0.6b", "odd-float16", "qwen3-8b-int8-cache")) == 19


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_what_each_model_launches_compiles_for_a_gpu(capability: int, tmp_path: Path):
    least = {75: 15, 90: 22}.get(capability, 20)  # before 8.0 cuBLAS for several rows, and no hybrids
    with ThreadPoolExecutor(2) as pool:  # two processes, since one takes ten minutes
        halves = list(pool.map(lambda half: compiled(capability, tmp_path, half), ("0/2", "1/2")))
    assert len(halves[0] | halves[1]) >= least
