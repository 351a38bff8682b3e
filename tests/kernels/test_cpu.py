"""The C++ ops against the reference, and the promise that a row's bits do not depend on its batch."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastqwen.kernels import AttentionParts, DenseWeight, HeadShape, LayerCache, Norm
from fastqwen.kernels.cpu import build
from fastqwen.kernels.cpu.ops import CpuOps
from fastqwen.kernels.reference import ReferenceOps
from tests.kernels.batches import copy_of, make_batch

REFERENCE = ReferenceOps()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    assert shutil.which("g++"), "the tests need g++"
    library = build.load()
    assert library is not None
    return CpuOps(library)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "k", "n"), [(1, 64, 7), (5, 576, 64), (70, 40, 33), (3, 7, 5)])
def test_linear(ops: CpuOps, dtype: torch.dtype, tokens: int, k: int, n: int) -> None:
    x, weight = torch.randn(tokens, k), DenseWeight(torch.randn(n, k).to(dtype), torch.randn(n).to(dtype))
    expected = REFERENCE.linear(x, weight)
    # beside bfloat16 weights x may be the sum of two bfloat16 numbers, which has 16 bits of its fraction
    atol = 1e-3 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ops.linear(x, weight), expected, rtol=1e-4, atol=atol)
    residual = torch.randn(tokens, n)
    added = residual + expected
    ops.linear_add(residual, x, weight)
    torch.testing.assert_close(residual, added, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_gate(ops: CpuOps, dtype: torch.dtype) -> None:
    x, norm = torch.randn(9, 72), Norm(torch.rand(72).to(dtype), 1e-6)
    torch.testing.assert_close(ops.rms_norm(x, norm), REFERENCE.rms_norm(x, norm), rtol=1e-5, atol=1e-6)
    gate_up = torch.randn(9, 2 * 40) * 30  # far into both tails of the exponential
    torch.testing.assert_close(ops.silu_mul(gate_up), REFERENCE.silu_mul(gate_up), rtol=1e-5, atol=1e-6)
    weight = DenseWeight(torch.randn(80, 72).to(dtype))
    expected = REFERENCE.norm_gated_linear(x, norm, weight)
    atol = 1e-3 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ops.norm_gated_linear(x, norm, weight), expected, rtol=1e-4, atol=atol)


SHAPES = [
    HeadShape(9, 3, 64, 64), HeadShape(4, 4, 64, 64), HeadShape(8, 2, 128, 128), HeadShape(2, 1, 24, 24),
    HeadShape(8, 2, 256, 64),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", [None, 5])
def test_attention_over_a_cache_of_its_own_type(
    ops: CpuOps, dtype: torch.dtype, shape: HeadShape, window: int | None
) -> None:
    """The arithmetic is in float32 whatever the cache is; behind the values stand numbers that attention does not read."""
    step, cache = make_batch([(0, 1), (33, 1), (0, 40), (17, 5)], shape, dtype=dtype, logn=shape.num_heads == 4)
    qkv = torch.randn(step.positions.shape[0], shape.width + 7)
    norms = (1 + torch.rand(2, shape.head_dim)).to(torch.float32 if dtype.itemsize == 1 else dtype)
    parts = AttentionParts(shape, *(norms if shape.num_heads == 8 else (None, None)), 1e-6, window)
    other = copy_of(cache)
    found = ops.attend(qkv, step, cache, parts)
    expected = REFERENCE.attend(qkv, step, other, parts)
    if dtype.itemsize == 1:  # a key between two numbers may be rounded to either
        codes, expected_codes = (one.k.view(torch.uint8).short() for one in (cache, other))
        assert ((codes - expected_codes).abs() % 255 <= 1).all()
        assert (found - expected).norm() < 2e-3 * expected.norm()
        return
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(cache.k, other.k, rtol=rounding, atol=rounding)
    torch.testing.assert_close(cache.v, other.v, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=max(rounding, 1e-4), atol=max(rounding, 1e-5))


def test_an_8_bit_cache_is_wrong_by_its_rounding_only() -> None:
    """Queries stay in the arithmetic's type: cast down to the cache's they would be wrong three times as much."""
    shape = HeadShape(8, 2, 64, 64)
    step, exact = make_batch([(0, 200)], shape)
    size = exact.k.shape
    cache = LayerCache(
        *(torch.zeros(size, dtype=torch.int8) for _ in range(2)), *(torch.zeros(size[:3]).half() for _ in range(2))
    )
    qkv, parts = torch.randn(200, shape.width), AttentionParts(shape)
    expected = REFERENCE.attend(qkv, step, exact, parts)
    error = (REFERENCE.attend(qkv, step, cache, parts) - expected).norm() / expected.norm()
    assert 0 < error < 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_any_batch(ops: CpuOps, dtype: torch.dtype) -> None:
    x, weight = torch.randn(131, 200), DenseWeight(torch.randn(50, 200).to(dtype))
    whole = ops.linear(x, weight)
    for size in (1, 3, 4, 7, 64, 65):
        assert torch.equal(torch.cat([ops.linear(part, weight) for part in x.split(size)]), whole)
    for threads in (1, 3, torch.get_num_threads()):
        ops.set_threads(threads)
        assert torch.equal(ops.linear(x, weight), whole)


def test_attention_has_the_same_bits_in_any_batch(ops: CpuOps) -> None:
    """Tokens of a prompt are computed some at a time; which ones they are with changes nothing."""
    shape = HeadShape(6, 2, 40, 40)
    for window in (None, 7):
        parts = AttentionParts(shape, window=window)
        step, cache = make_batch([(0, 1), (50, 1), (0, 37), (29, 20)], shape)
        qkv = torch.randn(step.positions.shape[0], shape.width)
        whole = ops.attend(qkv, step, cache, parts)
        for size in (1, 3, 8, 20):
            pieces = range(0, len(qkv), size)
            found = [ops.attend(qkv[at : at + size], step.part(at, at + size), cache, parts) for at in pieces]
            assert torch.equal(torch.cat(found), whole)


def test_calls_from_several_threads_do_not_meet(ops: CpuOps) -> None:
    """One of them has the pool at a time, the others compute alone."""
    ops.set_threads(4)
    work = [
        (torch.randn(rows, 96), DenseWeight(torch.randn(size, 96))) for rows, size in ((1, 3000), (40, 500), (7, 64))
    ]
    right = [ops.linear(*one) for one in work]

    def check(caller: int) -> bool:
        order = [(caller + turn) % len(work) for turn in range(60)]
        return all(torch.equal(ops.linear(*work[which]), right[which]) for which in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(4)))
    ops.set_threads(torch.get_num_threads())
