from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fastqwen.errors import BadConfig
from fastqwen.plan.facts import GIB, MIB
from fastqwen.plan.gpus import find_target, known_gpus


def fake_nvidia_smi(folder: Path, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize("text", ["RTX 3090", "rtx3090", "NVIDIA GeForce RTX 3090", "geforce rtx 3090"])
def test_a_card_is_known_by_any_spelling(text: str):
    assert find_target(text).facts.name == "RTX 3090"


def test_each_card_is_found_by_its_own_name():
    for gpu in known_gpus():
        assert find_target(gpu.name).facts.name == gpu.name


def test_each_card_says_where_its_figures_are_from():
    assert all(gpu.source for gpu in known_gpus())


def test_a_name_that_two_cards_have_asks_which():
    with pytest.raises(BadConfig, match=r"V100 16GB or V100 32GB"):
        find_target("V100")


@pytest.mark.parametrize("text", ["Voodoo 2", "", "0GB", "99999GB"])
def test_an_unknown_card_is_refused_in_one_line(text: str):
    with pytest.raises(BadConfig, match="--gpu is") as error:
        find_target(text)
    assert "\n" not in str(error.value)


def test_memory_alone_stands_for_all_cards_of_that_size():
    target = find_target("24GB")
    assert target.facts.total_bytes == 24 * GIB
    assert target.slow.bandwidth_gb_s == 300  # an L4
    assert target.fast.bandwidth_gb_s == 1008
    assert target.facts.multiprocessors == 128


def test_auto_asks_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_nvidia_smi(tmp_path, "NVIDIA A100-SXM4-80GB, 81920, 8.0\nNVIDIA A100-SXM4-80GB, 81920, 8.0", monkeypatch)
    target = find_target("auto")
    assert target.facts.total_bytes == 81920 * MIB
    assert target.facts.bandwidth_gb_s == 2039
    assert target.installed == 2


def test_auto_counts_what_other_programs_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = "NVIDIA GeForce RTX 4090, 24564, 8.9, 100\nNVIDIA GeForce RTX 4090, 24564, 8.9, 3000"
    fake_nvidia_smi(tmp_path, rows, monkeypatch)
    facts = find_target("auto").facts
    assert facts.total_bytes - facts.free_bytes == 3000 * MIB


def test_a_number_alone_is_the_card_without_more_words():
    assert find_target("3090").facts.name == "RTX 3090"
    assert find_target("4060").facts.name == "RTX 4060"


def test_auto_without_a_card_is_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_target("auto").facts.kind == "cpu"


def test_a_card_that_is_not_in_the_list_is_planned_by_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_nvidia_smi(tmp_path, "NVIDIA Something New, 40000, 13.0", monkeypatch)
    target = find_target("auto")
    assert target.facts.total_bytes == 40000 * MIB
    assert target.facts.bandwidth_gb_s is None
