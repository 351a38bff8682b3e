"""Activations of 8 bits, through Triton's interpreter where there is no GPU; and by the library, where there is one.

The interpreter loses a carry when it rounds to 8 bits, so numbers are used that need no rounding.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from fastqwen.kernels import ScaledWeight  # noqa: E402
from fastqwen.kernels.cuda.eight_bit import eight_bit_product, multiplies, numbers_of  # noqa: E402
from fastqwen.kernels.cuda.pack import pack_scaled  # noqa: E402
from fastqwen.kernels.reference import unpack_scaled  # noqa: E402
from fastqwen.kernels.triton.quantize import quantize  # noqa: E402


def exact(rows: int, size: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of 8 bits whose largest of each part is 448, scales that are powers of two, and what both stand for."""
    codes = torch.randint(0, 256, (rows, size), dtype=torch.uint8)
    codes[codes % 128 == 127] = 0  # NaN
    numbers = codes.view(torch.float8_e4m3fn).float()
    numbers[:, ::width] = 448
    scales = 2.0 ** torch.randint(-6, 7, (rows, -(-size // width)))
    plain = numbers * scales.repeat_interleave(width, 1)[:, :size]
    return numbers.to(torch.float8_e4m3fn), scales, plain.bfloat16().to(DEVICE)


@pytest.mark.parametrize("rows, size, width, multiple", [(5, 384, 128, 4), (3, 640, 640, 1), (8, 1152, 128, 4)])
def test_numbers_that_need_no_rounding_come_back(rows: int, size: int, width: int, multiple: int):
    numbers, scales, x = exact(rows, size, width)
    found, found_scales = quantize(x, width, multiple=multiple)
    assert found.shape[0] == -(-rows // multiple) * multiple
    assert found[:rows].cpu().view(torch.uint8).equal(numbers.view(torch.uint8))
    assert found_scales.t()[:rows].cpu().equal(scales)
    assert not found[rows:].float().any()


def test_a_row_of_zeros_stays_zeros():
    numbers, scales = quantize(torch.zeros(2, 256, device=DEVICE).bfloat16(), 128)
    assert not numbers.float().any() and (scales > 0).all()


def weight(height: int, width: int, out_size: int = 256, in_size: int = 384) -> ScaledWeight:
    numbers = torch.randn(out_size, in_size).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-out_size // height), -(-in_size // width)) + 0.5
    return ScaledWeight(numbers.to(DEVICE), scales.to(DEVICE), (height, width))


def test_which_matrices_the_library_takes():
    blocks, rows, odd = pack_scaled(weight(128, 128)), pack_scaled(weight(1, 384)), pack_scaled(weight(64, 64))
    assert blocks is not None and rows is not None and odd is not None
    assert multiplies(blocks, (9, 0)) and not multiplies(blocks, (8, 9)) and not multiplies(blocks, (12, 0))
    assert multiplies(rows, (8, 9)) and multiplies(rows, (12, 0)) and not multiplies(rows, (8, 6))
    assert not multiplies(odd, (9, 0))
    uneven = pack_scaled(weight(1, 384, out_size=250))
    assert uneven is not None and not multiplies(uneven, (9, 0))


def test_the_librarys_matrix_is_the_files():
    given = weight(128, 128, out_size=144, in_size=320)
    packed = pack_scaled(given)
    assert packed is not None
    assert numbers_of(packed).view(torch.uint8).equal(given.numbers.view(torch.uint8))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("rows", [17, 64, 301])
@pytest.mark.parametrize("height, width", [(128, 128), (1, 384), (256, 384)])
def test_a_product(rows: int, height: int, width: int):
    given = weight(height, width)
    packed = pack_scaled(given)
    assert packed is not None
    if not multiplies(packed, torch.cuda.get_device_capability()):
        pytest.skip("this card's library has no such product")
    _, _, x = exact(rows, 384, 128 if height == 128 else 384)
    found, expected = eight_bit_product(x, packed).float(), x.float() @ unpack_scaled(given, 0, 256).t()
    assert ((found - expected).abs() / (expected.abs() + expected.abs().mean())).max() < 0.02
