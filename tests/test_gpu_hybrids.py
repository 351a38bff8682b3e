"""bench/gpu_hybrids.py runs on a GPU machine; here its parts run with small shapes, kernels through Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_hybrids.py"


@pytest.fixture(scope="module")
def script() -> Any:
    import sys

    spec = importlib.util.spec_from_file_location("gpu_hybrids", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_hybrids"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_part_writes_what_it_found(script: Any, tmp_path: Path):
    out = tmp_path / "found.json"
    assert script.main([str(out), "--tiny", "--seconds", "800"]) == 0
    found = json.loads(out.read_text())
    names = {"golden dense", "tiny decode b2 c80", "tiny prefill", "tiny turn", "tiny chats", "kernels 1/2 decode"}
    assert names <= found.keys()
    assert found["tiny turn"]["cached"] == 96 and found["tiny chats"]["hit_tokens"] > 0
    assert not any("error" in values or "left_out" in values for values in found.values())


def test_a_part_that_fails_or_comes_too_late_is_named_and_the_others_are_kept(script: Any, tmp_path: Path):
    out = tmp_path / "found.json"
    report = script.Report(out, seconds=100.0)
    report.note("machine", name="a")

    def fail() -> None:
        raise RuntimeError("out of\nmemory")

    report.part("decode", fail)
    late = script.Report(tmp_path / "late.json", seconds=-1.0)
    late.part("turn", fail)
    assert json.loads(out.read_text())["decode"] == {"right": False, "error": "out of memory"}
    assert report.wrong == ["decode"] and late.found["turn"] == {"left_out": "no time was left"} and not late.wrong
