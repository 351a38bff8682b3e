"""packed_linear.cu on a CPU (cuda_on_cpu.h) against the reference operations."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fastqwen.kernels import GroupedWeight, Norm, ScaledWeight
from fastqwen.kernels.cuda import packed_linear
from fastqwen.kernels.cuda.pack import PackedWeight, pack_codes, pack_grouped, pack_scaled, unpack_codes
from fastqwen.kernels.cuda.packed_linear import (
    Args,
    PackedTiling,
    Variant,
    args_of,
    few_launch,
    plain_args,
    some_launch,
    variant_of,
)
from fastqwen.kernels.reference import ReferenceOps, unpack_grouped, unpack_scaled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

OPS = ReferenceOps()
Run = Callable[[Args, int], None]


def compiled(variant: Variant, path: Path) -> ctypes.CDLL:
    path.write_text(
        f'#include "{Path(__file__).parent / "cuda_on_cpu.h"}"\n{kernel_source()}\n'
        f"KERNEL(kernel)(Args args) {{ {variant.body}(args); }}\n"
        'extern "C" void run(const Args* args, int blocks) { Launch<Args>::run(kernel, *args, blocks, 32 * WARPS); }\n'
        'extern "C" { int few_bytes = sizeof(FewShared), some_bytes = sizeof(SomeShared<4, 4>); }\n'
    )
    defines = [f"-D{name}={value}" for name, value in variant.defines().items()]
    library = path.with_suffix(".so")
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-w", *defines, "-o", str(library), str(path)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant], Run]:
    """A variant's kernel as a function of the CPU: arguments, number of blocks."""
    folder, built = tmp_path_factory.mktemp("kernels"), {}

    def run_of(variant: Variant) -> Run:
        if variant not in built:
            built[variant] = compiled(variant, folder / f"{len(built)}.cpp").run
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
    found = x.float() @ plain.t()
    return found if weight.bias is None else found + weight.bias.float()


def inputs(x: Tensor, packed: PackedWeight) -> Tensor:
    return x if packed.order is None else functional.pad(x, (0, 1))[:, packed.order].contiguous()


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
    x = torch.randn(rows, 448).to(dtype)
    for blocks in (1, 5):
        found = compute(build, x, packed, blocks, wide=wide)
        torch.testing.assert_close(found.float(), expected(x, weight), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("bits, group, order", [(4, 32, ""), (4, 96, ""), (4, 40, ""), (8, 32, ""), (4, 448, ""),
                                                (4, 64, "shuffled"), (8, 128, "uneven"), (4, 128, "uneven")])  # fmt: skip
def test_zeros_and_groups_of_any_kind(build: Callable[[Variant], Run], rows: int, bits: int, group: int, order: str):
    weight = replace(grouped(bits, 448, 72, group, symmetric=False, order=order), bias=torch.randn(72).half())
    x = torch.randn(rows, 448).half()
    packed = pack_grouped(weight)
    found = compute(build, inputs(x, packed), packed, 3)
    torch.testing.assert_close(found.float(), expected(x, weight), rtol=0.01, atol=0.1)


def test_scales_that_float16_does_not_hold(build: Callable[[Variant], Run]):
    weight = grouped(8, 128, 64, 64)
    weight = replace(weight, scales=weight.scales.float() * 1e-4)
    packed = pack_grouped(weight)
    x = torch.randn(3, 128).bfloat16()
    assert packed.kind == "FLOATS"
    torch.testing.assert_close(
        compute(build, x, packed, 2).float(), expected(x, weight), rtol=0.01, atol=float(weight.scales.max())
    )


@pytest.mark.parametrize("rows, wide", [(1, 4), (3, 4), (20, 8)])
def test_the_forms_of_a_product(build: Callable[[Variant], Run], rows: int, wide: int):
    weight = grouped(4, 256, 96, 128)
    packed, x = pack_grouped(weight), torch.randn(rows, 256).half()
    plain = expected(x, weight)
    residual = torch.randn(rows, 96).half()
    added = compute(build, x, packed, 4, residual=residual, wide=wide)
    torch.testing.assert_close(added.float(), residual.float() + plain, rtol=0.01, atol=0.05)
    gated = compute(build, x, packed, 4, gated=True, wide=wide)
    torch.testing.assert_close(gated.float(), functional.silu(plain[:, :48]) * plain[:, 48:], rtol=0.02, atol=0.02)
    if rows <= 8:
        norm = Norm(torch.rand(256).half() + 0.5, 1e-5)
        normed = compute(build, x * 7, packed, 4, norm=norm)
        torch.testing.assert_close(normed.float(), expected(OPS.rms_norm(x * 7, norm), weight), rtol=0.01, atol=0.05)


@pytest.mark.parametrize("rows", [1, 5])
def test_whole_tiles_are_one_blocks_work(build: Callable[[Variant], Run], rows: int):
    weight = grouped(4, 320, 160, 64)
    packed, x = pack_grouped(weight), torch.randn(rows, 320).half()
    found = compute(build, x, packed, 3, grain=packed.units)
    torch.testing.assert_close(found.float(), expected(x, weight), rtol=0.01, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_of_8_bits_floating_point(build: Callable[[Variant], Run], dtype: torch.dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(32, 1) + torch.arange(32, dtype=torch.uint8)[:, None]
    codes[codes % 128 == 127] = 0  # NaN
    x = torch.randn(2, 256).to(dtype)
    for block in ((16, 128), (1, 256), (8, 64)):
        counts = 32 // block[0], 256 // block[1]
        weight = ScaledWeight(codes.view(torch.float8_e4m3fn), torch.rand(counts), block)
        packed = pack_scaled(weight)
        assert packed is not None
        found = compute(build, x, packed, 2)
        plain = unpack_scaled(weight, 0, 32)
        torch.testing.assert_close(found.float(), x.float() @ plain.t(), rtol=0.01, atol=0.5)


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacking_gives_the_plain_numbers(build: Callable[[Variant], Run], bits: int):
    weight = grouped(bits, 320, 80, 64, symmetric=False)
    packed = pack_grouped(weight)
    padded = packed.units * 256 // bits
    out = torch.zeros(packed.tiles * 16, padded).half()
    build(variant_of("unpack", torch.float16, packed))(plain_args(packed, out), 2)
    assert out[:80, :320].equal(unpack_grouped(weight, 0, 80).half())


def test_what_python_counts_is_what_the_kernel_sets_aside(tmp_path: Path):
    """Of shared memory; for few rows those of x follow behind: 4 of 56 pieces of 16 bytes, and 4 between them."""
    packed = pack_grouped(grouped(4, 448, 80, 128, symmetric=False))
    few = few_launch(torch.float16, 3, packed, PackedTiling())
    some = some_launch(torch.float16, 30, packed, PackedTiling())
    library = compiled(few.variant, tmp_path / "sizes.cpp")
    few_bytes, some_bytes = (ctypes.c_int.in_dll(library, name).value for name in ("few_bytes", "some_bytes"))
    assert few.shared_bytes == few_bytes + 4 * 16 * (56 + 4)
    assert some.shared_bytes == some_bytes
