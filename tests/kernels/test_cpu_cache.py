"""Compiled kernels where the cache cannot hold them: from a temporary folder, or none; always one line, never a traceback."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastqwen.errors import BadConfig
from fastqwen.kernels.cpu import build
from fastqwen.paths import cache_dir, state_dir


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where something was compiled; in place of the compiler."""
    targets: list[Path] = []

    def compile_(compilers: list[str], target: Path) -> bool:
        with open(target, "wb"):
            targets.append(target)
        return True

    monkeypatch.setattr(build, "compile_kernels", compile_)
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: path)
    return targets


def test_a_cache_that_can_be_written(
    compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("FASTQWEN_CACHE", str(tmp_path))
    assert build.load() == build.load() == str(compiled[0])
    assert compiled[0].parent == tmp_path and len(compiled) == 1 and not caplog.text


@pytest.mark.parametrize("where", ["a file", "a folder under a file", "proc"])
def test_a_cache_that_cannot(
    where: str,
    compiled: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    file = tmp_path / "file"
    file.touch()
    place = {"a file": file, "a folder under a file": file / "cache", "proc": Path("/proc/fastqwen")}[where]
    monkeypatch.setenv("FASTQWEN_CACHE", str(place))
    with pytest.raises(BadConfig, match="FASTQWEN_CACHE") as caught:
        cache_dir()
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert build.load() is not None
    assert not compiled[0].exists() and "slower" in caplog.text and len(caplog.records) == 1


def test_code_that_may_not_be_loaded_from_the_cache(
    compiled: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def load(path: str) -> str:
        if Path(path).parent == tmp_path:
            raise OSError("failed to map segment from shared object")
        return path

    monkeypatch.setenv("FASTQWEN_CACHE", str(tmp_path))
    monkeypatch.setattr(build.ctypes, "CDLL", load)
    assert build.load() == str(compiled[1]) and "failed to map" in caplog.text


def test_a_full_disk_is_told_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("FASTQWEN_CACHE", str(tmp_path))
    monkeypatch.setattr(build.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(build, "_run", lambda command, folder: pytest.fail("there is no room for what comes of it"))
    with caplog.at_level(logging.WARNING):
        assert build.load() is None
    assert "No space left" in caplog.text and "using plain torch" in caplog.text and len(caplog.records) == 2


def test_the_compiler_writes_where_its_work_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """TMPDIR may be full: Python looks for another place then, compilers do not."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "$TMPDIR" >> "$0.log"\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    assert build.compile_kernels([str(compiler)], tmp_path / "kernels.so")
    places = set((tmp_path / "g++.log").read_text().split())
    assert len(places) == 1 and Path(places.pop()).parent == tmp_path


def test_a_home_that_is_no_folder(monkeypatch: pytest.MonkeyPatch):
    for name in ("FASTQWEN_STATE", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", os.devnull)
    with pytest.raises(BadConfig, match="FASTQWEN_STATE"):
        state_dir()
