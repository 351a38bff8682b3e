"""Which GPU is computed on, and the one line where there is one that is not: all of it asked before anything is loaded."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import pytest
import torch

from fastqwen.config import EngineConfig
from fastqwen.errors import BadConfig
from fastqwen.runner import accelerator, device
from fastqwen.runner.accelerator import has_code, why_no_gpu, why_not_on
from fastqwen.runner.device import choose_device, choose_ops, has_own_kernels

CUDA13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # torch 2.11 of the ordinary index
CUDA126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch):
    for one in (why_no_gpu, device._warn_once):
        one.cache_clear()
    yield
    for one in (why_no_gpu, device._warn_once):
        one.cache_clear()


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def says(line: str) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho '{line}'\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return says


def a_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], architectures: list[str], cuda: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), CUDA13, True),
        ((8, 9), CUDA13, True),  # what was compiled for 8.6 runs there
        ((12, 1), CUDA13, True),
        ((13, 0), CUDA13, True),  # from PTX
        ((7, 0), CUDA13, False),
        ((6, 1), CUDA126, True),
        ((10, 0), CUDA126, False),
        ((9, 0), ["sm_90a"], True),
        ((12, 1), ["sm_120a"], False),
        ((7, 5), [], False),
    ],
)
def test_code_runs_from_its_minor_version_on(capability: tuple[int, int], architectures: list[str], runs: bool):
    assert has_code(capability, architectures) == runs


def test_a_card_that_torch_knows_is_computed_on(monkeypatch: pytest.MonkeyPatch):
    a_gpu(monkeypatch, "NVIDIA GeForce RTX 4090", (8, 9), CUDA13, "13.0")
    assert choose_device(EngineConfig(model="x")) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "capability", "architectures", "cuda", "words"),
    [
        ("Tesla V100-SXM2-16GB", (7, 0), CUDA13, "13.0", "starts at 7.5; with torch's build for CUDA 12.6"),
        ("NVIDIA GeForce GTX 1080 Ti", (6, 1), CUDA13, "13.0", "exact, and slow"),
        ("Tesla M40", (5, 2), CUDA126, "12.6", "needs 6.0 at least"),
        ("NVIDIA GeForce RTX 5090", (12, 0), CUDA126, "12.6", "install torch of the ordinary index"),
        ("Tesla V100-SXM2-16GB", (7, 0), ["sm_80"], "12.6", "whl/cu126"),
    ],
)
def test_a_card_without_code_is_named_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    capability: tuple[int, int],
    architectures: list[str],
    cuda: str,
    words: str,
):
    a_gpu(monkeypatch, name, capability, architectures, cuda)
    with pytest.raises(BadConfig, match=r"--device is cuda, but .* has compute capability") as error:
        choose_device(EngineConfig(model="x", device="cuda"))
    assert words in str(error.value) and "\n" not in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert choose_device(EngineConfig(model="x")).type == "cpu"
        choose_device(EngineConfig(model="x"))
    assert [words in record.getMessage() for record in caplog.records] == [True], "one line, said once"
    assert caplog.records[0].getMessage().endswith("Computing on the CPU.")


def test_volta_and_pascal_run_with_torchs_old_build(monkeypatch: pytest.MonkeyPatch):
    for capability in ((7, 0), (6, 1), (6, 0)):
        assert why_not_on("a card", capability, CUDA126, "12.6") is None
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert has_own_kernels(torch.device("cuda", 0)) == (capability >= (7, 0))
    assert type(choose_ops(torch.device("cuda", 0))).__name__ == "ReferenceOps"


@pytest.mark.parametrize(
    ("driver", "cuda", "words"),
    [
        ("550.54.15", "13.0", ["driver 550.54.15", "CUDA 13.0", "install driver 580", "whl/cu126"]),
        ("470.82", "12.6", ["driver 470.82", "CUDA 12.6", "install driver 525"]),
        ("580.65", None, ["driver 580.65", "built for CPUs"]),
        ("580.65", "13.0", ["does not start", "nvidia-smi"]),
    ],
)
def test_a_driver_that_torch_does_not_use_is_one_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    smi,
    driver: str,
    cuda: str | None,
    words: list[str],
):
    smi(f"NVIDIA GeForce RTX 3090, {driver}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with caplog.at_level(logging.WARNING):
        assert choose_device(EngineConfig(model="x")).type == "cpu"
    [record] = caplog.records
    assert "RTX 3090" in record.getMessage() and all(word in record.getMessage() for word in words)
    assert not recwarn.list, "torch's own warning is not shown beside ours"
    assert choose_device(EngineConfig(model="x", device="cpu")).type == "cpu"


def test_a_gpu_that_was_hidden_on_purpose_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch, caplog, smi):
    smi("NVIDIA GeForce RTX 3090, 550.54")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device(EngineConfig(model="x")).type == "cpu"
    assert not caplog.records


@pytest.mark.parametrize("maker", ["AMD", "AMD's driver", "Intel", "Apple"])
def test_other_makers_gpus_are_one_line_and_the_cpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, maker: str
):
    monkeypatch.setenv("PATH", str(tmp_path))
    if maker == "AMD":
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    elif maker == "AMD's driver":
        monkeypatch.setattr(accelerator, "AMD_DRIVER", tmp_path)
    elif maker == "Intel":
        monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    else:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(EngineConfig(model="x")).type == "cpu"
    [record] = caplog.records
    assert maker.split("'")[0] in record.getMessage() and "support" in record.getMessage()
    with pytest.raises(BadConfig, match=r"--device is cuda, but .*use --device cpu"):
        choose_device(EngineConfig(model="x", device="cuda"))


def test_a_gpu_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch):
    a_gpu(monkeypatch, "NVIDIA H100", (9, 0), CUDA13, "13.0")

    def fails() -> int:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nmore lines")

    monkeypatch.setattr(torch.cuda, "current_device", fails)
    with pytest.raises(
        BadConfig, match="the GPU does not start: CUDA error: all CUDA-capable devices are busy"
    ) as error:
        choose_device(EngineConfig(model="x", device="cuda"))
    assert "\n" not in str(error.value)


def test_an_older_card_can_be_emulated_to_try_its_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert has_own_kernels(torch.device("cuda", 0))
    monkeypatch.setenv("FASTQWEN_EMULATED_CAPABILITY", "6.1")
    assert not has_own_kernels(torch.device("cuda", 0))
