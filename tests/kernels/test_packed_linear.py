"""packed_linear.cu on a CPU (cuda_on_cpu.h) against the reference operations."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastqwen.kernels import GroupedWeight, Norm
from fastqwen.kernels.cuda import packed_linear
from fastqwen.kernels.cuda.pack import PackedWeight, pack_codes, pack_grouped, unpack_codes
from fastqwen.kernels.cuda.packed_linear import Args, PackedTiling, Variant, args_of, few_launch, some_launch
from fastqwen.kernels.reference import ReferenceOps, unpack_grouped

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

OPS = ReferenceOps()
Run = Callable[[Args, int], None]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], Run]:
    """A variant's kernel as a function of the CPU: arguments, number of blocks."""
    folder, built = tmp_path_factory.mktemp("kernels"), {}

    def run_of(variant: Variant) -> Run:
        if variant not in built:
            path = folder / f"{len(built)}.cpp"
            path.write_text(
                f'#include "{Path(__file__).parent / "cuda_on_cpu.h"}"\n{kernel_source()}\n'
                f"KERNEL(kernel)(Args args) {{ {variant.body}(args); }}\n"
                'extern "C" void run(const Args* args, int blocks) { Launch<Args>::run(kernel, *args, blocks, 32 * WARPS); }'
            )
            defines = [f"-D{name}={value}" for name, value in variant.defines().items()]
            library = path.with_suffix(".so")
            command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *defines, "-o", str(library), str(path)]
            subprocess.run(command, check=True)
            built[variant] = ctypes.CDLL(str(library)).run
        function = built[variant]
        return lambda args, blocks: function(ctypes.byref(args), blocks)

    return run_of


def kernel_source() -> str:
    return (Path(packed_linear.__file__).parent / "packed_linear.cu").read_text()


def grouped(
    bits: int, in_size: int, out_size: int, group: int, *, symmetric: bool = True, order: str = ""
) -> GroupedWeight:
    groups = -(-in_size // group)
    scales = (torch.rand(groups, out_size) * 0.02 + 0.01).half()
    zero = 2 ** (bits - 1)
    zeros = torch.full((groups, out_size), zero, dtype=torch.int16)
    if not symmetric:
        zeros = torch.randint(1, 2**bits + 1, (groups, out_size), dtype=torch.int16)
    codes = torch.randint(-(2**31), 2**31 - 1, (in_size * bits // 32, out_size), dtype=torch.int32)
    group_of = None
    if order == "shuffled":
        group_of = (torch.arange(in_size) // group)[torch.randperm(in_size)]
    if order == "uneven":
        group_of = torch.randint(0, groups, (in_size,))
    return GroupedWeight(codes, scales, zeros, group_of, bits, group)


def compute(
    build: Callable[[Variant], Run], x: Tensor, weight: PackedWeight, blocks: int, *, gated: bool = False,
    norm: Norm | None = None, residual: Tensor | None = None, wide: int = 4, grain: int = 1,
) -> Tensor:  # fmt: skip
    out_size = weight.out_size // 2 if gated else weight.out_size
    out = torch.full((x.shape[0], out_size), 77.0, dtype=x.dtype) if residual is None else residual.clone()
    partial, counter = torch.full((2**18,), torch.nan), torch.zeros(64, dtype=torch.int32)
    args = args_of(x, weight, out, partial, counter, norm=norm, gated=gated, add=residual is not None, grain=grain)
    tiling = PackedTiling(depth=3, stages=3, wide=wide)
    launch = (few_launch if x.shape[0] <= 8 else some_launch)(x.dtype, x.shape[0], weight, tiling)
    build(launch.variant)(args, blocks)
    assert not counter.any()
    return out


def expected(x: Tensor, weight: GroupedWeight) -> Tensor:
    plain = unpack_grouped(weight, 0, weight.out_size).float()
    return x.float() @ plain.t()


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_survive_their_order(bits: int):
    codes = torch.randint(0, 2**bits, (48, 128), dtype=torch.uint8)
    assert unpack_codes(pack_codes(codes, bits), bits).equal(codes)


@pytest.mark.parametrize("rows, wide", [(1, 4), (2, 4), (7, 4), (11, 4), (50, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_product(build: Callable[[Variant], Run], rows: int, wide: int, dtype: torch.dtype, bits: int):
    weight = grouped(bits, 448, 80, 128)
    packed = pack_grouped(weight)
    assert packed is not None
    x = torch.randn(rows, 448).to(dtype)
    for blocks in (1, 5):
        found = compute(build, x, packed, blocks, wide=wide)
        torch.testing.assert_close(found.float(), expected(x, weight), rtol=0.01, atol=0.02)
