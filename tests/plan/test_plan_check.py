"""bench/plan_check.py runs on a GPU machine only; its bookkeeping is tested here with an engine on the CPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from fastqwen.plan.facts import MIB

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("plan_check", ROOT / "bench" / "plan_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class GrowingMeter:
    """Each reading finds 10 MiB more in use, of which torch has 8."""

    def __init__(self) -> None:
        self.count = 0
        self.resets = 0

    def read(self) -> dict[str, int]:
        self.count += 1
        have = self.count * 8 * MIB
        return {
            "used": self.count * 10 * MIB,
            "allocated": have,
            "reserved": have,
            "most_allocated": have + MIB,
            "most_reserved": have,
        }

    def reset_peaks(self) -> None:
        self.resets += 1


TINY = {
    "model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "vocab_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
SPEC = {
    "model": "tiny", "dtype": "float32", "length": 256, "at_once": 3, "num_seqs": 4, "step_tokens": 64,
    "block_size": 16, "eager": True, "device": "cpu",
}  # fmt: skip


def test_a_combination_is_run_and_compared(bench: ModuleType, tmp_path: Path):
    from fastqwen.runner import start

    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    meter, inner = GrowingMeter(), start._load

    def watch(log) -> None:
        log.after(start, "_load", "weights")

    try:
        found = bench.check(SPEC, tmp_path, meter, before=5 * MIB, watch=watch)
    finally:
        start._load = inner
    assert found["num_blocks"] == 3 * 16
    assert list(found["readings"]) == [
        "context",
        "weights",
        "cache",
        "whole prompts",
        "a long prompt in pieces",
        "4 rows that sample",
        "4 rows with penalties and log-probabilities",
    ]
    assert meter.resets == meter.count == 7
    assert found["measured"]["context"] == 5 * MIB
    assert found["measured"]["total"] == 65 * MIB
    assert found["measured"]["peak allocated"] == 57 * MIB
    assert found["difference"] == found["predicted"]["total"] / (65 * MIB) - 1
    parts = {row["part"]: row for row in found["compared"]}
    assert parts["weights"]["measured_bytes"] == 8 * MIB
    assert parts["weights"]["belongs_to"] == ["fastqwen/plan/weights.py: matrices, matrix_bytes"]
    assert (
        sum(found["predicted"][name] for name in bench.BELONGS_TO if name in found["predicted"])
        == (found["predicted"]["total"])
    )


def test_a_combination_that_fails_does_not_end_the_others(bench: ModuleType, tmp_path: Path, capsys):
    out = tmp_path / "out.json"
    specs = [dict(SPEC, model="no-such-folder"), dict(SPEC, model="nor-this-one")]
    results = bench.all_of(specs, tmp_path, out, budget_s=120.0)
    bench.summary(results)
    assert [result["failed"] for result in results] == ["exit status 1"] * 2
    assert "Traceback" in results[0]["said"]
    assert len(json.loads(out.read_text())["results"]) == 2
    assert "0 of 2 within 3%" in capsys.readouterr().out


def test_what_would_not_end_in_time_is_left_out(bench: ModuleType, tmp_path: Path):
    specs = [dict(SPEC, model="no-such-folder"), dict(SPEC, model="nor-this-one")]
    results = bench.all_of(specs, tmp_path, tmp_path / "out.json", budget_s=1.0)
    assert results[1]["failed"] == "left out: no time left"


def test_the_combinations_are_those_of_known_configurations(bench: ModuleType):
    assert len({bench.title(spec) for spec in bench.COMBINATIONS}) == len(bench.COMBINATIONS) >= 8
    for spec in bench.COMBINATIONS:
        assert spec["at_once"] <= spec["num_seqs"]
