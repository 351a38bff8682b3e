"""bench/route_simulation.py: recorded requests in the place of made-up ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import route_simulation

CONVERSATIONS, TURNS = 6, 4


def simulated(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["route_simulation", "--workers", "5", *words])
    route_simulation.main()
    return {one["policy"]: one for one in map(json.loads, capsys.readouterr().out.splitlines())}


def trace(folder: Path) -> Path:
    """Conversations that share their first block; each turn's prompt is the one before it and a block more."""
    lines = []
    for turn in range(TURNS):
        for number in range(CONVERSATIONS):
            ids = [0, *(100 * (number + 1) + one for one in range(turn + 1))]
            asked = {"timestamp": 60_000 * turn + 10 * number, "input_length": 512 * len(ids), "output_length": 10}
            lines.append(json.dumps({**asked, "hash_ids": ids}))
    file = folder / "trace.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_a_trace_s_conversations_return_to_their_prefixes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found = simulated(monkeypatch, capsys, "--trace", str(trace(tmp_path)))
    asked = 512 * CONVERSATIONS * sum(turn + 2 for turn in range(TURNS))
    again = 512 * CONVERSATIONS * sum(turn + 1 for turn in range(1, TURNS))  # all of a later turn but its last block
    shared = 512 * (CONVERSATIONS - 5)  # at the least: the first block of those that begin where another one did
    assert (again + shared) / asked - 0.001 <= found["fastqwen"]["hit_rate"] < 1
    assert found["round robin"]["hit_rate"] < found["fastqwen"]["hit_rate"]
    assert found["fastqwen"]["ttft_p99_s"] <= found["round robin"]["ttft_p99_s"]


def test_a_trace_may_be_played_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    words = ["--trace", str(trace(tmp_path)), "--slots", "1", "--token-ms", "1000"]
    usual, fast = (simulated(monkeypatch, capsys, *words, "--speed", speed)["fastqwen"] for speed in ("1", "100"))
    assert fast["ttft_p99_s"] > usual["ttft_p99_s"]


def test_what_is_no_trace_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    file = trace(tmp_path)
    file.write_text(file.read_text() + '{"timestamp": 1}\n')
    with pytest.raises(SystemExit, match=f"line {CONVERSATIONS * TURNS + 1} is no request of a trace: KeyError"):
        simulated(monkeypatch, capsys, "--trace", str(file))


def test_made_up_conversations_are_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    first, second = (simulated(monkeypatch, capsys, "--requests", "400") for _ in range(2))
    for name, one in first.items():
        assert {**one, "took_s": 0} == {**second[name], "took_s": 0}
    assert first["fastqwen"]["hit_rate"] > first["round robin"]["hit_rate"]
