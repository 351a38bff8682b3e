"""What the interpreter lets pass, the compiler may refuse: the GPU's kernels are compiled where there is no GPU, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_kernels_compile_for_a_gpu(tmp_path: Path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({one["kernel"] for one in found}) == 16
    assert [one for one in found if not one["fits"]] == [], "more shared memory than a multiprocessor has"
