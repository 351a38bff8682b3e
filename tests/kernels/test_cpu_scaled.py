"""Products with 8-bit floating-point weights on a CPU: exact numbers, any block, one result for a row."""

from __future__ import annotations

import pytest
import torch

from fastqwen.kernels import Norm, ScaledWeight
from fastqwen.kernels.cpu import build
from fastqwen.kernels.cpu.ops import CpuOps
from fastqwen.kernels.reference import ReferenceOps, unpack_scaled


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    library = build.load()
    assert library is not None, "the tests need g++"
    return CpuOps(library)


def make_weight(out_size: int, in_size: int, block: tuple[int, int], *, bias: bool = False) -> ScaledWeight:
    scales = torch.rand(-(-out_size // block[0]), -(-in_size // block[1])) + 0.5
    numbers = torch.randn(out_size, in_size).to(torch.float8_e4m3fn)
    return ScaledWeight(numbers, scales, block, torch.randn(out_size) if bias else None)


@pytest.mark.parametrize("block", [(128, 128), (1, 300), (200, 300), (64, 24), (3, 7)])
@pytest.mark.parametrize("rows", [1, 3, 4, 11])
def test_products_are_those_of_the_reference(ops: CpuOps, block: tuple[int, int], rows: int) -> None:
    weight, x = make_weight(70, 300, block, bias=rows == 3), torch.randn(rows, 300)
    product = ops.packed(weight, torch.bfloat16)
    assert product is not None
    right = ReferenceOps().scaled_linear(x, weight)
    torch.testing.assert_close(product.plain(x), right, rtol=1e-5, atol=1e-4)
    residual = torch.randn(rows, 70)
    added = residual + right
    product.add_to(residual, x)
    torch.testing.assert_close(residual, added, rtol=1e-5, atol=1e-4)
    norm = Norm(torch.rand(300), 1e-6)
    torch.testing.assert_close(product.of_norm(x, norm), product.plain(ops.rms_norm(x, norm)), rtol=0, atol=0)


def test_every_number_is_read_as_what_it_is(ops: CpuOps) -> None:
    numbers = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    weight = ScaledWeight(numbers, torch.ones(1, 1), (16, 16))
    product = ops.packed(weight, torch.float32)
    assert product is not None
    found, right = product.plain(torch.eye(16)), unpack_scaled(weight, 0, 16).T
    finite = right.isfinite()  # a checkpoint's NaN is refused before
    assert finite.sum() == 254 and torch.equal(found[finite], right[finite])


def test_a_row_has_the_same_bits_in_any_batch(ops: CpuOps) -> None:
    product, x = ops.packed(make_weight(41, 300, (128, 128)), torch.bfloat16), torch.randn(13, 300)
    assert product is not None
    whole = product.plain(x)
    for size in (1, 2, 5):
        assert torch.equal(torch.cat([product.plain(part) for part in x.split(size)]), whole)
