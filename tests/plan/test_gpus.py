from __future__ import annotations

import stat
from pathlib import Path

import pytest

from fastqwen.errors import BadConfig
from fastqwen.plan.facts import GIB, MIB
from fastqwen.plan.gpus import data_sheet, find_target, known_gpus


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


@pytest.mark.parametrize(
    ("text", "name", "other"),
    [
        ("V100", "V100 16GB", "V100 32GB"),
        ("H100", "H100 SXM", "H100 PCIe"),
        ("A100", "A100 80GB", "A100 40GB"),
        ("5060 Ti", "RTX 5060 Ti 16GB", "RTX 5060 Ti 8GB"),
        ("RTX 6000", "Quadro RTX 6000", "RTX PRO 6000"),
        ("H100 80GB", "H100 SXM", "H100 PCIe"),
    ],
)
def test_a_name_that_several_cards_have_is_the_usual_one_and_says_so(text: str, name: str, other: str):
    target = find_target(text)
    assert target.facts.name == name
    assert f"{text} is taken for the {name}; there is also" in target.notices[0] and other in target.notices[0]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4080 SUPER", "RTX 4080 SUPER"),
        ("4080super", "RTX 4080 SUPER"),
        ("3070ti", "RTX 3070 Ti"),
        ("RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("A100-SXM4-40GB", "A100 40GB"),
        ("a100 80g", "A100 80GB"),
        ("H100 94GB", "H100 NVL"),
        ("RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("DGX Spark", "GB10"),
        ("2060", "RTX 2060"),
        ("P40", "P40"),
        ("L20", "L20"),
    ],
)
def test_cards_as_people_write_them(text: str, name: str):
    target = find_target(text)
    assert target.facts.name == name


@pytest.mark.parametrize("text", ["TITAN", "GTX 980", "RTX"])
def test_what_could_be_anything_asks_for_more(text: str):
    with pytest.raises(BadConfig, match="--gpu is"):
        find_target(text)


@pytest.mark.parametrize(
    ("text", "maker"),
    [("RX 7900 XTX", "AMD"), ("MI300X", "AMD"), ("Arc B580", "Intel"), ("Apple M3 Max", "Apple"), ("M4", "Apple")],
)
def test_other_makers_get_one_line_that_says_what_runs(text: str, maker: str):
    with pytest.raises(BadConfig, match=f"NVIDIA's GPUs only.*{maker}'s.*--device cpu") as error:
        find_target(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("driver", "mib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "H100 SXM"),
        ("NVIDIA H100 PCIe", 81559, "H100 PCIe"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100 PCIe 80GB"),
        ("Tesla V100-SXM2-16GB", 16384, "V100 16GB"),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", 8188, "RTX 4060 Laptop"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "RTX 6000 Ada"),
        ("Quadro RTX 6000", 24220, "Quadro RTX 6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97252, "RTX PRO 6000 Server"),
        ("NVIDIA GH200 480GB", 97871, "GH200 96GB"),
        ("NVIDIA GeForce RTX 3080 Ti", 12288, "RTX 3080 Ti"),
        ("NVIDIA GeForce RTX 4095 SUPER", 24564, None),
    ],
)
def test_a_drivers_name_finds_its_data_sheet(driver: str, mib: int, name: str | None):
    found = data_sheet(driver, mib)
    assert (found and found.name) == name


def test_memory_that_is_shared_with_the_cpu_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_nvidia_smi(tmp_path, "NVIDIA GB10, [N/A], 12.1, [N/A]", monkeypatch)
    facts = find_target("auto").facts
    assert (facts.kind, facts.compute_capability) == ("cuda", (12, 1))
    assert 0 < facts.free_bytes <= facts.total_bytes


def test_a_number_alone_is_gigabytes_or_a_card():
    assert find_target("24").facts == find_target("24GB").facts
    assert find_target("3090").facts.name == "RTX 3090"


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


@pytest.fixture(autouse=True)
def every_gpu_is_visible(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


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


def test_auto_asks_only_for_gpus_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = {0: "NVIDIA GeForce RTX 4090, 24564, 8.9, 100", 1: "NVIDIA GeForce RTX 3060, 12288, 8.6, 10"}
    cases = "\n".join(f"*--id={index}*) echo '{row}';;" for index, row in rows.items())
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncase \"$*\" in\n{cases}\n*--id=*) exit 6;;\n*) echo '{rows[1]}';;\nesac\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for visible, name in (("0", "RTX 4090"), ("1", "RTX 3060"), ("MIG-1234", "RTX 3060")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert name in find_target("auto").facts.name
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert find_target("auto").facts.kind == "cpu"


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
