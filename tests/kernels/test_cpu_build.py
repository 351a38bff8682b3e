"""The C++ kernels by whatever compiler there is: g++ before 12 and clang before 15 have no _Float16."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from fastqwen.kernels import DenseWeight, Norm
from fastqwen.kernels.cpu import build
from fastqwen.kernels.cpu.ops import CpuOps
from fastqwen.kernels.reference import ReferenceOps

COMPILERS = [name for name in ("g++", "g++-11", "g++-12", "g++-13", "clang++") if shutil.which(name)]
ALL_HALVES = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.fixture(scope="module", params=[*COMPILERS, "g++ -DNO_FLOAT16"])
def ops(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CpuOps:
    name, *more = request.param.split(" ", 1)
    compiler = shutil.which(name)
    assert compiler is not None, f"the tests need {name}"
    target = tmp_path_factory.mktemp("kernels") / "kernels.so"
    assert build._compile([compiler, "-O1", *build.FLAGS[1:], "-march=native", *more], target) is None
    return CpuOps(ctypes.CDLL(str(target)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_reference(ops: CpuOps, dtype: torch.dtype):
    x, weight = torch.randn(5, 100), DenseWeight(torch.randn(33, 100).to(dtype), torch.randn(33).to(dtype))
    atol = 1e-3 if dtype == torch.bfloat16 else 1e-4  # bfloat16 weights see x as the sum of two such numbers
    torch.testing.assert_close(ops.linear(x, weight), ReferenceOps().linear(x, weight), rtol=1e-4, atol=atol)
    norm = Norm(torch.rand(100).to(dtype), 1e-6)
    torch.testing.assert_close(ops.rms_norm(x, norm), ReferenceOps().rms_norm(x, norm), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inputs", [1, 32])  # one number at a time, and in vectors
def test_every_float16_is_read_as_what_it_is(ops: CpuOps, inputs: int):
    """A product with 1 is the number itself: subnormals, infinity and all."""
    rows = ALL_HALVES.reshape(-1, 1)
    weight = torch.cat([rows, torch.zeros(len(rows), inputs - 1, dtype=torch.float16)], dim=1).contiguous()
    x = torch.zeros(1, inputs)
    x[0, 0] = 1
    found, right = ops.linear(x, DenseWeight(weight))[0], ALL_HALVES.float()
    plain = right.isfinite()
    assert torch.equal(found[plain], right[plain])
    if inputs == 1:
        assert torch.equal(found[right.isinf()], right[right.isinf()])
    assert found[right.isnan()].isnan().all()


NARROW = """
#include <cstdio>
#include "vectors.h"
int main() {
  float v;
  while (std::fread(&v, 4, 1, stdin) == 1) {
    f16 out;
    narrow(v, &out);
    std::fwrite(&out, 2, 1, stdout);
  }
}
"""


def test_float16_by_bits_is_rounded_as_by_the_processor(tmp_path: Path):
    """Ties, what becomes subnormal or 0, what becomes infinite, and NaN."""
    program, source = tmp_path / "narrow", tmp_path / "narrow.cpp"
    source.write_text(NARROW)
    command = ["g++", "-O1", "-std=c++17", "-DNO_FLOAT16", "-Wno-psabi", f"-I{build.FOLDER}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True, capture_output=True)
    halves = ALL_HALVES.float()
    halves = halves[halves.isfinite()].sort().values
    ties = (halves[1:] + halves[:-1]) / 2
    around = torch.cat([ties, ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(-torch.inf))])
    edges = torch.tensor([65519.99, 65520.0, 1e30, 2e-8, 3e-8, 2.98e-8, 1e-40, torch.inf])
    values = torch.cat([halves, around, edges, -edges, torch.randn(10_000) * 1e3, torch.tensor([torch.nan])])
    done = subprocess.run([str(program)], input=values.numpy().tobytes(), check=True, capture_output=True)
    found = torch.frombuffer(bytearray(done.stdout), dtype=torch.float16)
    right = values.half()
    assert found[-1].isnan()
    assert torch.equal(found[:-1].view(torch.int16), right[:-1].view(torch.int16))


def fake_compiler(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_compiler_without_march_is_asked_for_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As clang on a Mac: -mcpu instead of -march."""
    real = shutil.which("g++")
    refuses = 'for word in "$@"; do case $word in -march=*|-mcpu=*) echo "no $word" >&2; exit 1;; esac; done'
    fake_compiler(tmp_path, "clang++", f'{refuses}\nexec {real} "$@"')
    fake_compiler(tmp_path, "g++", "echo broken >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "FLAGS", ("-O1", *build.FLAGS[1:]))  # the test must not take long
    with caplog.at_level(logging.INFO):
        assert build.compile_kernels(build.find_compilers()[:2], tmp_path / "kernels.so")
    assert ctypes.CDLL(str(tmp_path / "kernels.so"))
    [line] = caplog.records
    assert "compiling the CPU kernels, once" in line.getMessage()


def test_no_compiler_that_works_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fake_compiler(tmp_path, "broken", "echo 'error: nothing works' >&2; exit 1")
    monkeypatch.setenv("CXX", str(tmp_path / "broken"))
    assert not build.compile_kernels(build.find_compilers(), tmp_path / "kernels.so")
    assert not build.compile_kernels([], tmp_path / "kernels.so")
    first, second = (record.getMessage() for record in caplog.records)
    assert "nothing works" in first and "using plain torch" in first
    assert "no C++ compiler" in second


def test_every_source_is_in_the_package():
    """An installed fastqwen compiles them, too."""
    root = build.FOLDER.parents[2]
    globs = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"][
        "fastqwen"
    ]
    sources = [path for path in build.FOLDER.iterdir() if path.suffix in (".cpp", ".h")]
    assert len(sources) > 3
    package = build.FOLDER.parents[1]
    assert all(any(path.relative_to(package).match(glob) for glob in globs) for path in sources)
