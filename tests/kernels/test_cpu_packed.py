"""Products with packed weights on a CPU against the plain ones of the reference, and each path of the kernels alike."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastqwen.kernels import CodedWeight, GroupedWeight, Norm, Product
from fastqwen.kernels.cpu import build, packed
from fastqwen.kernels.cpu.ops import CpuOps
from fastqwen.kernels.reference import ReferenceOps, round_to_blocks, unpack_coded, unpack_grouped

REFERENCE = ReferenceOps()
# What each packed type of GGUF is: bits of a code, zero, inputs with one scale, whether these have parts, and minima.
TYPES = {
    "Q4_0": (4, 8, 32, False, False),
    "Q4_1": (4, 0, 32, False, True),
    "Q5_0": (5, 16, 32, False, False),
    "Q5_1": (5, 0, 32, False, True),
    "Q8_0": (8, 128, 32, False, False),
    "Q2_K": (2, 0, 256, True, True),
    "Q3_K": (3, 4, 256, True, False),
    "Q4_K": (4, 0, 256, True, True),
    "Q5_K": (5, 0, 256, True, True),
    "Q6_K": (6, 32, 256, True, False),
}
# Without AVX-512, and with nothing but what every processor of its kind has.
PATHS = {"avx2": ["-march=x86-64-v3"], "plain": []}


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    library = build.load()
    assert library is not None, "the tests need g++"
    return CpuOps(library)


def make_weight(name: str, out_size: int, in_size: int, *, bias: bool = False) -> CodedWeight:
    bits, zero, group, has_parts, has_minima = TYPES[name]
    part = 16 if bits in (2, 3, 6) else 32
    groups, parts = (out_size, in_size // group), (out_size, in_size // part)
    return CodedWeight(
        codes=torch.randint(0, 2**bits, (out_size, in_size), dtype=torch.uint8),
        bits=bits,
        zero=zero,
        scales=(0.01 * torch.randn(groups)).half(),
        group_size=group,
        part_size=part,
        parts=torch.randint(-32, 64, parts, dtype=torch.int8) if has_parts else None,
        minima=(0.1 * torch.randn(groups)).half() if has_minima else None,
        min_parts=torch.randint(0, 64, parts, dtype=torch.uint8) if has_parts and has_minima else None,
        bias=torch.randn(out_size) if bias else None,
    )


def right(x: Tensor, weight: CodedWeight) -> Tensor:
    out = round_to_blocks(x) @ unpack_coded(weight).double().T
    return out if weight.bias is None else out + weight.bias


def check(found: Tensor, expected: Tensor, error: float = 1e-6) -> None:
    assert (found - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(("tokens", "out_size"), [(1, 16), (5, 72), (27, 33), (150, 48)])
def test_products_are_those_of_rounded_activations(ops: CpuOps, name: str, tokens: int, out_size: int) -> None:
    weight = make_weight(name, out_size, 512, bias=out_size == 33)
    x = torch.randn(tokens, 512) * torch.rand(tokens, 1) * 10
    product, expected = ops.coded(weight), right(x, weight)
    check(product.plain(x), expected)
    residual = torch.randn(tokens, out_size)
    added = residual + expected
    product.add_to(residual, x)
    check(residual, added)


@pytest.mark.parametrize("out_size", [64, 40])  # whole tiles of gate and up, and halves that share one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_norm_and_a_gate(ops: CpuOps, out_size: int, dtype: torch.dtype) -> None:
    weight, norm = make_weight("Q4_K", out_size, 256), Norm(torch.rand(256).to(dtype), 1e-6)
    x = torch.randn(9, 256)
    normed, product = ops.rms_norm(x, norm), ops.coded(weight)
    assert torch.equal(product.of_norm(x, norm), product.plain(normed))
    torch.testing.assert_close(
        product.gated_of_norm(x, norm), REFERENCE.silu_mul(product.plain(normed)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", TYPES)
def test_a_row_has_the_same_bits_in_any_batch(ops: CpuOps, name: str) -> None:
    # from 16 rows on some processors have instructions of their own for them
    product, x = ops.coded(make_weight(name, 80, 256)), torch.randn(141, 256)
    whole = product.plain(x)
    for size in (1, 2, 3, 7, 8, 13, 16, 37, 128):
        assert torch.equal(torch.cat([product.plain(part) for part in x.split(size)]), whole)
    ops.set_threads(1)
    assert torch.equal(product.plain(x), whole)
    ops.set_threads(3)
    assert torch.equal(product.plain(x), whole)
    ops.set_threads(torch.get_num_threads())


def test_what_is_no_number_stays_none(ops: CpuOps) -> None:
    """A row that failed must be seen; its neighbours are not touched. Zeros have no largest number to divide by."""
    product, x = ops.coded(make_weight("Q4_1", 16, 64)), torch.randn(4, 64)
    fine = product.plain(x)
    x[1, 40], x[2, 3] = torch.nan, -torch.inf
    found = product.plain(x)
    assert not found[1:3].isfinite().any()
    assert torch.equal(found[::3], fine[::3])
    assert product.plain(torch.zeros(1, 64)).eq(0).all()
    assert product.plain(torch.full((1, 64), 1e-38)).isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_every_instruction_set_computes_the_same(ops: CpuOps, path: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    assert compiler is not None
    assert build._compile([compiler, "-O1", *build.FLAGS[1:], *PATHS[path]], tmp_path / "kernels.so") is None
    other = CpuOps(ctypes.CDLL(str(tmp_path / "kernels.so")))
    x = torch.randn(11, 512)
    x[:, :32] = x.abs().amax()
    for name in TYPES:
        weight = make_weight(name, 48, 512)
        weight.codes[:, :32] = 2**weight.bits - 1  # the largest sums that have to fit
        # where multiplying and adding are two steps, a number between two whole ones may become the other of them
        check(other.coded(weight).plain(x), right(x, weight), 1e-3)


def grouped(bits: int, group_size: int, *, symmetric: bool, ordered: bool = True) -> GroupedWeight:
    in_size, out_size = 384, 40
    groups = max(1, in_size // group_size)
    middle = 2 ** (bits - 1)
    zeros = torch.full((groups, out_size), middle) if symmetric else torch.randint(0, 2**bits, (groups, out_size))
    return GroupedWeight(
        codes=torch.randint(-(2**31), 2**31 - 1, (in_size * bits // 32, out_size), dtype=torch.int32),
        scales=(0.01 * torch.rand(groups, out_size)).half(),
        zeros=zeros.short(),
        group_of=None if ordered else torch.arange(in_size)[torch.randperm(in_size)] // group_size,
        bits=bits,
        group_size=group_size,
        bias=torch.randn(out_size),
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 384, 512])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_grouped_weights_stay_packed(ops: CpuOps, bits: int, group_size: int, symmetric: bool, ordered: bool) -> None:
    weight = grouped(bits, group_size, symmetric=symmetric, ordered=ordered)
    product = ops.packed(weight, torch.bfloat16)
    assert product is not None
    x, norm = torch.randn(22, 384), Norm(torch.rand(384), 1e-6)
    order = torch.arange(384) if weight.group_of is None else weight.group_of.argsort(stable=True)
    plain = unpack_grouped(weight, 0, weight.out_size).double()[:, order]
    assert weight.bias is not None
    check(product.plain(x), round_to_blocks(x[:, order]) @ plain.T + weight.bias)
    torch.testing.assert_close(product.of_norm(x, norm), product.plain(ops.rms_norm(x, norm)), rtol=1e-4, atol=1e-4)
    # about what a file has: codes, and a scale (and a zero) for each group, of 32 inputs at least
    assert product.num_bytes < 1.3 * (48 * 384 * bits / 8 + 48 * 384 / min(group_size, 32) * 3) + 4096


def test_in_float32_nothing_is_rounded(ops: CpuOps) -> None:
    assert not ops.takes_codes(torch.float32)
    assert ops.packed(grouped(4, 32, symmetric=True), torch.float32) is None


def test_groups_that_no_block_holds_are_computed_as_they_are(ops: CpuOps) -> None:
    uneven = grouped(4, 128, symmetric=True, ordered=False)
    assert uneven.group_of is not None
    uneven.group_of[0] = (uneven.group_of[0] + 1) % 3
    assert packed.coded(grouped(4, 48, symmetric=True)) is None
    assert packed.coded(uneven) is None


def test_memory_is_that_of_the_file(ops: CpuOps) -> None:
    sizes = {"Q4_0": 18 / 32, "Q4_1": 20 / 32, "Q5_0": 22 / 32, "Q5_1": 24 / 32, "Q8_0": 34 / 32}
    sizes |= {"Q2_K": 84 / 256, "Q3_K": 110 / 256, "Q4_K": 144 / 256, "Q5_K": 176 / 256, "Q6_K": 210 / 256}
    for name, size in sizes.items():
        product: Product = ops.coded(make_weight(name, 64, 1024))
        # Q2_K has a scale and a minimum in one byte for 16 inputs; here each has its own
        assert product.num_bytes <= (1.2 if name == "Q2_K" else 1.15) * 64 * 1024 * size, name
