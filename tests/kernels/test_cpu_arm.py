"""Products with packed weights on ARM's processors, emulated: where a cross compiler and qemu-user are installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from fastqwen.kernels import CodedWeight
from fastqwen.kernels.cpu import build, packed
from fastqwen.kernels.cpu.arena import Arena
from tests.kernels.test_cpu_packed import TYPES, check, make_weight, right

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
# By the instructions that they have for products of bytes: those of 2018, those of 2020, none.
PROCESSORS = {"dotprod": "armv8.2-a+dotprod+fp16", "i8mm": "armv8.6-a", "plain": "armv8-a"}

pytestmark = pytest.mark.skipif(
    COMPILER is None or EMULATOR is None, reason="needs g++-aarch64-linux-gnu and qemu-user"
)


@pytest.fixture(scope="module", params=PROCESSORS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("arm") / "program"
    sources = [Path(__file__).with_name("on_arm.cpp"), build.FOLDER / "kernels.cpp", build.FOLDER / "attention.cpp"]
    flags = ["-O2", "-std=c++17", "-static", "-pthread", "-Wno-psabi", f"-march={PROCESSORS[request.param]}"]
    assert COMPILER is not None
    subprocess.run([COMPILER, *flags, f"-I{build.FOLDER}", *map(str, sources), "-o", str(out)], check=True)
    return out


def products(program: Path, weight: CodedWeight, x: torch.Tensor) -> torch.Tensor:
    def pack(*_: object) -> None:
        """The program packs the codes."""

    tiled = packed.tiled(weight, pack, Arena())
    header, tensors = tiled.header, tiled.tensors
    names = ("parts", "minima", "min_parts")
    numbers = (
        *(header.kind, header.halves, header.zero, header.shift, header.inputs, header.outputs, len(x)),
        *(name in tensors for name in names),
        *(tiled.codes.nbytes, tensors["scales"].numel() // packed.TILE),
    )
    inputs = [struct.pack("<12q", *numbers), weight.codes.numpy().tobytes(), tensors["scales"].numpy().tobytes()]
    inputs += [tensors[name].numpy().tobytes() for name in names if name in tensors]
    assert EMULATOR is not None
    run = subprocess.run(
        [EMULATOR, "-cpu", "max", str(program)],
        input=b"".join([*inputs, x.numpy().tobytes()]),
        capture_output=True,
        check=True,
    )
    return torch.frombuffer(bytearray(run.stdout), dtype=torch.float32).view(len(x), -1)


@pytest.mark.parametrize("name", TYPES)
def test_products(program: Path, name: str) -> None:
    weight, x = make_weight(name, 48, 512), torch.randn(11, 512)
    weight.codes[:, :32] = 2**weight.bits - 1  # the largest sums that have to fit
    x[:, :32] = x.abs().amax()
    found = products(program, weight, x)
    # where multiplying and adding are two steps, a number between two whole ones may become the other of them
    check(found, right(x, weight), 1e-5)
    assert torch.equal(torch.cat([products(program, weight, x[:1]), products(program, weight, x[1:5])]), found[:5])
